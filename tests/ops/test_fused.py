"""The fused ops of the CPU against float64, forward and backward, on ordinary and on hostile
numbers, in every instruction set.
"""

import os
import subprocess
import sys

import pytest
import torch

from trivium.ops import Ops, cpu

UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
NATIVE = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")
KERNELS = pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=NATIVE)])
DTYPES = pytest.mark.parametrize("dtype", list(UNIT), ids=["fp32", "bf16"])
# One element, fewer than a vector, a whole number of vectors, one more, odd and long.
SIZES = [1, 7, 16, 33, 100, 1023]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def within(actual, expected, bound):
    """Every element within its own bound."""
    excess = (actual.double() - expected).abs() - bound
    assert not excess.isnan().any() and excess.max() <= 0, f"beyond the bound by {excess.max():.3e}"


def hostile(size, dtype):
    """Zeros of both signs, subnormals, numbers so small that their squares vanish, and so large
    that an exponential overflows.
    """
    special = torch.tensor(
        [
            0.0,
            -0.0,
            1e-40,
            -1e-40,
            1e-30,
            -1e-30,
            20.0,
            -20.0,
            88.0,
            -88.0,
            104.0,
            -104.0,
            1e4,
            -1e4,
        ]
    )
    return torch.cat([torch.randn(size), special, torch.linspace(-12, 12, 101)]).to(dtype)


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "gelu_erf": lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
    "squared_relu": lambda x: x.clamp(min=0).square(),
}


# The fits of exp and of the normal distribution are good to 2e-7 of 1, that is 4 roundings of fp32,
# of a value or slope that is at most |x| + 1; the result is rounded once more in the dtype,
# PyTorch's own steps in between as well.
def bound_of(x, dy, dtype, roundings=4):
    return (8 * UNIT[torch.float32] + roundings * UNIT[dtype]) * (x.abs() + 1) * dy.abs() + 1e-38


@KERNELS
@DTYPES
@pytest.mark.parametrize("kind", ["gelu_tanh", "gelu_erf", "squared_relu"])
def test_activations_match_float64(kernels, dtype, kind):
    x = hostile(1023, dtype).requires_grad_()
    if kind == "squared_relu":
        x = x.detach().clamp(-100, 100).requires_grad_()
    dy, wide = torch.randn(x.shape).to(dtype), x.detach().double().requires_grad_()
    y, expected = Ops(kernels).activation(x, kind), ACTIVATIONS[kind](wide)
    (dx,), (wanted,) = (
        torch.autograd.grad(y, x, dy),
        torch.autograd.grad(expected, wide, dy.double()),
    )
    scale = 100 if kind == "squared_relu" else 1
    within(y, expected.detach(), scale * bound_of(wide.detach(), torch.ones(()), dtype))
    within(dx, torch.nan_to_num(wanted), scale * bound_of(wide.detach(), dy.double(), dtype))


@KERNELS
@DTYPES
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu_erf"])
def test_gated_activations_match_float64(kernels, dtype, columns, kind):
    gate = hostile(3 * columns, dtype)[: 3 * columns].view(3, columns)
    x = torch.cat([gate, torch.randn(3, columns).to(dtype)], dim=1).requires_grad_()
    dy, wide = torch.randn(3, columns).to(dtype), x.detach().double().requires_grad_()
    y = Ops(kernels).gated_activation(x, kind)
    expected = ACTIVATIONS[kind](wide[:, :columns]) * wide[:, columns:]
    (dx,), (wanted,) = (
        torch.autograd.grad(y, x, dy),
        torch.autograd.grad(expected, wide, dy.double()),
    )
    g, u, d = wide.detach()[:, :columns], wide.detach()[:, columns:], dy.double()
    within(y, expected.detach(), bound_of(g, u, dtype))
    within(dx[:, :columns], wanted[:, :columns], bound_of(g, d * u, dtype, 8))
    within(dx[:, columns:], wanted[:, columns:], bound_of(g, d, dtype))


def normed(x, weight, bias, centred):
    x = x - x.mean(-1, keepdim=True) if centred else x
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    return y if bias is None else y + bias


