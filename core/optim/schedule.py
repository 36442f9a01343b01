"""The learning rate as a pure function of progress: a linear warm-up, then one of the shapes.

To add a shape: a function here with its line in SHAPES, and its name in config/fields.py.

Letters of the formulas: i updates so far, w warm-up iterations, n --lr-decay-iters, and
r = (i - w) / (n - w), the share of the decay that is done.
"""

import math
from collections.abc import Callable

from ..config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, i: int) -> float:
    """Return the rate of the update that follows `i` earlier ones (iteration - 1).

    Megatron's rules. Up to w: init + (lr - init) i / w, where init is --lr-warmup-init. After it
    the shape of --lr-decay-style; past n, min_lr, unless the shape has no end.
    """
    warmup = warmup_iterations(optimizer)
    if warmup and i <= warmup:
        first = optimizer.lr_warmup_init
        return first + (optimizer.lr - first) * i / warmup
    if i > optimizer.lr_decay_iters and optimizer.lr_decay_style not in ENDLESS:
        return optimizer.min_lr
    return SHAPES[optimizer.lr_decay_style](optimizer, i)


def warmup_iterations(optimizer: OptimizerConfig) -> float:
    """Return the length of the warm-up; a fraction of the decay iterations need not be whole."""
    if optimizer.lr_warmup_fraction is not None:
        return optimizer.lr_warmup_fraction * optimizer.lr_decay_iters
    return optimizer.lr_warmup_iters


# Shares of (lr - min_lr) that are left when a share r of a decay is done.


def linear_share(r: float) -> float:
    """Return 1 - r."""
    return 1.0 - r


def cosine_share(r: float) -> float:
    """Return (cos(pi r) + 1) / 2."""
    return 0.5 * (math.cos(math.pi * r) + 1.0)


def exponential_share(r: float) -> float:
    """Return 2 * 0.5^r - 1."""
    return 2.0 * 0.5**r - 1.0


def minus_sqrt_share(r: float) -> float:
    """Return 1 - sqrt(r)."""
    return 1.0 - math.sqrt(r)


# The last phase of WSD, by --lr-wsd-decay-style.
WSD_SHARES: dict[str, Callable[[float], float]] = {
    "linear": linear_share,
    "cosine": cosine_share,
    "exponential": exponential_share,
    "minus_sqrt": minus_sqrt_share,
}


# Shapes: the rate after the warm-up.


def constant(optimizer: OptimizerConfig, i: int) -> float:
    """Return lr."""
    return optimizer.lr


def linear(optimizer: OptimizerConfig, i: int) -> float:
    """Return min_lr + (1 - r) (lr - min_lr)."""
    return _between(optimizer, linear_share(_decayed(optimizer, i)))


def cosine(optimizer: OptimizerConfig, i: int) -> float:
    """Return min_lr + (cos(pi r) + 1) / 2 (lr - min_lr)."""
    return _between(optimizer, cosine_share(_decayed(optimizer, i)))


def inverse_square_root(optimizer: OptimizerConfig, i: int) -> float:
    """Return max(min_lr, lr sqrt(w) / sqrt(i)), with w and i at least 1."""
    warmup = max(warmup_iterations(optimizer), 1)
    rate = optimizer.lr * math.sqrt(warmup) / math.sqrt(max(i, 1))
    return max(optimizer.min_lr, rate)


def warmup_stable_decay(optimizer: OptimizerConfig, i: int) -> float:
    """Return lr until the last --lr-wsd-decay-iters, which decay to min_lr.

    Hu et al. 2024, section 4.
    """
    length = optimizer.lr_wsd_decay_iters
    assert length is not None, "validation asks for --lr-wsd-decay-iters"
    start = optimizer.lr_decay_iters - length
    if i <= start:
        return _between(optimizer, 1.0)
    share = WSD_SHARES[optimizer.lr_wsd_decay_style]
    return _between(optimizer, share((i - start) / length))


# By --lr-decay-style.
SHAPES: dict[str, Callable[[OptimizerConfig, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse-square-root": inverse_square_root,
    "WSD": warmup_stable_decay,
}
ENDLESS = {"constant"}


def _decayed(optimizer: OptimizerConfig, i: int) -> float:
    """Return r, the share of the decay that is done."""
    warmup = warmup_iterations(optimizer)
    return (i - warmup) / (optimizer.lr_decay_iters - warmup)


def _between(optimizer: OptimizerConfig, share: float) -> float:
    """Return min_lr + share (lr - min_lr)."""
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)
