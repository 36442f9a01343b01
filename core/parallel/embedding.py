"""The token embedding, its vocabulary cut over an axis; a tied head has the same weight."""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import comm
from ..gradients import use
from .sharding import Sharding


class VocabParallelEmbedding(nn.Module):
    """A table [V, H], of which each rank of tp holds [V/tp, H] and looks up the ids in its rows.

    tokens: int64 [B, T].
    y: [B, T, H] on every rank, or [B, T/tp, H] with sequence parallel.

    Rows past the vocabulary are padding, zero and never looked up.
    """

    def __init__(self, weight: nn.Parameter, sharding: Sharding):
        super().__init__()
        self.weight = weight
        self.sharding = sharding

    def forward(self, tokens: Tensor) -> Tensor:
        weight = use(self.weight)
        tp = self.sharding.tp
        if tp.size == 1:
            return F.embedding(tokens, weight)
        local = tokens - tp.rank * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        found = F.embedding(local.masked_fill(elsewhere, 0), weight)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sharding.sequence_parallel:
            return comm.reduce_tokens(found, tp)
        return comm.reduce_from(found, tp)