# Roundings of one element: x + branch, x_hat, y once each in the dtype, and in fp32 the sums over
# the row, which stay within sqrt(columns) single ones. In backward each of three terms of the size
# of rstd * |g| (and x_hat of at most sqrt(columns)).
@KERNELS
@DTYPES
@pytest.mark.parametrize("columns", [*SIZES, 4097])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shift", [0.0, 100.0], ids=["", "far from zero"])
def test_norms_and_norms_of_a_sum_match_float64(kernels, dtype, columns, centred, shift):
    if kernels == "torch" and centred and shift:
        pytest.skip("PyTorch's own layer norm loses more of a spread far from zero")
    ops, shape = Ops(kernels), (2, 3, columns)
    x = (torch.randn(shape) + shift).to(dtype).requires_grad_()
    branch = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(columns).to(dtype).requires_grad_()
    bias = torch.randn(columns).to(dtype).requires_grad_()
    tensors = (x, branch, weight, bias) if centred else (x, branch, weight)
    if centred:
        total, y = ops.add_layer_norm(x, branch, weight, bias, 1e-5)
    else:
        total, y = ops.add_rms_norm(x, branch, weight, 1e-5)
    assert torch.equal(total, x + branch)
    dtotal, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    found = torch.autograd.grad((total, y), tensors, (dtotal, dy))
    s = total.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    b = bias.detach().double().requires_grad_()
    expected = normed(s, w, b if centred else None, centred)
    ds, dw, *db = torch.autograd.grad(expected, (s, w, b)[: 2 + centred], dy.double())
    ds = ds + dtotal.double()
    # A mean of 100 under a spread of 1 costs seven bits of what is left: errors of the mean, of
    # fp32, over the spread.
    lost = 4 * (columns**0.5 + 2) * UNIT[torch.float32] * (1 + shift)
    centre = s.detach() - (s.detach().mean(-1, keepdim=True) if centred else 0)
    rstd = (centre.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    x_hat, g = (centre * rstd).abs(), (dy.double() * w.detach()).abs()
    terms = x_hat * w.detach().abs() + b.detach().abs() * centred + w.detach().abs()
    within(y, expected.detach(), (3 * UNIT[dtype] + lost * rstd) * terms + 1e-30)
    projection = (1 + x_hat) * (g * (1 + x_hat)).mean(-1, keepdim=True)
    size = rstd * (g + g.mean(-1, keepdim=True) + projection)
    terms = size + dtotal.double().abs()
    for dx in found[:2]:
        within(dx, ds, (6 * UNIT[dtype] + 4 * lost * rstd.clamp(min=1)) * terms + 1e-30)
    rows = (dy.double().abs() * (x_hat + 1)).flatten(0, 1).sum(0)
    within(found[2], dw, (6 * UNIT[dtype] + 4 * lost * rstd.max().clamp(min=1)) * rows + 1e-30)
    if centred:
        within(found[3], db[0], 6 * UNIT[dtype] * dy.double().abs().flatten(0, 1).sum(0))
        alone = ops.layer_norm(total.detach(), weight, bias, 1e-5)
    else:
        alone = ops.rms_norm(total.detach(), weight, 1e-5)
    assert torch.equal(alone, y)


def rotated(x, cos, sin, interleaved):
    """As complex numbers: each pair of dims times e^(i angle)."""
    r = 2 * cos.shape[-1]
    pairs = (
        x[..., :r].unflatten(-1, (-1, 2))
        if interleaved
        else torch.stack(x[..., :r].chunk(2, -1), -1)
    )
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin).unsqueeze(-2)
    )
    return torch.cat(
        [turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1), x[..., r:]], -1
    )


@KERNELS
@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("size", "half"), [(8, 4), (64, 32), (64, 16), (80, 10), (6, 3), (128, 33)]
)
@pytest.mark.parametrize("positions", ["shared", "of each sample"])
def test_heads_are_split_and_rotated(kernels, dtype, interleaved, size, half, positions):
    """Two products and a sum of elements no larger than the pair.

    4 roundings of its length, more where the angles are rounded first.
    """
    a, k, shape = 3, 2, (2, 5)
    table = torch.randn(*(shape if positions == "of each sample" else shape[1:]), half)
    cos, sin = table.cos(), table.sin()
    heads = torch.randn(*shape, a + 2 * k, size).to(dtype).requires_grad_()
    wide = heads.detach().double().requires_grad_()
    q, key, v = Ops(kernels).split_heads(heads * 1, (a, k, k), cos, sin, interleaved)
    wide_q, wide_k, wide_v = wide.split((a, k, k), dim=2)
    expected = [
        rotated(wide_q, cos.double(), sin.double(), interleaved),
        rotated(wide_k, cos.double(), sin.double(), interleaved),
        wide_v,
    ]
    # Gradients as attention gives them: [B, A, T, D] in memory.
    seeds = [torch.randn(2, t.shape[2], 5, size).to(dtype).transpose(1, 2) for t in (q, key, v)]
    (found,) = torch.autograd.grad((q, key, v), heads, seeds)
    (wanted,) = torch.autograd.grad(expected, wide, [s.double() for s in seeds])
    limit = 6 * UNIT[dtype] * 2**0.5
    for actual, exact in zip((q, key, v), expected, strict=True):
        within(actual, exact.detach(), limit * wide.detach().abs().max())
    within(found, wanted, limit * max(s.abs().max() for s in seeds).double())
    assert torch.equal(v, heads[:, :, a + k :])
    alone = Ops(kernels).rope(heads.detach()[:, :, :a], cos, sin, interleaved)
    assert torch.equal(alone, q)


