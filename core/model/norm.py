"""The norms: of hidden states, of each head, and of a projection whose heads are cut over tp.

Letters: model/shape.py.
"""

import torch
from torch import Tensor, nn

from .. import comm
from ..gradients import use
from ..ops import Ops
from ..parallel.sharding import Sharding
from .shape import NormShape
from .weights import new_bias, new_parameter


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the shape has a bias, over the last dim of x [..., H].

    RMSNorm: x / sqrt(mean(x^2) + epsilon) * w (Zhang and Sennrich 2019).
    LayerNorm: (x - mean(x)) / sqrt(var(x) + epsilon) * w + b (Ba et al. 2016).

    Weight and bias are whole on every rank of tensor parallel.
    """

    def __init__(
        self,
        shape: NormShape,
        sharding: Sharding,
        ops: Ops,
        seed: int | None,
    ):
        super().__init__()
        self.ops = ops
        self.epsilon = shape.epsilon
        self.from_one = shape.from_one
        self.weight = new_parameter(shape.weight, sharding, seed)
        self.bias = new_bias(shape.bias, sharding, seed)

    def forward(self, x: Tensor) -> Tensor:
        weight = use(self.weight)
        bias = None if self.bias is None else use(self.bias)
        if not self.from_one:
            return self._normalized(x, weight, bias)
        # In fp32 to the end: 1 + w has lost the last digits of w in 16 bits.
        wide = torch.promote_types(x.dtype, torch.float32)
        around_one = 1 + weight.to(wide)
        normalized = self._normalized(x.to(wide), around_one, bias)
        return normalized.to(x.dtype)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + branch and the norm of that sum.

        The ops may do both in one pass over memory.
        """
        if self.from_one:
            # No op for this: the weight is put together first.
            total = x + branch
            return total, self(total)
        weight = use(self.weight)
        if self.bias is None:
            return self.ops.add_rms_norm(x, branch, weight, self.epsilon)
        bias = use(self.bias)
        return self.ops.add_layer_norm(x, branch, weight, bias, self.epsilon)

    def _normalized(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Normalize by the op that the kind of norm has."""
        if bias is None:
            return self.ops.rms_norm(x, weight, self.epsilon)
        return self.ops.layer_norm(x, weight, bias, self.epsilon)


class NoNorm(nn.Module):
    """The identity, where a layer has no norm at this place."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + branch twice: as the sum and as its norm."""
        total = x + branch
        return total, total


class ProjectionNorm(nn.Module):
    """RMSNorm over all heads of a projection at once, x [B, T, A/tp, D] of the heads on this rank.

    The mean square is a sum over tp; the weight is cut as the projection is.
    OLMo et al. 2024, section 3.3.

    Fields:
        numel: A D, over all ranks
        copies: number of ranks that hold the same heads
    """

    def __init__(self, shape: NormShape, sharding: Sharding, seed: int | None):
        super().__init__()
        self.tp = sharding.tp
        self.epsilon = shape.epsilon
        self.numel = shape.weight.numel
        self.copies = 1
        if shape.weight.parts[0].shared_heads is not None:
            self.copies = sharding.kv.size
        self.weight = new_parameter(shape.weight, sharding, seed)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        squares = wide.square().sum((-2, -1), keepdim=True)
        total = comm.reduce_from(squares, self.tp)
        # Each rank's output depends on the total, so the gradient of the total is summed as well.
        total = comm.copy_to(total, self.tp)
        # Heads that several ranks hold are in the total once for each of them.
        mean = total / (self.numel * self.copies)
        normalized = wide * torch.rsqrt(mean + self.epsilon)
        heads = x.shape[-2:]
        weight = use(self.weight).view(heads).to(x.dtype)
        return weight * normalized.to(x.dtype)


def norm_at(
    shape: NormShape | None,
    sharding: Sharding,
    ops: Ops,
    seed: int | None,
) -> Norm | NoNorm:
    """Make the norm of hidden states that the shape describes, or the identity."""
    if shape is None:
        return NoNorm()
    return Norm(shape, sharding, ops, seed)
