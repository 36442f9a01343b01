"""The two norms, whole on every rank of the tensor axis."""

import torch
from torch import nn

from .. import rng
from ..config import ModelConfig
from ..gradients import use
from ..layout import Layout
from ..ops import Ops
from ..parallel.sharding import Sharding


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim [..., H], as --normalization says.

    Of its gradient each rank of tp sees a share where `cut_input` says that x is cut over tp (by tokens or by heads).
    """

    def __init__(self, name: str, size: int, config: ModelConfig, sharding: Sharding, ops: Ops, seed: int | None, *, cut_input: bool):
        super().__init__()
        self.ops, self.epsilon = ops, config.norm_epsilon
        weight, bias = (Layout.whole(f"{name}.{kind}", (size,), sharding.tp, partial=cut_input) for kind in ("weight", "bias"))
        self.weight = rng.new_parameter(weight, rng.Init(seed, fill=1.0))
        self.bias = rng.new_parameter(bias, rng.Init(seed)) if config.normalization == "LayerNorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return self.ops.rms_norm(x, use(self.weight), self.epsilon)
        return self.ops.layer_norm(x, use(self.weight), use(self.bias), self.epsilon)
