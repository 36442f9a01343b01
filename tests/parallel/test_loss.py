"""The head and its loss in chunks against the plain sum of cross-entropies, in float64.

Losses, and the gradients of the input and the weight.
"""

from unittest import mock

import pytest
import torch

from trivium.config.sizes import LOGITS_AT_A_TIME
from trivium.gradients import Deferral, Sink, attach_sink
from trivium.mesh import Axis, Mesh
from trivium.ops import Ops, cpu
from trivium.parallel import loss
from trivium.parallel.sharding import Sharding
from trivium.testing import run_ranks

TOKENS, H, V, PADDED = 13, 24, 45, 48
KERNELS = pytest.mark.parametrize(
    "kernels",
    [
        "torch",
        pytest.param(
            "native",
            marks=pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler"),
        ),
    ],
)


def problem(dtype=torch.float32):
    """Loud logits, so that some labels are nearly certain.

    Two tokens that do not count, one of them NaN.
    """
    generator = torch.Generator().manual_seed(5)
    x, weight = (
        torch.randn(1, TOKENS, H, generator=generator),
        torch.randn(PADDED, H, generator=generator),
    )
    weight[V:] = 0
    labels, weights = (
        torch.randint(0, V, (1, TOKENS), generator=generator),
        torch.rand(1, TOKENS, generator=generator),
    )
    labels[0, :4] = (x[0, :4] @ weight[:V].t()).argmax(-1)
    weights[0, 3] = weights[0, 9] = 0.0
    return x.to(dtype), weight.to(dtype), labels, weights


def exactly(x, weight, labels, weights, softcap):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = (x @ weight[:V].t())[0]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, labels[0], reduction="none")
    total = (losses * weights[0].double()).sum()
    return (total.detach(), losses.detach(), *torch.autograd.grad(total, (x, weight)))


def assert_near(found, expected, unit):
    """Norm-wise.

    Sums over 45 columns, 24 features and 13 tokens, of terms rounded a few times each.
    """
    for actual, exact in zip(found, expected, strict=True):
        assert (actual.double() - exact).norm() <= 32 * unit * exact.norm()


class Memory:
    """An owner of one weight, as a bucket is."""

    def __init__(self, weight):
        self.gradient, self.written, self.deferral = torch.ones(weight.shape), 0, Deferral()
        attach_sink(weight, Sink(self, 0))

    def wait_for_weights(self):
        pass

    def gradient_of(self, slot):
        return self.gradient

    def wrote(self):
        self.written += 1


@pytest.fixture(
    params=[1 << 24, 3 * PADDED, 1], ids=["one chunk", "chunks of three tokens", "token by token"]
)
def at_a_time(request, monkeypatch):
    monkeypatch.setitem(LOGITS_AT_A_TIME, "cpu", request.param)


@KERNELS
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_are_the_whole(kernels, softcap, at_a_time):
    x, weight, labels, weights = problem()
    parameter = torch.nn.Parameter(weight)
    x.requires_grad_()
    total, losses = loss.head_loss(
        x, parameter, labels, weights, V, Sharding(), Ops(kernels), softcap
    )
    (2 * total).backward()  # without a sink any scale may follow
    expected = exactly(x.detach(), weight, labels, weights, softcap)
    assert_near((total, losses[0], x.grad / 2, parameter.grad / 2), expected, 2**-24)
    assert not losses.requires_grad and (parameter.grad[V:] == 0).all()


@KERNELS
def test_the_weight_gradient_is_added_to_its_sink_once_in_fp32(kernels, at_a_time):
    x, weight, labels, weights = problem()
    parameter = torch.nn.Parameter(weight)
    memory = Memory(parameter)
    total, _ = loss.head_loss(
        x.requires_grad_(), parameter, labels, weights, V, Sharding(), Ops(kernels)
    )
    total.backward()
    expected = exactly(x.detach(), weight, labels, weights, None)
    assert memory.written == 1 and parameter.grad is None
    assert_near((memory.gradient - 1, x.grad), (expected[3], expected[2]), 2**-22)


def test_a_loss_that_is_scaled_after_its_gradient_went_to_the_sink_is_an_error():
    x, weight, labels, weights = problem()
    parameter = torch.nn.Parameter(weight)
    Memory(parameter)
    total, _ = loss.head_loss(x.requires_grad_(), parameter, labels, weights, V, Sharding(), Ops())
    with pytest.raises(RuntimeError):
        (2 * total).backward()


