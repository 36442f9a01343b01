"""The feed-forward layer: two projections around an activation that may be gated."""

import torch
from torch import nn

from ..ops import Ops
from ..parallel.sharding import Sharding
from .shape import MLPShape
from .weights import column_parallel, row_parallel


class MLP(nn.Module):
    """x [B, T, H] -> [B, T, H] through F/tp features on each rank; gate and up are one product."""

    def __init__(self, shape: MLPShape, sharding: Sharding, ops: Ops, seed: int | None):
        super().__init__()
        self.ops = ops
        self.kind = shape.activation
        self.gated = shape.gated
        self.up = column_parallel(shape.up, sharding, ops, seed)
        self.down = row_parallel(shape.down, sharding, ops, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activation = self.ops.gated_activation if self.gated else self.ops.activation
        return self.down(activation(self.up(x), self.kind))
