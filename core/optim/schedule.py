"""The learning rate as a pure function of progress."""

import math

from ..config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, i: int) -> float:
    """The rate used by the update that follows `i` earlier ones (iteration - 1), by Megatron's rules.

    Linear warm-up from --lr-warmup-init to --lr, then the decay style down to --min-lr at --lr-decay-iters, and --min-lr past it
    (constant stays at --lr). WSD: Hu et al. 2024, section 4.
    """
    highest, lowest, total = optimizer.lr, optimizer.min_lr, optimizer.lr_decay_iters
    warmup = warmup_iterations(optimizer)
    if warmup and i <= warmup:
        return optimizer.lr_warmup_init + (highest - optimizer.lr_warmup_init) * i / warmup
    if optimizer.lr_decay_style == "constant":
        return highest
    if i > total:
        return lowest
    if optimizer.lr_decay_style == "inverse-square-root":
        return max(lowest, highest * math.sqrt(max(warmup, 1)) / math.sqrt(max(i, 1)))
    if optimizer.lr_decay_style == "WSD":
        share = _wsd_share(optimizer, i)
    else:
        share = _DECAY[optimizer.lr_decay_style]((i - warmup) / (total - warmup))
    return lowest + share * (highest - lowest)


def warmup_iterations(optimizer: OptimizerConfig) -> float:
    """Length of the warm-up; a fraction of the decay iterations need not be whole."""
    if optimizer.lr_warmup_fraction is not None:
        return optimizer.lr_warmup_fraction * optimizer.lr_decay_iters
    return optimizer.lr_warmup_iters


def _wsd_share(optimizer: OptimizerConfig, i: int) -> float:
    start = optimizer.lr_decay_iters - optimizer.lr_wsd_decay_iters
    return (
        1.0
        if i <= start
        else _DECAY[optimizer.lr_wsd_decay_style]((i - start) / optimizer.lr_wsd_decay_iters)
    )


# Share of (lr - min_lr) that is left after a share r of the decay.
_DECAY = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}