@KERNELS
def test_nothing_is_learnt_from_a_token_that_does_not_count(kernels):
    x, weight, labels, weights = problem()
    x[0, 3] = float("nan")
    parameter = torch.nn.Parameter(weight)
    total, losses = loss.head_loss(
        x.requires_grad_(), parameter, labels, weights, V, Sharding(), Ops(kernels)
    )
    total.backward()
    assert total.isfinite() and losses[0, 3].isnan()
    assert (x.grad[0, 3] == 0).all() and x.grad.isfinite().all()


@KERNELS
@pytest.mark.parametrize("widens", [False, True], ids=["bf16 products", "fp32 products"])
def test_bf16_rounds_the_logits_gradient_once(kernels, widens, at_a_time):
    """Logits and their gradient in 8 bits, or, where products are widened, only dx and the gradient
    of the weight.
    """
    x, weight, labels, weights = problem(torch.bfloat16)
    parameter = torch.nn.Parameter(weight)
    total, losses = loss.head_loss(
        x.requires_grad_(),
        parameter,
        labels,
        weights,
        V,
        Sharding(),
        Ops(kernels, fp32_matmul=widens),
    )
    total.backward()
    assert (x.grad.dtype, parameter.grad.dtype, losses.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    expected = exactly(x.detach(), weight, labels, weights, None)
    unit = 2**-24 if widens else 2**-9
    assert_near((total, losses[0]), expected[:2], unit)
    assert_near((x.grad, parameter.grad), expected[2:], 2**-9 / 16 if widens else 2**-9)


def on_rank(mesh: Mesh, at_a_time: int, kernels: str, sequence_parallel: bool):
    # The process serves other tests too, so the number is put back.
    with mock.patch.dict(LOGITS_AT_A_TIME, cpu=at_a_time):
        return of_this_rank(mesh, kernels, sequence_parallel)


def of_this_rank(mesh: Mesh, kernels: str, sequence_parallel: bool):
    x, weight, labels, weights = (t[:, :12] if t.shape[1] == TOKENS else t for t in problem())
    rows, tp = PADDED // mesh.tp.size, mesh.tp
    parameter = torch.nn.Parameter(weight[tp.rank * rows : (tp.rank + 1) * rows].clone())
    x = x.tensor_split(tp.size, dim=1)[tp.rank].clone() if sequence_parallel else x.clone()
    total, losses = loss.head_loss(
        x.requires_grad_(),
        parameter,
        labels,
        weights,
        V,
        Sharding(tp=tp, sequence_parallel=sequence_parallel),
        Ops(kernels),
    )
    total.backward()
    return total.detach(), losses[0], x.grad, parameter.grad


@KERNELS
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("at_a_time", [1 << 24, 5 * PADDED], ids=["one chunk", "chunks"])
def test_a_vocabulary_cut_over_ranks_is_the_whole(kernels, ranks, sequence_parallel, at_a_time):
    """Of 4 ranks the last holds 9 columns of the vocabulary and 3 of padding."""
    x, weight, labels, weights = (t[:, :12] if t.shape[1] == TOKENS else t for t in problem())
    expected = exactly(x, weight, labels, weights, None)
    found = run_ranks(ranks, on_rank, at_a_time, kernels, sequence_parallel, tp=ranks)
    dx = torch.cat([rank[2] for rank in found], dim=1) if sequence_parallel else found[0][2]
    assert_near((*found[0][:2], dx, torch.cat([rank[3] for rank in found])), expected, 2**-24)
    assert all(torch.equal(rank[1], found[0][1]) for rank in found)
    assert sequence_parallel or all(torch.equal(rank[2], dx) for rank in found)


def test_without_gradients_only_the_losses_are_computed():
    x, weight, labels, weights = problem()
    with torch.no_grad():
        total, losses = loss.head_loss(
            x, torch.nn.Parameter(weight), labels, weights, V, Sharding(tp=Axis("tp")), Ops()
        )
    expected = exactly(x, weight, labels, weights, None)
    assert_near((total, losses[0]), expected[:2], 2**-24)
    assert not total.requires_grad
