"""Every op against float64, forward and backward; AdamW against torch's own.

The choice of kernels.
"""

import logging
import math
import re

import pytest
import torch

from trivium.config.sizes import ELEMENTS_IN_CACHE
from trivium.ops import OPS, Ops, cpu, select_ops, triton
from trivium.optim.rules.adamw import terms_at

# Rounding unit of each dtype: half the distance from 1 to the next number.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
CPU = torch.device("cpu")
NATIVE = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")
KERNELS = [
    "torch",
    pytest.param("native", marks=NATIVE),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not triton.interpreted(),
            reason="needs TRITON_INTERPRET=1",
        ),
    ),
]


def exact(*tensors):
    """The same values in float64, as leaves of a graph of their own."""
    return [t.detach().double().requires_grad_() for t in tensors]


def gradients(y, inputs, seed):
    return torch.autograd.grad(y, inputs, seed.to(y.dtype))


def assert_within(actual, expected, roundings, dtype):
    """`roundings` roundings of the largest element.

    Between them an element of size s passes through values of at most the tensor's maximum.
    """
    bound = roundings * UNIT[dtype] * expected.abs().max().clamp_min(1e-30)
    error = (actual.double() - expected).abs().max()
    assert error <= bound, f"error {error:.3e} above {bound:.3e}"


def check(op, inputs, roundings, dtype, reference_op=None):
    """op on inputs of dtype against float64: the output and every gradient."""
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    wide = exact(*inputs)
    y, expected = op(*inputs), (reference_op or op)(*wide)
    assert y.dtype == dtype and y.shape == expected.shape
    seed = torch.randn(y.shape)
    assert_within(y, expected, roundings, dtype)
    for actual, wanted in zip(
        gradients(y, inputs, seed.to(dtype)),
        gradients(expected, wide, seed.to(dtype).double()),
        strict=True,
    ):
        assert_within(actual, wanted, roundings, dtype)


DTYPES = pytest.mark.parametrize("dtype", list(UNIT), ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Roundings: the result, the inner function and the product each round once; twice that for the
# gradient's extra factor, and 2 for sums within.
@DTYPES
def test_activations_match_float64(dtype):
    x = torch.randn(4, 65)
    o = Ops()
    check(
        lambda v: o.gated_activation(v, "silu"),
        [torch.randn(4, 130)],
        8,
        dtype,
        lambda v: v[:, :65] * torch.sigmoid(v[:, :65]) * v[:, 65:],
    )
    check(
        lambda v: o.activation(v, "gelu_tanh"),
        [x],
        8,
        dtype,
        lambda v: 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    )
    check(lambda v: o.activation(v, "squared_relu"), [x], 8, dtype, lambda v: v.clamp_min(0) ** 2)


# Over 64 columns the sums of the mean and variance round like sqrt(64) = 8 single roundings, in
# fp32 at least.
@DTYPES
def test_layer_norm_matches_float64(dtype):
    def plain(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    check(
        lambda x, w, b: Ops().layer_norm(x, w, b, 1e-5),
        [torch.randn(6, 64), torch.randn(64), torch.randn(64)],
        16,
        dtype,
        plain,
    )


def test_layer_norm_without_bias_and_with_fp32_weight_keeps_the_dtype():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert Ops().layer_norm(x, torch.ones(8), None, 1e-5).dtype == torch.bfloat16


def angles(tokens, half):
    angle = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return angle.cos(), angle.sin()


def rotated_by_complex_numbers(x, cos, sin, interleaved):
    """RoPE written another way: each pair of dims is a complex number times e^(i angle)."""
    r = 2 * cos.shape[-1]
    turning, rest = x[..., :r], x[..., r:]
    pairs = turning.unflatten(-1, (-1, 2)) if interleaved else torch.stack(turning.chunk(2, -1), -1)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin).unsqueeze(-2)
    )
    return torch.cat(
        [turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1), rest], -1
    )


