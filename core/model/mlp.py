"""The feed-forward layer: gated SiLU or GELU, GELU or squared ReLU."""

import torch
from torch import nn

from .. import rng
from ..config import ModelConfig
from ..ops import Ops
from ..parallel.linear import ColumnParallelLinear, RowParallelLinear
from ..parallel.sharding import Sharding


class MLP(nn.Module):
    """x [B, T, H] -> [B, T, H] through F/tp hidden features on each rank; gate and up are one GEMM."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        sharding: Sharding,
        ops: Ops,
        seed: int | None,
        residual_std: float,
    ):
        super().__init__()
        self.config, self.ops = config, ops
        width, init, bias = (
            config.ffn_hidden_size,
            rng.Init(seed, config.init_method_std),
            config.linear_bias,
        )
        rows = (
            {f"{name}.gate": width, f"{name}.up": width} if config.gated else {f"{name}.up": width}
        )
        self.up = ColumnParallelLinear(
            config.hidden_size, rows, sharding, ops, bias=bias, init=init
        )
        self.down = RowParallelLinear(
            f"{name}.down",
            width,
            config.hidden_size,
            sharding,
            ops,
            bias=bias,
            init=rng.Init(seed, residual_std),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activation = self.ops.gated_activation if self.config.gated else self.ops.activation
        return self.down(activation(self.up(x), self.config.activation))
