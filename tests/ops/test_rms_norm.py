"""RMSNorm on each implementation against float64.

Odd sizes, every dtype, zeros, huge values, and past 2^31 elements.
"""

import pytest
import torch

from trivium.ops import Ops, cpu, triton

# The rounding unit of a dtype. Triton's interpreter cuts fp32 off to bf16 where devices round to
# nearest: twice the unit there.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPS = 1e-5


NATIVE = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")
TRITON = pytest.mark.skipif(
    not (triton.interpreted() or (triton.AVAILABLE and torch.cuda.is_available())),
    reason="neither a GPU nor TRITON_INTERPRET=1",
)
MARKS = {"torch": (), "native": NATIVE, "triton": TRITON}
NORMS = pytest.mark.parametrize(
    "norm", [pytest.param(norm, marks=marks) for norm, marks in MARKS.items()]
)
NORMS_AND_DTYPES = pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        pytest.param(norm, dtype, marks=marks, id=f"{norm} {dtype}".replace("torch.", ""))
        for norm, marks in MARKS.items()
        for dtype in UNIT
        if norm != "native" or dtype in cpu.DTYPES
    ],
)


def home(norm):
    """Where the tensors of this implementation live."""
    return "cuda" if norm == "triton" and not triton.interpreted() else "cpu"


