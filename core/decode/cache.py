"""Keys and values of the tokens so far, and how blocks go on from them.

A forward pass of the model over new tokens is the same in training and in generation. Here its
TokenContext carries a KVCache, the model's idea of a Past:

    block    one more token of each sequence goes through the whole block in one native call,
             where there is one
    attend   else the block runs op by op, and its attention appends keys and values to the cache
             and mixes its queries with all of them
"""

from collections.abc import Sequence

import torch

from ..model.block import Block
from ..model.rotary import Angles
from ..model.tokens import TokenContext
from ..parallel.context import causal
from .native import native_step


class KVCache:
    """Keys and values of every layer, with room for `capacity` tokens, filled from the left.

    `blocks` are all layers of a model that is not cut over ranks. keys, values: for each layer
    [B, capacity, K, D]. length: tokens held so far. steps: each block's native call, or None.
    """

    def __init__(self, blocks: Sequence[Block], batch: int, capacity: int):
        self.blocks, self.length = blocks, 0
        self.steps = [native_step(block, batch) for block in blocks]
        self.keys = [_room(block, batch, capacity) for block in blocks]
        self.values = [_room(block, batch, capacity) for block in blocks]
        self._in_one_call = False

    def context(self, count: int, device: torch.device) -> TokenContext:
        """Return the context of the next `count` tokens; call `advance` when they have passed."""
        end = self.length + count
        # The native call keeps nothing for a backward pass.
        self._in_one_call = count == 1 and not torch.is_grad_enabled()
        positions = torch.arange(self.length, end, device=device)
        return TokenContext(positions, length=end, past=self)

    def advance(self, count: int) -> None:
        """Take note that `count` tokens have passed all layers."""
        self.length += count

    def step(self, layer: int, x: torch.Tensor, angles: Angles | None) -> torch.Tensor | None:
        """Return the block's output for one more token x [B, 1, H]; None for op by op."""
        step = self.steps[layer]
        if step is None or not self._in_one_call:
            return None
        cos, sin = (None, None) if angles is None else angles
        return step(x, cos, sin, self.keys[layer], self.values[layer], self.length)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append k and v [B, T, K, D]; return attention of q [B, T, A, D] to all tokens so far."""
        end = self.length + k.shape[1]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        attention = self.blocks[layer].attention
        return causal(q, keys[:, :end], values[:, :end], attention.ops, attention.rule)


def _room(block: Block, batch: int, capacity: int) -> torch.Tensor:
    weight, shape = block.attention.qkv.weight, block.shape.attention
    size = (batch, capacity, shape.kv_heads, shape.head_size)
    return torch.empty(size, dtype=weight.dtype, device=weight.device)