def cross_entropy(kernels, logits, labels, weights, real):
    """Losses and the gradient of sum(weights * losses), the way parallel/loss puts the two kernels
    together for one rank.
    """
    ops, gradient = Ops(kernels), logits.clone()
    column = torch.where(labels < real, labels, -1)
    highest, rest, target = ops.cross_entropy_statistics(gradient, column, real)
    label = torch.exp(target - highest)
    scale = torch.where(weights != 0, weights / (rest + label), 0.0)
    ops.cross_entropy_gradient_(gradient, column, highest, scale, -rest * scale, real)
    return torch.where(
        label > 0.1, torch.log1p(rest / label), torch.log(rest + label) + highest - target
    ), gradient


def exact_cross_entropy(logits, labels, weights, real):
    wide = logits.double()[:, :real].requires_grad_()
    losses = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (gradient,) = torch.autograd.grad((losses * weights.double()).sum(), wide)
    return losses.detach(), gradient


@KERNELS
@DTYPES
@pytest.mark.parametrize(
    ("columns", "real"),
    [(1, 1), (7, 5), (16, 16), (100, 97), (1030, 1025), (33000, 32768)],
    ids=str,
)
@pytest.mark.parametrize("loudness", [1.0, 30.0, 1e4], ids=["ordinary", "loud", "huge"])
def test_cross_entropy_matches_float64(kernels, dtype, columns, real, loudness):
    """p in fp32 to a few roundings, rounded once in the dtype.

    Labels anywhere, the last column and the first among them.
    """
    logits = (torch.randn(9, columns) * loudness).to(dtype)
    logits[:, real:] = 1e5 if real < columns else 0
    labels, weights = torch.randint(0, real, (9,)), torch.rand(9)
    labels[0], labels[1], weights[2] = 0, real - 1, 0.0
    losses, gradient = cross_entropy(kernels, logits, labels, weights, real)
    expected, wanted = exact_cross_entropy(logits, labels, weights, real)
    within(losses, expected, 32 * UNIT[torch.float32] * (expected.abs() + 1))
    size = torch.softmax(logits[:, :real].double(), -1) * weights.double()[:, None]
    within(
        gradient[:, :real],
        wanted,
        (UNIT[dtype] + 64 * UNIT[torch.float32]) * (wanted.abs() + size) + 1e-37,
    )
    assert (gradient[:, real:] == 0).all() and (gradient[2] == 0).all()


@KERNELS
@DTYPES
@pytest.mark.parametrize("margin", [5.0, 10.0, 20.0, 25.0])
def test_the_gradient_of_a_certain_label_is_exact_to_its_last_digit(kernels, dtype, margin):
    """p = 1 - 4e-9 at the margin of 25: p - 1 from a rounded p would be 0 or a multiple of 6e-8.

    One rounding, and those of the sum.
    """
    logits = torch.zeros(4, 300).to(dtype)
    labels = torch.tensor([0, 17, 255, 299])
    logits[torch.arange(4), labels] = margin
    losses, gradient = cross_entropy(kernels, logits, labels, torch.ones(4), 300)
    expected, wanted = exact_cross_entropy(logits, labels, torch.ones(4), 300)
    within(losses, expected, 64 * UNIT[torch.float32] * expected)
    within(gradient, wanted, (UNIT[dtype] + 64 * UNIT[torch.float32]) * wanted.abs())


@KERNELS
def test_a_row_that_does_not_count_gives_zeros_whatever_it_holds_and_others_keep_their_nan(kernels):
    logits = torch.randn(3, 50)
    logits[0, 3], logits[1, 49] = float("nan"), float("inf")
    losses, gradient = cross_entropy(
        kernels, logits, torch.tensor([1, 2, 3]), torch.tensor([0.0, 1.0, 1.0]), 50
    )
    assert (gradient[0] == 0).all() and gradient[2].isfinite().all()
    assert gradient[1].isnan().any() and losses[1].isnan()
    logits[1, 48:] = float("nan")
    assert cross_entropy(kernels, logits, torch.tensor([1, 2, 3]), torch.ones(3), 50)[
        0
    ].isnan().tolist() == [True, True, False]