def plain(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def assert_close(actual, expected, scale, roundings, dtype):
    """Every element within `roundings` roundings of `scale`, the size of the largest term that goes
    into it, or one step of the subnormals.
    """
    bound = (
        roundings * UNIT[dtype] * scale
        + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    excess = (actual.double().cpu() - expected).abs() - bound
    assert torch.isfinite(actual).all()
    assert excess.max() <= 0, f"beyond the bound by {excess.max():.3e}"


def check(norm, x, weight, dy, dtype):
    """Forward and backward against float64 of the very same inputs.

    y: x_hat and y round once each in dtype, and rstd in fp32: 4 with the interpreter's doubling.
    dx: its one rounding, that of the terms in fp32, and (reference) of dy * weight in dtype.
    dweight: a sum over the rows of terms that are each rounded up to twice.
    """
    device = home(norm)
    x, weight, dy = (t.to(dtype) for t in (x, weight, dy))
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = plain(wide_x, wide_weight)
    wanted_dx, wanted_dw = torch.autograd.grad(expected, (wide_x, wide_weight), dy.double())

    x, weight, dy = x.to(device).requires_grad_(), weight.to(device).requires_grad_(), dy.to(device)
    y = Ops(norm).rms_norm(x, weight, EPS)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, dtype)
    assert (y.shape, dx.shape, dw.shape) == (x.shape, x.shape, weight.shape)

    rstd = (wide_x.detach().square().mean(-1, keepdim=True) + EPS).rsqrt()
    g, x_hat = (dy.double().cpu() * wide_weight.detach()).abs(), (wide_x.detach() * rstd).abs()
    assert_close(y, expected.detach(), expected.detach().abs(), 5, dtype)
    assert_close(dx, wanted_dx, rstd * (g + x_hat * (g * x_hat).mean(-1, keepdim=True)), 5, dtype)
    terms = (dy.double().cpu().abs() * x_hat).flatten(0, -2).sum(0)
    assert_close(dw, wanted_dw, terms, 5, dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@NORMS_AND_DTYPES
@pytest.mark.parametrize(
    "shape",
    [(5, 1), (3, 7), (2, 3, 15), (4, 16), (33, 17), (7, 384), (3, 1000), (2, 20001)],
    ids=str,
)
def test_matches_float64(norm, dtype, shape):
    check(norm, torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape), dtype)


@NORMS
def test_many_rows_and_several_threads_match_float64(norm):
    check(norm, torch.randn(2100, 100), torch.randn(100), torch.randn(2100, 100), torch.float32)


@NORMS_AND_DTYPES
def test_rows_of_zeros_give_zeros(norm, dtype):
    device = home(norm)
    x = torch.randn(4, 33, dtype=dtype, device=device)
    x[1:3] = 0
    x.requires_grad_()
    y = Ops(norm).rms_norm(x, torch.ones(33, dtype=dtype, device=device), EPS)
    y.sum().backward()
    assert (y[1:3] == 0).all()
    assert torch.isfinite(x.grad).all()


@NORMS_AND_DTYPES
def test_large_values_do_not_overflow(norm, dtype):
    """Squares of 3e4 overflow fp16; in fp32 they and their sums have room."""
    size = 3e4 if dtype == torch.float16 else 1e10
    check(norm, torch.randn(3, 65).clamp(-2, 2) * size, torch.randn(65), torch.randn(3, 65), dtype)


@pytest.mark.filterwarnings("ignore:invalid value")
@NORMS
def test_nan_and_infinity_stay_in_their_row(norm):
    device = home(norm)
    x = torch.randn(3, 40, dtype=torch.bfloat16, device=device)
    x[0, 3], x[1, 39] = float("nan"), float("inf")
    y = Ops(norm).rms_norm(x, torch.ones(40, dtype=torch.bfloat16, device=device), EPS)
    assert y[0].isnan().all()
    assert y[1, 39].isnan()
    assert y[2].isfinite().all()


@NORMS
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(norm, shape):
    device = home(norm)
    x, weight = (
        torch.randn(shape, device=device, requires_grad=True),
        torch.ones(8, device=device, requires_grad=True),
    )
    y = Ops(norm).rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == x.shape
    assert (weight.grad == 0).all()


@NORMS
def test_any_strides(norm):
    device = home(norm)
    x = torch.randn(6, 5, 16, device=device).transpose(0, 1)
    weight = torch.randn(32, device=device)[::2]
    expected = plain(x.double(), weight.double()).cpu()
    assert_close(Ops(norm).rms_norm(x, weight, EPS), expected, expected.abs(), 4, torch.float32)


@NORMS
def test_an_fp32_weight_is_cast_to_the_activations(norm):
    device = home(norm)
    x, weight = (
        torch.randn(3, 16, dtype=torch.bfloat16, device=device),
        torch.randn(16, device=device, requires_grad=True),
    )
    y = Ops(norm).rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


@NORMS
def test_follows_hugging_face_llama(norm):
    """The rounded x_hat times the weight, in bf16.

    Equal but for one rounding where rstd differs in its last bit, two in the interpreter.
    """
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    device = home(norm)
    theirs = llama.LlamaRMSNorm(64, EPS).to(torch.bfloat16)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    expected = theirs(x).detach().double()
    assert_close(
        Ops(norm).rms_norm(x.to(device), theirs.weight.detach().to(device), EPS),
        expected,
        expected.abs(),
        4,
        torch.bfloat16,
    )


@NORMS
def test_the_weight_gradient_is_the_same_every_time(norm):
    device = home(norm)
    x, weight = (
        torch.randn(300, 48, device=device),
        torch.randn(48, device=device, requires_grad=True),
    )
    first, second = (
        torch.autograd.grad(Ops(norm).rms_norm(x, weight, EPS).square().sum(), weight)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


@NORMS
def test_compiled_code_needs_no_graph_break_but_for_native_kernels(norm):
    compiled = torch.compile(
        lambda x, w: Ops(norm).rms_norm(x, w, EPS), backend="eager", fullgraph=norm != "native"
    )
    x, weight = torch.randn(3, 16, device=home(norm)), torch.randn(16, device=home(norm))
    expected = plain(x.double(), weight.double()).cpu()
    assert_close(compiled(x, weight), expected, expected.abs(), 4, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1 << 10, 1 << 15], ids=["whole rows", "in blocks"])
def test_triton_past_2_to_the_31_elements(columns):
    """The last rows lie past 2^31 elements, where an int32 offset has wrapped around."""
    rows = 2**31 // columns + 16
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-8:] = torch.randn(8, columns, device="cuda")
    x.requires_grad_()
    weight = torch.randn(columns, dtype=torch.bfloat16, device="cuda")
    y = Ops("triton").rms_norm(x, weight, EPS)
    y[-8:].sum().backward()
    tail = x.detach()[-8:].clone().requires_grad_()
    expected = Ops().rms_norm(tail, weight, EPS)
    expected.sum().backward()
    assert (y[-8:].float() - expected.float()).abs().max() <= 4 * UNIT[
        torch.bfloat16
    ] * expected.abs().max()
    assert (x.grad[-8:].float() - tail.grad.float()).abs().max() <= 8 * UNIT[
        torch.bfloat16
    ] * tail.grad.abs().max()
    assert (y[:8] == 0).all()
