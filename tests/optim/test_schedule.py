"""Learning rates against Megatron's formulas, written out by hand."""

import math

import pytest

from trivium.config import OptimizerConfig
from trivium.optim.schedule import learning_rate


def rates(style: str, **more) -> OptimizerConfig:
    return OptimizerConfig(
        lr=1.0,
        min_lr=0.1,
        lr_decay_iters=110,
        lr_decay_style=style,
        **({"lr_warmup_iters": 10} | more),
    )


def test_warmup_starts_at_its_initial_value_and_is_linear():
    optimizer = rates("cosine", lr_warmup_init=0.2)
    assert learning_rate(optimizer, 0) == 0.2
    assert learning_rate(optimizer, 5) == pytest.approx(0.6)
    assert learning_rate(optimizer, 10) == 1.0


@pytest.mark.parametrize(
    ("style", "i", "expected"),
    [
        ("constant", 500, 1.0),
        ("linear", 60, 0.1 + 0.9 * 0.5),
        ("linear", 110, 0.1),
        ("cosine", 35, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25))),
        ("inverse-square-root", 40, math.sqrt(10 / 40)),
        ("linear", 111, 0.1),
        ("cosine", 10_000, 0.1),
        ("inverse-square-root", 111, 0.1),
    ],
)
def test_decay_styles(style, i, expected):
    assert learning_rate(rates(style), i) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "share"),
    [
        ("linear", 0.75),
        ("cosine", 0.5 * (1 + math.cos(math.pi / 4))),
        ("exponential", 2 * 0.5**0.25 - 1),
        ("minus_sqrt", 0.5),
    ],
)
def test_wsd_is_flat_and_then_decays(style, share):
    optimizer = rates("WSD", lr_wsd_decay_iters=20, lr_wsd_decay_style=style)
    assert learning_rate(optimizer, 11) == learning_rate(optimizer, 90) == 1.0
    assert learning_rate(optimizer, 95) == pytest.approx(0.1 + 0.9 * share)
    assert learning_rate(optimizer, 110) == pytest.approx(0.1)


def test_warmup_can_be_a_fraction():
    optimizer = rates("constant", lr_warmup_iters=0, lr_warmup_fraction=0.1)
    assert learning_rate(optimizer, 0) == 0
    assert learning_rate(optimizer, 11) == pytest.approx(1.0)
    assert learning_rate(optimizer, 5) == pytest.approx(5 / 11)


def test_no_warmup_starts_at_the_top():
    assert learning_rate(rates("linear", lr_warmup_iters=0), 0) == 1.0
