"""The roles that a parameter can play in the model. No torch, so that plans can use them."""

from enum import StrEnum


class Role(StrEnum):
    """The role of a tensor: optimizers and estimates choose by it, never by shape."""

    EMBEDDING = "embedding"
    """A table that is looked up by token or position; also when a tied head multiplies by it."""

    HEAD = "head"
    """The matrix from hidden states to logits, where it has weights of its own."""

    MATRIX = "matrix"
    """A matrix of a linear layer inside a block."""

    BIAS = "bias"
    """A vector that is added: to the output of a linear layer, or inside a LayerNorm."""

    NORM = "norm"
    """The vector of factors of a norm."""
