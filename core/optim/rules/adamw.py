"""Adam with decoupled weight decay: Loshchilov and Hutter 2019, as torch.optim.AdamW."""

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
    terms = AdamWTerms.at(
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