@KERNELS
def test_statistics_of_a_slice_without_the_label_or_without_columns(kernels):
    logits, column = torch.randn(4, 20), torch.tensor([-1, 3, -1, 19])
    highest, rest, target = Ops(kernels).cross_entropy_statistics(logits, column, 20)
    terms = torch.exp(logits - logits.amax(1, keepdim=True))
    terms[1, 3] = terms[3, 19] = 0
    assert torch.equal(highest, logits.amax(1)) and (rest - terms.sum(1)).abs().max() < 1e-5
    assert torch.equal(
        target, torch.stack([torch.zeros(()), logits[1, 3], torch.zeros(()), logits[3, 19]])
    )
    highest, rest, target = Ops(kernels).cross_entropy_statistics(logits, torch.full((4,), -1), 0)
    assert (highest == -torch.inf).all() and (rest == 0).all() and (target == 0).all()
    Ops(kernels).cross_entropy_gradient_(
        logits, torch.full((4,), -1), torch.zeros(4), torch.ones(4), torch.zeros(4), 0
    )
    assert (logits == 0).all()


@KERNELS
@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 16, 19, 33], ids="{} rows".format)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (3, 7), (9, 16), (100, 33), (70, 1023)], ids=str
)
def test_products_of_few_rows_match_float64(kernels, dtype, rows, outputs, inputs):
    """fp32 sums of at most 1,023 products, rounded once.

    Past 32 rows it is the library's product.
    """
    x, weight = torch.randn(1, rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    expected, terms = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    y = Ops(kernels).product(x, weight)
    assert y.dtype == dtype and y.shape == (1, rows, outputs)
    within(
        y,
        expected,
        UNIT[dtype] * expected.abs() + inputs**0.5 * UNIT[torch.float32] * terms + 1e-30,
    )


@KERNELS
@pytest.mark.parametrize("sizes", [[1], [15], [16, 100], [2047, 2049, 1], [1_000_003]], ids=str)
def test_the_squared_norm_is_that_of_float64(kernels, sizes):
    """fp32 within 2,048 elements in 16 chains or more, fp64 between: 1e-6.

    PyTorch's stays in fp32 for longer.
    """
    tensors = [torch.randn(size) * 10.0**k for k, size in enumerate(sizes)]
    found = Ops(kernels).squared_norm(tensors)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(
        sum(t.double().square().sum().item() for t in tensors),
        rel=1e-6 if kernels == "native" else 1e-4,
    )


@KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_squared_norm_keeps_what_is_not_finite(kernels, bad):
    for place in (0, 99_999):
        x = torch.randn(100_000)
        x[place] = bad
        assert not torch.isfinite(Ops(kernels).squared_norm([x]))


@NATIVE
def test_the_number_of_threads_changes_no_bit():
    x, dy, weight = torch.randn(3000, 200), torch.randn(3000, 100), torch.randn(200)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaf, ops = x.clone().requires_grad_(), Ops("native")
            w = weight.clone().requires_grad_()
            found = [*torch.autograd.grad(ops.gated_activation(leaf, "silu"), leaf, dy)]
            for y in (ops.layer_norm(leaf, w, None, 1e-5), ops.rms_norm(leaf, w, 1e-5)):
                found += [y.detach(), *torch.autograd.grad(y, (leaf, w), x)]
            results.append(
                [
                    *found,
                    ops.squared_norm([x]),
                    *cross_entropy("native", x, torch.arange(3000) % 200, torch.ones(3000), 200),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@NATIVE
def test_native_refuses_what_it_lacks():
    for call in (
        lambda: Ops("native").rms_norm(torch.zeros(2, 4, dtype=torch.float16), torch.ones(4), 1e-5),
        lambda: Ops("native").activation(torch.zeros(2, 4, dtype=torch.float16), "silu"),
        lambda: Ops("native").add_rms_norm(
            torch.zeros(2, 4), torch.zeros(2, 4).bfloat16(), torch.ones(4), 1e-5
        ),
    ):
        with pytest.raises(TypeError, match="float32 or bfloat16"):
            call()


@NATIVE
@pytest.mark.parametrize("simd", ["plain", "avx2"])
def test_every_instruction_set_passes_these_tests(simd):
    """The narrower ones by themselves, as the widest does in this process."""
    if simd == "avx2" and cpu.simd() == "portable":
        pytest.skip("this processor has no AVX2")
    name = {"plain": "portable", "avx2": "AVX2"}[simd]
    if cpu.simd() == name or "TRIVIUM_SIMD" in os.environ:
        pytest.skip(f"{name} is what this process runs with")
    chosen = ["-k", "native and not instruction and not torch", __file__]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        command,
        env=os.environ | {"TRIVIUM_SIMD": simd},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    seen = subprocess.run(
        [sys.executable, "-c", "from trivium import _native; print(_native.simd())"],
        env=os.environ | {"TRIVIUM_SIMD": simd},
        capture_output=True,
        text=True,
    )
    assert seen.stdout.strip() == name
