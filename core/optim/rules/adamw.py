"""Adam with decoupled weight decay: Loshchilov and Hutter 2019, as torch.optim.AdamW."""

import torch

from ...config import OptimizerConfig
from ...ops import AdamWTerms, Ops
from . import FlatMemory, Step

WHOLE_MATRICES = False


def update(memory: FlatMemory, step: Step, config: OptimizerConfig, ops: Ops) -> None:
    """Update flat memory in one fused pass.

    exp_avg = beta1 exp_avg + (1 - beta1) g
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
    w = (1 - lr decay) w - lr exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
    """
    terms = terms_at(
        step.count,
        lr=step.lr,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        eps=config.adam_eps,
        weight_decay=memory.weight_decay,
        grad_scale=step.grad_scale,
        skip=step.skip,
    )
    exp_avg = memory.state["exp_avg"]
    exp_avg_sq = memory.state["exp_avg_sq"]
    ops.adamw_(memory.masters, exp_avg, exp_avg_sq, memory.gradients, memory.weights, terms)


def terms_at(
    step: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
) -> AdamWTerms:
    """Compute what update number `step`, 0-d and counted from 1, needs beside its buffers."""
    # In fp64, as torch.optim computes them on the host: 1 - 0.999**t in fp32 has lost three
    # digits at t = 1.
    t = step.to(torch.float64)
    return AdamWTerms(
        step_size=(lr / (1 - beta1**t)).float(),
        root_correction=(1 - beta2**t).sqrt().float(),
        grad_scale=grad_scale.float(),
        skip=skip.bool(),
        lr_decay=1 - lr * weight_decay,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )
