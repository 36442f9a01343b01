"""The token embedding, its vocabulary cut over an axis; a tied head multiplies by the same weight."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import comm, rng
from ..layout import Layout
from ..mesh import Axis


class VocabParallelEmbedding(nn.Module):
    """Rows of a [V, H] table; each rank of `tp` holds [V/tp, H] and looks up the ids that fall into its rows.

    tokens: int64 [B, T].   y: [B, T, H] on every rank. Rows past `vocab_size` are padding, zero and never looked up.
    """

    def __init__(self, name: str, vocab_size: int, padded_size: int, hidden_size: int, tp: Axis, init: rng.Init):
        super().__init__()
        self.tp = tp
        self.weight = rng.new_parameter(Layout.vocabulary_cut(f"{name}.weight", vocab_size, padded_size, hidden_size, tp), init)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tp.rank * self.weight.shape[0]
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return comm.reduce_from(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp)
