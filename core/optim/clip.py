"""The global gradient norm, each element counted once in any layout, and the factor that clips it."""

import torch

from .. import comm
from ..mesh import Axis
from .buckets import Bucket


def grad_norm(buckets: list[Bucket], model: Axis) -> torch.Tensor:
    """2-norm of the gradients of the whole model, 0-d fp32 on the device.

    Only primary parts count, so that a tensor replicated over `model` (tensor x pipeline ranks) counts once; the gradients
    must already be summed over data parallel.
    """
    norms = [torch.linalg.vector_norm(piece.tensor) for b in buckets for piece in b.pieces(b.gradients) if piece.primary]
    square = torch.stack(norms).square().sum()
    return comm.all_reduce(square, model).sqrt()


def clip_factor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What the gradients are multiplied with so that their norm is at most `limit`; 0 does not clip. 0-d, on the device."""
    if limit == 0:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)
