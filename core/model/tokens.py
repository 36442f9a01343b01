"""What a forward pass knows of its tokens beside the hidden states."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..rng import DropoutStream


@dataclass(frozen=True)
class TokenContext:
    """The tokens of one forward pass, the same in every pipeline stage. Letters: see model/shape.py.

    Fields:
        positions: place of each token of this rank in its sequence, int64 [T/cp], or [B, T/cp]
            where positions start anew in each document
        documents: index of each token's document, int [B, T] of the whole sequence, where
            attention stays inside a document; None where it does not
        stream: masks of hidden dropout; None in evaluation
        length: tokens of the whole sequence, T; the number of `positions` if not given
    """

    positions: torch.Tensor
    documents: torch.Tensor | None = None
    stream: DropoutStream | None = None
    length: int | None = None

    @property
    def whole_length(self) -> int:
        """Return T, on all ranks together."""
        return self.positions.shape[-1] if self.length is None else self.length


class Targets(NamedTuple):
    """What a stage that predicts is to predict.

    Fields:
        labels: int64 [B, T/cp]
        weights: fp32 [B, T/cp]; a label of weight 0 adds nothing, whatever its logits
    """

    labels: torch.Tensor
    weights: torch.Tensor
