"""The norms: of hidden states, of each head, and of a projection whose heads are cut over the tensor axis."""

from functools import partial

import torch
from torch import nn

from .. import comm, rng
from ..config import ModelConfig
from ..gradients import use
from ..layout import Layout, Role, Rows
from ..ops import Ops
from ..parallel.sharding import Sharding


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim [..., H], as --normalization says; whole on every rank of the tensor axis.

    Of its gradient each rank of tp sees a share where `cut_input` says that x is cut over tp (by tokens or by heads).
    """

    def __init__(
        self,
        name: str,
        size: int,
        config: ModelConfig,
        sharding: Sharding,
        ops: Ops,
        seed: int | None,
        *,
        cut_input: bool,
    ):
        super().__init__()
        self.ops, self.epsilon, self.from_one = ops, config.norm_epsilon, config.apply_layernorm_1p
        layout = partial(Layout.whole, shape=(size,), tp=sharding.tp, partial=cut_input)
        init = rng.Init(seed, fill=0.0 if self.from_one else 1.0)
        self.weight = rng.new_parameter(layout(f"{name}.weight", role=Role.NORM), init)
        self.bias = None
        if config.normalization == "LayerNorm":
            bias = layout(f"{name}.bias", role=Role.BIAS)
            self.bias = rng.new_parameter(bias, rng.Init(seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = use(self.weight), None if self.bias is None else use(self.bias)
        if not self.from_one:
            return self._normalized(x, weight, bias)
        # In fp32 to the end: 1 + w has lost the last digits of w in 16 bits.
        wide = torch.promote_types(x.dtype, torch.float32)
        return self._normalized(x.to(wide), 1 + weight.to(wide), bias).to(x.dtype)

    def add(self, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x + branch, and its norm, in one pass where it can be."""
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
    """Where a layer has no norm at this place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def add(self, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + branch
        return total, total


class ProjectionNorm(nn.Module):
    """RMSNorm over all heads of a projection at once, x [B, T, A, D] of the heads on this rank: its mean square is a sum over tp.

    rows: A D in all, and which ranks hold the same ones. The weight is cut as the projection is. OLMo et al. 2024, section 3.3.
    """

    def __init__(
        self, name: str, rows: Rows, config: ModelConfig, sharding: Sharding, seed: int | None
    ):
        super().__init__()
        self.rows, self.tp, self.epsilon = rows, sharding.tp, config.norm_epsilon
        layout = Layout.rows_cut({f"{name}.weight": rows}, (), sharding.tp, role=Role.NORM)
        self.weight = rng.new_parameter(layout, rng.Init(seed, fill=1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Each rank's output depends on the sum, so its gradient is summed as well. Heads that several ranks hold count once.
        squares = comm.copy_to(
            comm.reduce_from(wide.square().sum((-2, -1), keepdim=True), self.tp), self.tp
        )
        mean = squares / (self.rows.count * self.rows.copies.size)
        weight = use(self.weight).view(x.shape[-2:]).to(x.dtype)
        return weight * (wide * torch.rsqrt(mean + self.epsilon)).to(x.dtype)
