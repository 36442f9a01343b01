"""The global gradient norm, each element counted once in any layout, and the factor that clips it."""

from collections.abc import Sequence

import torch

from ..ops import Ops
from .buckets import Shard


def squared_norm(buckets: Sequence[Shard], device: torch.device, ops: Ops) -> torch.Tensor:
    """This rank's share of the squared 2-norm of all gradients, 0-d fp64 on the device; over all ranks the shares add up to the whole.

    Of tensors that several ranks hold only the primary part counts, and of the copies of a shard only the first.
    """
    views = [
        b.gradients[start:stop]
        for b in buckets
        if b.reduction.copies.rank == 0
        for part, start, stop in b.parts()
        if part.primary
    ]
    if not views:
        return torch.zeros(
            (), dtype=torch.float64, device=device
        )  # a pipeline rank may hold no parameter
    return ops.squared_norm(views)


def clip_factor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What the gradients are multiplied with so that their norm is at most `limit`; 0 does not clip. 0-d, on the device."""
    if limit == 0:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)
