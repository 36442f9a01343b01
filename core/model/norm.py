"""The norms: of hidden states, of each head, and of a projection whose heads are cut over tp."""

import torch
from torch import nn

from .. import comm
from ..gradients import use
from ..ops import Ops
from ..parallel.sharding import Sharding
from .shape import NormShape
from .weights import new_bias, new_parameter


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the shape has a bias, over the last dim of x [..., H].

    Weight and bias are whole on every rank of tensor parallel.
    """

    def __init__(self, shape: NormShape, sharding: Sharding, ops: Ops, seed: int | None):
        super().__init__()
        self.ops = ops
        self.epsilon = shape.epsilon
        self.from_one = shape.from_one
        self.weight = new_parameter(shape.weight, sharding, seed)
        self.bias = new_bias(shape.bias, sharding, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = use(self.weight)
        bias = None if self.bias is None else use(self.bias)
        if not self.from_one:
            return self._normalized(x, weight, bias)
        # In fp32 to the end: 1 + w has lost the last digits of w in 16 bits.
        wide = torch.promote_types(x.dtype, torch.float32)
        return self._normalized(x.to(wide), 1 + weight.to(wide), bias).to(x.dtype)

    def add(self, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + branch and its norm, in one pass where the ops have one."""
        if self.from_one:
            total = x + branch
            return total, self(total)
        weight = use(self.weight)
        if self.bias is None:
            return self.ops.add_rms_norm(x, branch, weight, self.epsilon)
        return self.ops.add_layer_norm(x, branch, weight, use(self.bias), self.epsilon)

    def _normalized(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if bias is None:
            return self.ops.rms_norm(x, weight, self.epsilon)
        return self.ops.layer_norm(x, weight, bias, self.epsilon)


class NoNorm(nn.Module):
    """The identity, where a layer has no norm at this place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def add(self, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + branch twice: as the sum and as its norm."""
        total = x + branch
        return total, total


class ProjectionNorm(nn.Module):
    """RMSNorm over all heads of a projection at once, x [B, T, A/tp, D] of the heads on this rank.

    The mean square is a sum over tp; the weight is cut as the projection is. `numel` is A D, and
    `copies` the ranks that hold the same heads. OLMo et al. 2024, section 3.3.
    """

    def __init__(self, shape: NormShape, sharding: Sharding, seed: int | None):
        super().__init__()
        self.tp = sharding.tp
        self.epsilon = shape.epsilon
        self.numel = shape.weight.numel
        shares_heads = shape.weight.parts[0].shared_heads is not None
        self.copies = sharding.kv.size if shares_heads else 1
        self.weight = new_parameter(shape.weight, sharding, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        # Each rank's output depends on the sum, so the gradient of the sum is summed as well.
        squares = comm.copy_to(comm.reduce_from(squares, self.tp), self.tp)
        # Heads that several ranks hold are in the sum once for each of them.
        mean = squares / (self.numel * self.copies)
        weight = use(self.weight).view(x.shape[-2:]).to(x.dtype)
        return weight * (wide * torch.rsqrt(mean + self.epsilon)).to(x.dtype)


def norm_at(
    shape: NormShape | None, sharding: Sharding, ops: Ops, seed: int | None
) -> Norm | NoNorm:
    """Make the norm of hidden states that the shape describes, or the identity."""
    return NoNorm() if shape is None else Norm(shape, sharding, ops, seed)
