"""The Triton kernels as ops. Contracts: reference.py.

Under torch.compile an op is the PyTorch one, which the compiler fuses with its neighbours where a
kernel of our own would be a wall.
"""

import torch

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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute reference.rms_norm in one kernel."""
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps)
    return _rms_norm.rms_norm(x, weight.to(x.dtype), eps)


def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + branch and the rms_norm of it."""
    total = x + branch
    return total, rms_norm(total, weight, eps)


def adamw_(
    masters: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grads: torch.Tensor,
    weights: torch.Tensor,
    terms: reference.AdamWTerms,
) -> None:
    """Compute reference.adamw_ in one launch."""
    reference.check_flat(masters, exp_avg, exp_avg_sq, grads, weights)
    _adamw.adamw_(masters, exp_avg, exp_avg_sq, grads, weights, terms)
