"""Activations computed again in backward instead of kept: whole layers, or attention alone. Chen et al. 2016; Korthikanti et al. 2022, section 5."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ..config import ParallelConfig

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Recompute:
    """What is computed again; `Recompute()` keeps everything. granularity: full or selective. method: uniform or block."""

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1

    @staticmethod
    def of(parallel: ParallelConfig) -> "Recompute":
        return Recompute(
            parallel.recompute_granularity, parallel.recompute_method, parallel.recompute_num_layers
        )

    def attention(
        self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor
    ) -> torch.Tensor:
        """function(*tensors); its inputs alone are kept where attention is to be computed again."""
        return _again(function, *tensors) if self.granularity == "selective" else function(*tensors)

    def layers(self, layers: Sequence[Layer], x: torch.Tensor) -> torch.Tensor:
        """x through all layers. uniform keeps the input of each group of `num_layers`; block those of the first `num_layers` layers."""
        if self.granularity != "full" or not torch.is_grad_enabled():
            return _through(layers, x)
        if self.method == "uniform":
            for first in range(0, len(layers), self.num_layers):
                x = _again(partial(_through, layers[first : first + self.num_layers]), x)
            return x
        for layer in layers[: self.num_layers]:
            x = _again(layer, x)
        return _through(layers[self.num_layers :], x)


def _through(layers: Sequence[Layer], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _again(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    # Random state is kept for attention dropout alone; hidden dropout is a function of what it is for.
    return checkpoint(function, *tensors, use_reentrant=False)