# Rounded cos and sin, two products and their sum: 4 roundings, each of an element up to sqrt(2) of
# the largest.
@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 4], ids=["whole", "half"])
def test_rope_is_a_rotation_of_pairs(dtype, interleaved, rotated):
    cos, sin = angles(5, rotated // 2)
    check(
        lambda x: Ops().rope(x, cos, sin, interleaved),
        [torch.randn(2, 5, 3, 8)],
        6,
        dtype,
        lambda x: rotated_by_complex_numbers(x, cos.double(), sin.double(), interleaved),
    )


def test_rope_is_bit_for_bit_that_of_hugging_face_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(2, 5, 3, 8, dtype=torch.bfloat16)
    cos, sin = angles(5, 4)
    wide = [torch.cat([t, t], -1)[None].to(x.dtype) for t in (cos, sin)]
    expected, _ = llama.apply_rotary_pos_emb(x, x, *wide, unsqueeze_dim=2)
    assert torch.equal(Ops().rope(x, cos, sin), expected)


def test_rope_takes_angles_of_each_sequence():
    x = torch.randn(2, 5, 3, 8)
    cos, sin = angles(10, 4)
    both = Ops().rope(x, cos.view(2, 5, 4), sin.view(2, 5, 4))
    second = Ops().rope(x[1:], cos[5:], sin[5:])
    assert torch.equal(both[1:], second)


def attention_in_full(q, k, v, causal, scale):
    """Every score written out; query i of T sees keys up to i + S - T."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("btad,bsad->bats", q, k) * scale
    if causal:
        t, s = scores.shape[-2:]
        hidden = torch.arange(s)[None, :] > torch.arange(t)[:, None] + (s - t)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bats,bsad->btad", scores.softmax(-1), v)


# Scores, weights and output round once each, forward and again backward; bf16 kernels also round
# the weights before the second product.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(6, 6, True), (6, 6, False), (1, 6, True), (3, 6, True), (3, 6, False)],
)
def test_attention_matches_float64(dtype, kv_heads, queries, keys, causal):
    q, k, v = (
        torch.randn(2, queries, 4, 8),
        torch.randn(2, keys, kv_heads, 8),
        torch.randn(2, keys, kv_heads, 8),
    )
    check(
        lambda q, k, v: Ops().attention(q, k, v, causal=causal, scale=0.3),
        [q, k, v],
        16,
        dtype,
        lambda q, k, v: attention_in_full(q, k, v, causal, 0.3),
    )


@pytest.mark.parametrize("backend", ["auto", "flash", "unfused", "local"])
def test_attention_backends_agree(backend):
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    expected = attention_in_full(q.double(), k.double(), v.double(), True, 8**-0.5)
    assert_within(
        Ops(attention_backend=backend).attention(q, k, v, causal=True), expected, 16, torch.float32
    )


def test_tokens_by_kv_cache_match_the_whole_sequence():
    q, k, v = torch.randn(1, 7, 2, 8), torch.randn(1, 7, 2, 8), torch.randn(1, 7, 2, 8)
    whole = Ops().attention(q, k, v, causal=True)
    steps = [(0, 3), (3, 4), (4, 7)]
    parts = [Ops().attention(q[:, a:b], k[:, :b], v[:, :b], causal=True) for a, b in steps]
    assert_within(torch.cat(parts, 1), whole.double(), 16, torch.float32)


def test_attention_dropout_drops_weights():
    q, k, v = torch.randn(1, 64, 1, 8), torch.randn(1, 64, 1, 8), torch.ones(1, 64, 1, 8)
    y = Ops().attention(q, k, v, causal=False, dropout=0.5)
    # Without dropout every output is 1; with it, a sum of 64 weights kept with probability 1/2 and
    # doubled.
    assert y.std() > 0.05
    assert abs(y.mean() - 1) < 0.2


def test_attention_refuses_what_it_cannot_do():
    x, short = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
    with pytest.raises(ValueError, match="4 queries and only 2 keys"):
        Ops().attention(x, short, short, causal=True)


def test_an_attention_backend_that_cannot_serve_is_an_error_at_start():
    with pytest.raises(
        ValueError, match="--attention-backend fused is cuDNN's and the device is cpu; use"
    ):
        select_ops("torch", CPU, torch.float32, "fused")
    with pytest.raises(ValueError, match="--attention-backend flahs is not one of auto, flash"):
        select_ops("torch", CPU, torch.float32, "flahs")
    assert select_ops("torch", CPU, torch.float32, "flash").attention_backend == "flash"


SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def adam_state(size, dtype):
    masters = torch.randn(size)
    return (
        masters,
        torch.zeros(size),
        torch.zeros(size),
        masters.to(dtype) if dtype != torch.float32 else masters,
    )


# Each step has a dozen roundings of values no larger than the weight or the update, in another
# order than torch's: 16 units a step.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 1000, ELEMENTS_IN_CACHE + 17], ids=str)
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_adamw_matches_torch(kernels, size, dtype, step_dtype):
    masters, m, v, weights = adam_state(size, dtype)
    parameter = torch.nn.Parameter(masters.clone())
    theirs = torch.optim.AdamW([parameter], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    step = torch.zeros((), dtype=step_dtype)
    for i in range(6):
        lr = 1e-2 * (i + 1)
        grad = torch.randn(size) * 10.0 ** (i - 3)
        theirs.param_groups[0]["lr"] = lr
        parameter.grad = grad.clone()
        theirs.step()
        step += 1
        scalars = {"step": step, "grad_scale": torch.tensor(0.25), "skip": torch.tensor(False)}
        Ops(kernels).adamw_(
            masters, m, v, grad * 4, weights, terms_at(lr=lr, **scalars, **SETTINGS)
        )
        state = theirs.state[parameter]
        for actual, expected in (
            (masters, parameter),
            (m, state["exp_avg"]),
            (v, state["exp_avg_sq"]),
        ):
            assert_within(actual, expected.detach().double(), 16 * (i + 1), torch.float32)
        # Triton's interpreter cuts fp32 off to bf16 where a device rounds to nearest.
        assert_within(weights, masters.to(dtype).double(), 2 if kernels == "triton" else 0, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_skipped_update_changes_no_bit(kernels, bad):
    masters, m, v, weights = adam_state(5000, torch.bfloat16)
    m.normal_()
    v.uniform_()
    m[0], masters[0], weights[1] = -0.0, -0.0, 3.0  # a zero times anything would lose its sign
    before = [t.clone() for t in (masters, m, v, weights)]
    grads = torch.randn(5000)
    grads[::7] = bad
    scalars = {
        "step": torch.tensor(3.0),
        "grad_scale": torch.tensor(bad),
        "skip": torch.tensor(True),
    }
    Ops(kernels).adamw_(masters, m, v, grads, weights, terms_at(lr=0.1, **scalars, **SETTINGS))
    for after, old in zip((masters, m, v, weights), before, strict=True):
        assert torch.equal(after.view(torch.uint8), old.view(torch.uint8))


@pytest.mark.parametrize("kernels", KERNELS[:2])
def test_adamw_never_waits_for_the_device(kernels, monkeypatch):
    def refuse(*_):
        raise AssertionError("the host read a device value")

    masters, m, v, weights = adam_state(10, torch.bfloat16)
    scalars = {
        "step": torch.tensor(1.0),
        "grad_scale": torch.tensor(1.0),
        "skip": torch.tensor(False),
    }
    for name in ("item", "__bool__", "__float__", "__int__", "__index__", "cpu", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    Ops(kernels).adamw_(
        masters, m, v, torch.ones(10), weights, terms_at(lr=0.1, **scalars, **SETTINGS)
    )


def test_adamw_refuses_buffers_with_gaps_or_of_another_size():
    masters, m, v, weights = adam_state(10, torch.bfloat16)
    scalars = {
        "step": torch.tensor(1.0),
        "grad_scale": torch.tensor(1.0),
        "skip": torch.tensor(False),
    }
    for grads in (torch.ones(20)[::2], torch.ones(9), torch.ones(10, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="grads"):
            Ops().adamw_(masters, m, v, grads, weights, terms_at(lr=0.1, **scalars, **SETTINGS))


def test_auto_takes_native_on_a_cpu_and_says_why_when_it_cannot(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "AVAILABLE", True)
    assert select_ops("auto", CPU, torch.float32).kernels == "native"
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    with caplog.at_level(logging.INFO, logger="trivium"):
        assert select_ops("auto", CPU, torch.float32) == Ops()
    assert "trivium._native is not built" in caplog.text


def test_a_missing_kernel_is_an_error_that_names_flag_and_remedy(monkeypatch):
    with pytest.raises(ValueError, match=r"--kernels native: .*float16.*--bf16"):
        select_ops("native", CPU, torch.float16)
    with pytest.raises(
        ValueError, match=r"--kernels native: .*device is cuda; use --kernels triton"
    ):
        select_ops("native", torch.device("cuda"), torch.float32)
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    with pytest.raises(
        ValueError, match=r"--kernels native: .*not built; install a C\+\+17 compiler"
    ):
        select_ops("native", CPU, torch.float32)
    with pytest.raises(ValueError, match="--kernels fast: 'fast' is not one of"):
        select_ops("fast", CPU, torch.float32)


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    kernels = pytest.importorskip("trivium.kernels.rms_norm")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"--kernels triton: .*TRITON_INTERPRET=1"):
        select_ops("triton", CPU, torch.float32)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert select_ops("triton", CPU, torch.float32).kernels == "triton"
    monkeypatch.setattr(triton, "AVAILABLE", False)
    with pytest.raises(ValueError, match=r"--kernels triton: .*install triton"):
        select_ops("triton", CPU, torch.float32)


def test_the_log_line_names_every_op():
    every = ", ".join(OPS)
    assert Ops("torch", "flash").describe() == f"kernels: {every} torch | attention sdpa (flash)"
    triton = Ops("triton").describe()
    assert (
        "rms_norm, adamw triton | layer_norm, rope, activation, few_rows, block_step, "
        "cross_entropy, grad_norm torch" in triton
    )
    assert "16-bit numbers in fp32" in Ops(fp32_matmul=True).describe()


@NATIVE
def test_single_ops_can_be_chosen():
    ops = select_ops("native,rope=torch,adamw=torch", CPU, torch.float32)
    assert {op for op, one in ops.implementations.items() if one == "torch"} == {
        "rope",
        "adamw",
        "block_step",
    }, "a step has all of its ops native"
    assert select_ops("torch,rope=native", CPU, torch.float32).implementations["rope"] == "native"


@pytest.mark.parametrize(
    ("kernels", "problem"),
    [
        (
            "torch,rpoe=native",
            "'rpoe=native' is not OP=IMPLEMENTATION with an op of rms_norm, layer_norm, rope",
        ),
        ("torch,rope", "'rope' is not OP=IMPLEMENTATION"),
        ("torch,rope=triton", "rope has torch, native, and not triton"),
        ("torch,rope=", "rope has torch, native, and not nothing"),
    ],
)
def test_a_choice_that_there_is_not_is_an_error(kernels, problem):
    with pytest.raises(ValueError, match=re.escape(f"--kernels {kernels}: {problem}")):
        select_ops(kernels, CPU, torch.float32)


@NATIVE
@pytest.mark.parametrize(
    ("kernels", "backend"),
    [
        ("torch,block_step=native", "auto"),
        ("auto,block_step=native,rope=torch", "auto"),
        ("native,block_step=native", "flash"),
    ],
)
def test_a_step_whose_parts_are_not_native_is_an_error_where_it_is_asked_for(kernels, backend):
    with pytest.raises(
        ValueError,
        match=f"--kernels {kernels}: block_step=native is made of native rms_norm"
        ".*leave block_step=native out",
    ):
        select_ops(kernels, CPU, torch.float32, backend)


def test_a_choice_for_one_op_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    with pytest.raises(
        ValueError, match=r"--kernels torch,rope=native: .*not built.*or leave rope=native out"
    ):
        select_ops("torch,rope=native", CPU, torch.float32)


def test_16_bit_products_are_widened_where_the_processor_has_no_instructions_for_them(monkeypatch):
    """bf16 operands reach the products in fp32 and what comes out is bf16 again.

    fp32 is left alone, and so is bf16 on other processors.
    """
    found = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert (
        select_ops("torch", CPU, torch.bfloat16).fp32_matmul
        and not select_ops("torch", CPU, torch.float32).fp32_matmul
    )
    assert not select_ops("torch", torch.device("cuda"), torch.bfloat16).fp32_matmul
    x = torch.randn(3, 4).bfloat16()
    assert select_ops("torch", CPU, torch.bfloat16).operand(x).dtype == torch.float32
    found["avx512_bf16"] = True
    assert select_ops("torch", CPU, torch.bfloat16).operand(x) is x
    assert not select_ops("torch", CPU, torch.bfloat16).fp32_matmul
    found.update(architecture="aarch64", avx512_bf16=False)
    assert not select_ops("torch", CPU, torch.bfloat16).fp32_matmul
