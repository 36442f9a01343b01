"""The norm, the clip, AdamW and SGD over flat buckets, against torch on ordinary parameters."""

import pytest
import torch
from torch import nn

from trivium.config import OptimizerConfig
from trivium.gradients import use
from trivium.layout import Layout, ReductionGroup
from trivium.mesh import Axis
from trivium.ops import Ops
from trivium.optim.buckets import Bucket, Reduction, make_buckets
from trivium.optim.optimizer import Optimizer
from trivium.optim.reduce import clip_factor, squared_norm
from trivium.rng import Init, new_parameter
from trivium.role import Role

ONE = Axis("tp")
CPU = torch.device("cpu")
SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 33)}


def parameters() -> list[nn.Parameter]:
    found = []
    for name, shape in SHAPES.items():
        matrix = len(shape) == 2
        layout = Layout.whole(name, shape, ONE, role=Role.MATRIX if matrix else Role.BIAS)
        found.append(new_parameter(layout, Init(1, 0.5 if matrix else None, fill=0.2)))
    return found


def backward(params: list[nn.Parameter], seed: int) -> None:
    """Gradients of some size, through autograd, as a model would leave them."""
    generator = torch.Generator().manual_seed(seed)
    sum(
        (use(p).float() * torch.randn(p.shape, generator=generator)).sum() for p in params
    ).backward()


def optimizer_of(params, dtype=torch.float32, size: int = 40, **config) -> Optimizer:
    """Two buckets: the 42 parameters of a, then b alone."""
    buckets = make_buckets(params, dtype, CPU, {ReductionGroup.DENSE: Reduction()}, size)
    return Optimizer(
        buckets, OptimizerConfig(lr=0.1, weight_decay=0.3, adam_eps=1e-6, **config), Ops(), CPU
    )


def norm_of(optimizer: Optimizer) -> torch.Tensor:
    return squared_norm(optimizer.buckets, CPU, Ops()).sqrt()


PEERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}


@pytest.mark.parametrize("kind", PEERS)
def test_flat_update_equals_torch_with_clip_and_decay_of_matrices_alone(kind):
    """Five updates with two micro-batches each; fp32 arithmetic in another order, 1e-6 of the
    largest weight.
    """
    ours, theirs = parameters(), [nn.Parameter(p.detach().clone()) for p in parameters()]
    optimizer = optimizer_of(ours, optimizer=kind)
    assert [len(bucket.parameters) for bucket in optimizer.buckets] == [2, 1]
    groups = [
        {"params": [p for p in theirs if p.dim() == dims], "weight_decay": decay, "lr": 0.1}
        for dims, decay in ((2, 0.3), (1, 0.0))
    ]
    peer = PEERS[kind](groups)
    for i in range(5):
        optimizer.begin(2)
        peer.zero_grad()
        for micro_batch in range(2):
            backward(ours, 10 * i + micro_batch)
            backward(theirs, 10 * i + micro_batch)
        optimizer.reduce()
        norm = norm_of(optimizer)
        assert norm.item() == pytest.approx(
            torch.nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-6
        )
        for group in peer.param_groups:
            group["lr"] = 0.1 / (i + 1)
        peer.step()
        optimizer.update(0.1 / (i + 1), clip_factor(norm, 1.0).float(), torch.tensor(False))
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def of(bucket: Bucket, flat: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The slot of a flat tensor that belongs to `parameter`."""
    ((start, stop),) = [
        slot for p, slot in zip(bucket.parameters, bucket.slots, strict=True) if p is parameter
    ]
    return flat[start:stop].view(parameter.shape)


def state_of(optimizer: Optimizer, params: list[nn.Parameter]) -> list[torch.Tensor]:
    """Masters, moments and working weights."""
    return [
        *(piece.tensor for piece in (*optimizer.weight_pieces(), *optimizer.moment_pieces())),
        *params,
    ]


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_changes_no_bit_even_with_nan_gradients(dtype, kind):
    params = parameters()
    optimizer = optimizer_of(params, dtype, optimizer=kind)
    optimizer.begin(1)
    backward(params, 0)
    optimizer.reduce()
    optimizer.update(0.1, torch.tensor(1.0), torch.tensor(False))
    before = [tensor.clone() for tensor in state_of(optimizer, params)]
    for bucket in optimizer.buckets:
        bucket.gradients.fill_(torch.nan)
    optimizer.update(0.1, torch.tensor(torch.inf), torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(optimizer, params), strict=True))
    assert optimizer.steps.item() == 1


def test_bf16_accumulates_gradients_in_fp32_and_rounds_weights_from_masters():
    """256 micro-batches of a gradient of 1 + 2^-8 cannot be summed in bf16, which stops at 256."""
    (p,) = [new_parameter(Layout.whole("w", (4, 4), ONE), Init(1, 1.0))]
    optimizer = optimizer_of([p], torch.bfloat16)
    optimizer.begin(300)
    for _ in range(300):
        (use(p) * torch.ones(4, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.reduce()
    (bucket,) = optimizer.buckets
    assert torch.equal(of(bucket, bucket.gradients, p), torch.full((4, 4), 300.0))
    optimizer.update(1e-4, torch.tensor(1.0), torch.tensor(False))
    assert (
        torch.equal(p.data, of(bucket, bucket.masters, p).bfloat16()) and p.dtype == torch.bfloat16
    )


def test_norm_counts_primary_parts_alone():
    replicated = new_parameter(Layout.whole("w", (4, 4), Axis("tp", 2, 1, (0, 1))), Init(1, 1.0))
    cut = new_parameter(Layout.rows_cut({"x": 8}, (4,), Axis("tp", 2, 1, (0, 1))), Init(1, 1.0))
    optimizer = optimizer_of([replicated, cut])
    optimizer.begin(1)
    backward([replicated, cut], 3)
    (bucket,) = optimizer.buckets
    assert norm_of(optimizer).item() == pytest.approx(
        of(bucket, bucket.gradients, cut).norm().item(), rel=1e-6
    )


def test_a_rank_without_parameters_has_a_norm_of_zero():
    """A pipeline stage may hold none that counts there."""
    assert (
        squared_norm([], CPU, Ops()).item() == 0
        and squared_norm([], CPU, Ops()).dtype == torch.float64
    )


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        ("adamw", ["exp_avg", "exp_avg_sq"]),
        ("adam", ["exp_avg", "exp_avg_sq"]),
        ("sgd", ["momentum"]),
    ],
)
def test_moments_have_names_of_their_own(kind, moments):
    names = sorted(
        piece.name for piece in optimizer_of(parameters(), optimizer=kind).moment_pieces()
    )
    assert names == sorted(f"optim.{moment}.{name}" for moment in moments for name in SHAPES)


def test_clip_factor():
    assert clip_factor(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25, rel=1e-5)
    assert clip_factor(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_factor(torch.tensor(4.0), 0.0).item() == 1.0
