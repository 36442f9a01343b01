"""Activations computed again in backward instead of kept: whole layers, or attention alone.

Chen et al. 2016; Korthikanti et al. 2022, section 5. A step that keeps everything never comes here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import ParallelConfig

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recompute:
    """The choice of activations to compute again; `Recompute()` keeps everything.

    Fields:
        granularity: full (layers), selective (attention) or None
        method: uniform or block, of full
        num_layers: layers of a group (uniform), or recomputed layers of a stage (block)
    """

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1

    @staticmethod
    def of(parallel: ParallelConfig) -> "Recompute":
        """Return what the flags ask for."""
        return Recompute(
            parallel.recompute_granularity, parallel.recompute_method, parallel.recompute_num_layers
        )

    @property
    def full(self) -> bool:
        """Return whether whole layers are computed again."""
        return self.granularity == "full"

    @property
    def selective(self) -> bool:
        """Return whether attention alone is computed again."""
        return self.granularity == "selective"

    def layers(self, layers: Sequence[Layer], x: Tensor) -> Tensor:
        """Pass x through all layers, of which it keeps fewer activations.

        uniform keeps the input of each group of `num_layers`; block keeps the inputs of the first
        `num_layers` layers, and everything of the others.
        """
        if self.method == "uniform":
            for first in range(0, len(layers), self.num_layers):
                x = again(partial(_through, layers[first : first + self.num_layers]), x)
            return x
        for layer in layers[: self.num_layers]:
            x = again(layer, x)
        return _through(layers[self.num_layers :], x)


def again(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Compute function(*tensors), keep its inputs alone, and compute it again in backward."""
    # Random state is kept for attention dropout alone; hidden dropout is a function of its place.
    return checkpoint(function, *tensors, use_reentrant=False)


def _through(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x
