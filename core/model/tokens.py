"""Hold the facts about tokens that a forward pass needs beside the hidden states."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ..rng import DropoutStream
from .rotary import Angles


class Past(Protocol):
    """The tokens before those of a forward pass, as a decoder holds them.

    The model knows nothing of caches. Where a TokenContext has a Past, every block first offers it
    the whole step, and every attention hands it queries, keys and values instead of mixing them.
    `layer` is the number of the layer in the whole model.
    """

    def step(self, layer: int, x: Tensor, angles: Angles | None) -> Tensor | None:
        """Return the block's output for x [B, T, H]; None where the block is to compute it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take in k and v [B, T, K, D]; return what q [B, T, A, D] sees of all tokens so far."""


@dataclass(frozen=True)
class TokenContext:
    """The tokens of one forward pass, the same in every pipeline stage. Letters: model/shape.py.

    Fields:
        positions: place of each token of this rank in its sequence, int64 [T/cp], or [B, T/cp]
            where positions start anew in each document
        documents: index of each token's document, int [B, T] of the whole sequence, where
            attention stays inside a document; None where it does not
        stream: masks of hidden dropout; None in evaluation
        length: tokens of the whole sequence, T; the number of `positions` if not given
        past: the tokens before these, in generation; None in training
    """

    positions: Tensor
    documents: Tensor | None = None
    stream: DropoutStream | None = None
    length: int | None = None
    past: Past | None = None


class Targets(NamedTuple):
    """The labels that the last stage is to predict, and their weights.

    Fields:
        labels: int64 [B, T/cp]
        weights: fp32 [B, T/cp]; a label of weight 0 adds nothing, whatever its logits
    """

    labels: Tensor
    weights: Tensor
