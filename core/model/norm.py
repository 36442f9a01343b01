"""The two norms, whole on every rank of the tensor axis."""

import torch
from torch import nn

from .. import rng
from ..config import ModelConfig
from ..layout import Layout
from ..mesh import Axis
from ..ops import Ops


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim [..., H], as --normalization says."""

    def __init__(self, name: str, size: int, config: ModelConfig, tp: Axis, ops: Ops, seed: int | None):
        super().__init__()
        self.ops, self.epsilon = ops, config.norm_epsilon
        self.weight = rng.new_parameter(Layout.whole(f"{name}.weight", (size,), tp), rng.Init(seed, fill=1.0))
        centred = config.normalization == "LayerNorm"
        self.bias = rng.new_parameter(Layout.whole(f"{name}.bias", (size,), tp), rng.Init(seed)) if centred else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return self.ops.rms_norm(x, self.weight, self.epsilon)
        return self.ops.layer_norm(x, self.weight, self.bias, self.epsilon)
