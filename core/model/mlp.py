"""The feed-forward layer: two projections around an activation that may be gated.

down(f(up(x))), or down(f(gate(x)) * up(x)) where it is gated. Letters: model/shape.py.
"""

from torch import Tensor, nn

from ..ops import Ops
from ..parallel.sharding import Sharding
from .shape import MLPShape
from .weights import new_column_parallel, new_row_parallel


class MLP(nn.Module):
    """x [B, T, H] -> [B, T, H] through F/tp features on each rank; gate and up are one product."""

    def __init__(self, shape: MLPShape, sharding: Sharding, ops: Ops, seed: int | None):
        super().__init__()
        self.ops = ops
        self.kind = shape.activation
        self.gated = shape.gated
        self.up = new_column_parallel(shape.up, sharding, ops, seed)
        self.down = new_row_parallel(shape.down, sharding, ops, seed)

    def forward(self, x: Tensor) -> Tensor:
        features = self.up(x)
        if self.gated:
            features = self.ops.gated_activation(features, self.kind)
        else:
            features = self.ops.activation(features, self.kind)
        return self.down(features)
