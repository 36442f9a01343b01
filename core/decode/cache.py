"""Keys and values of the tokens so far, and how blocks go on from them.

A forward pass of the model over new tokens is the same in training and in generation. Here its
TokenContext carries a KVCache, the model's idea of a Past:

    block    one more token of each sequence goes through the whole block in one native call,
             where there is one
    attend   else the block runs op by op, and its attention appends keys and values to the cache
             and mixes its queries with all of them

Letters: model/shape.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.block import Block
from ..model.rotary import Angles
from ..model.tokens import TokenContext
from ..ops import BlockStep
from ..parallel.context import causal
from .native import native_step


class KVCache:
    """Keys and values of every layer, with room for `capacity` tokens, filled from the left.

    Fields:
        blocks: all layers of a model that is not cut over ranks
        length: tokens held so far
        keys, values: for each layer [B, capacity, K, D]
        steps: for each layer its native call, or None where it has none
    """

    def __init__(self, blocks: Sequence[Block], batch: int, capacity: int):
        self.blocks = blocks
        self.length = 0
        self.steps: list[BlockStep | None] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for block in blocks:
            self.steps.append(native_step(block, batch))
            self.keys.append(_room(block, batch, capacity))
            self.values.append(_room(block, batch, capacity))
        self._in_one_call = False

    def context(self, count: int, device: torch.device) -> TokenContext:
        """Return the context of the next `count` tokens; call `advance` when they have passed."""
        end = self.length + count
        positions = torch.arange(self.length, end, device=device)
        # The native call takes one token of each sequence, and keeps nothing for a backward pass.
        self._in_one_call = count == 1 and not torch.is_grad_enabled()
        return TokenContext(positions, length=end, past=self)

    def advance(self, count: int) -> None:
        """Take note that `count` tokens have passed all layers."""
        self.length += count

    def step(self, layer: int, x: Tensor, angles: Angles | None) -> Tensor | None:
        """Return the block's output for one more token x [B, 1, H]; None for op by op."""
        step = self.steps[layer]
        if step is None or not self._in_one_call:
            return None
        cos = sin = None
        if angles is not None:
            cos, sin = angles
        keys = self.keys[layer]
        values = self.values[layer]
        return step(x, cos, sin, keys, values, self.length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v [B, T, K, D]; return attention of q [B, T, A, D] to all tokens so far."""
        start = self.length
        end = start + k.shape[1]
        keys = self.keys[layer]
        values = self.values[layer]
        keys[:, start:end] = k
        values[:, start:end] = v
        # Views of what is held so far, not copies.
        keys = keys[:, :end]
        values = values[:, :end]
        attention = self.blocks[layer].attention
        return causal(q, keys, values, attention.ops, attention.rule)


def _room(block: Block, batch: int, capacity: int) -> Tensor:
    """Return memory for the keys or the values of a block, [B, capacity, K, D]."""
    weight = block.attention.qkv.weight
    shape = block.shape.attention
    size = (batch, capacity, shape.kv_heads, shape.head_size)
    return torch.empty(size, dtype=weight.dtype, device=weight.device)
