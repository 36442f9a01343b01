"""SGD with momentum and coupled weight decay, as torch.optim.SGD."""

import torch

from ...config import OptimizerConfig
from ...ops import Ops
from . import FlatMemory, Step

WHOLE_MATRICES = False


def update(memory: FlatMemory, step: Step, config: OptimizerConfig, ops: Ops) -> None:
    """Update flat memory.

    momentum = factor momentum + g + decay w
    w = w - lr momentum
    """
    masters, weights = memory.masters, memory.weights
    momentum = memory.state["momentum"]

    gradients = memory.gradients * step.grad_scale
    decay = memory.weight_decay * masters
    moved = config.sgd_momentum * momentum + gradients + decay
    updated = masters - step.lr * moved

    # Selected, never multiplied: a skipped update may have gradients that are not finite.
    torch.where(step.skip, weights, updated.to(weights.dtype), out=weights)
    torch.where(step.skip, momentum, moved, out=momentum)
    if weights.data_ptr() != masters.data_ptr():
        torch.where(step.skip, masters, updated, out=masters)
