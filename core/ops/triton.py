"""The Triton kernels as ops. Contracts: reference.py.

Under torch.compile an op is the PyTorch one, which the compiler fuses with its neighbours where a
kernel of our own would be a wall.
"""

import torch
from torch import Tensor

from . import reference

try:
    from ..kernels import adamw as _adamw
    from ..kernels import rms_norm as _rms_norm
except ImportError:  # Triton has no wheel for every platform
    AVAILABLE = False
else:
    AVAILABLE = True


def interpreted() -> bool:
    """Return whether the kernels run on the CPU, in Triton's interpreter."""
    return AVAILABLE and _rms_norm.INTERPRETED


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute reference.rms_norm in one kernel."""
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps)
    return _rms_norm.rms_norm(x, weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + branch and the rms_norm of it."""
    total = x + branch
    return total, rms_norm(total, weight, eps)


def adamw_(
    masters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Tensor,
    weights: Tensor,
    terms: reference.AdamWTerms,
) -> None:
    """Compute reference.adamw_ in one launch."""
    reference.check_flat(masters, exp_avg, exp_avg_sq, grads, weights)
    _adamw.adamw_(masters, exp_avg, exp_avg_sq, grads, weights, terms)
