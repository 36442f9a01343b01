"""Flat buckets, the norm, the clip and AdamW, against torch on ordinary parameters."""

import pytest
import torch
from torch import nn

from trivium.config import OptimizerConfig
from trivium.layout import Layout
from trivium.mesh import Axis
from trivium.ops import Ops
from trivium.optim.optimizer import Optimizer
from trivium.optim.buckets import Bucket, make_buckets
from trivium.optim.clip import clip_factor, grad_norm
from trivium.rng import Init, new_parameter

ONE = Axis("tp")
CPU = torch.device("cpu")
SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 33)}


def parameters() -> list[nn.Parameter]:
    return [new_parameter(Layout.whole(name, shape, ONE), Init(1, 0.5 if len(shape) == 2 else None, fill=0.2)) for name, shape in SHAPES.items()]


def backward(params: list[nn.Parameter], seed: int) -> None:
    """Gradients of some size, through autograd, as a model would leave them."""
    generator = torch.Generator().manual_seed(seed)
    sum((p.float() * torch.randn(p.shape, generator=generator)).sum() for p in params).backward()


def optimizer_of(params, dtype=torch.float32) -> AdamW:
    return AdamW(make_buckets(params, dtype, CPU), OptimizerConfig(lr=0.1, weight_decay=0.3, adam_eps=1e-6), Ops())


def test_flat_update_equals_torch_with_clip_and_decay_of_matrices_alone():
    """Five updates with two micro-batches each; fp32 arithmetic in another order, 1e-6 of the largest weight."""
    ours, theirs = parameters(), [nn.Parameter(p.detach().clone()) for p in parameters()]
    optimizer = optimizer_of(ours)
    groups = [{"params": [p for p in theirs if p.dim() == dims], "weight_decay": decay} for dims, decay in ((2, 0.3), (1, 0.0))]
    peer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6)
    for i in range(5):
        optimizer.zero_gradients()
        peer.zero_grad()
        for micro_batch in range(2):
            backward(ours, 10 * i + micro_batch)
            backward(theirs, 10 * i + micro_batch)
        norm = grad_norm(optimizer.buckets, ONE)
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-6)
        for group in peer.param_groups:
            group["lr"] = 0.1 / (i + 1)
        peer.step()
        optimizer.update(0.1 / (i + 1), clip_factor(norm, 1.0), torch.tensor(False))
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def of(bucket: Bucket, flat: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The slot of a flat tensor that belongs to `parameter`."""
    ((start, stop),) = [(start, stop) for p, start, stop in bucket.slots if p is parameter]
    return flat[start:stop].view(parameter.shape)


def state_of(optimizer: AdamW, params: list[nn.Parameter]) -> list[torch.Tensor]:
    """Masters, moments and working weights."""
    return [*(piece.tensor for piece in (*optimizer.weight_pieces(), *optimizer.moment_pieces())), *params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_changes_no_bit_even_with_nan_gradients(dtype):
    params = parameters()
    optimizer = optimizer_of(params, dtype)
    backward(params, 0)
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
    for _ in range(300):
        (p * torch.ones(4, 4, dtype=torch.bfloat16)).sum().backward()
    (bucket,) = optimizer.buckets
    assert torch.equal(of(bucket, bucket.gradients, p), torch.full((4, 4), 300.0))
    optimizer.update(1e-4, torch.tensor(1.0), torch.tensor(False))
    assert torch.equal(p.data, of(bucket, bucket.masters, p).bfloat16()) and p.dtype == torch.bfloat16


def test_norm_counts_primary_parts_alone():
    replicated = new_parameter(Layout.whole("w", (4, 4), Axis("tp", 2, 1, (0, 1))), Init(1, 1.0))
    cut = new_parameter(Layout.rows_cut({"x": 8}, (4,), Axis("tp", 2, 1, (0, 1))), Init(1, 1.0))
    optimizer = optimizer_of([replicated, cut])
    backward([replicated, cut], 3)
    (bucket,) = optimizer.buckets
    assert torch.equal(grad_norm(optimizer.buckets, ONE), of(bucket, bucket.gradients, cut).norm())


def test_clip_factor():
    assert clip_factor(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25, rel=1e-5)
    assert clip_factor(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_factor(torch.tensor(4.0), 0.0).item() == 1.0
