"""Attention in blocks of keys.

Each against float64, blocks merged against the whole, flash against plain PyTorch; masks.
"""

import pytest
import torch
import torch.nn.functional as F

from trivium.ops import Ops, attention, reference

UNIT = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", list(UNIT), ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "unfused"])  # flash, plain
KV_HEADS = pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
SHAPES = pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(7, 7, True), (7, 7, False), (3, 10, False), (10, 3, False), (1, 1, True)],
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(queries, keys, kv_heads, dtype, size=8):
    """q, k, v and the gradient of o."""
    shapes = [
        (2, queries, 4, size),
        (2, keys, kv_heads, size),
        (2, keys, kv_heads, size),
        (2, queries, 4, size),
    ]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def exactly(tensors, seen, scale):
    """o, lse, dq, dk, dv in float64, every score written out; seen bool [B or 1, T, S]."""
    *inputs, do = (t.double() for t in tensors)
    q, k, v = inputs = [t.requires_grad_() for t in inputs]
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("btad,bsad->bats", q, k.repeat_interleave(group, 2)) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    o = torch.einsum("bats,bsad->btad", scores.softmax(-1), v.repeat_interleave(group, 2))
    return o.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(o, inputs, do)


def everything(queries, keys, causal):
    seen = torch.ones(1, queries, keys, dtype=torch.bool)
    return seen.tril(keys - queries) if causal else seen


def assert_close(actual, expected, bound):
    """Norm-wise: an entry of a gradient may be a difference of large terms."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)
        assert error <= bound, f"error {error:.2e} above {bound:.2e}"


# Scores, weights, their sums over at most 10 keys, and the result round: 8 units, in norm. bf16
# kernels round the weights too.
@DTYPES
@BACKENDS
@KV_HEADS
@SHAPES
def test_a_block_matches_float64(backend, dtype, kv_heads, queries, keys, causal):
    *inputs, do = tensors = problem(queries, keys, kv_heads, dtype)
    o, lse = Ops(attention_backend=backend).attention_block(*inputs, causal=causal, scale=0.3)
    grads = Ops(attention_backend=backend).attention_block_backward(
        do, *inputs, o, lse, causal=causal, scale=0.3
    )
    assert o.dtype == dtype and all(grad.dtype == dtype for grad in grads)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = exactly(tensors, everything(queries, keys, causal), 0.3)
    if (
        queries * keys == 1
    ):  # the one weight is 1 whatever the score: dq and dk are zero but for rounding
        assert_close((o, lse, grads[2]), (*expected[:2], expected[4]), 8 * UNIT[dtype])
        size = do.norm() * inputs[2].norm() * max(t.norm() for t in inputs[:2])
        assert all(grad.norm() <= UNIT[dtype] * size for grad in grads[:2])
    else:
        assert_close((o, lse, *grads), expected, 8 * UNIT[dtype])


@DTYPES
@KV_HEADS
def test_flash_equals_plain_pytorch(dtype, kv_heads, monkeypatch):
    """And plain PyTorch stands in where torch has no such kernel any more, or the head dim is not
    contiguous.
    """
    q, k, v, do = problem(6, 6, kv_heads, dtype)
    o, lse = Ops().attention_block(q, k, v, causal=True)
    grads = Ops().attention_block_backward(do, q, k, v, o, lse, causal=True)
    scattered = q.transpose(1, 3).contiguous().transpose(1, 3)
    calls = []
    plain = reference.attention_block
    monkeypatch.setattr(reference, "attention_block", lambda *args: calls.append(1) or plain(*args))
    assert_close(Ops().attention_block(scattered, k, v, causal=True), (o, lse), 4 * UNIT[dtype])
    monkeypatch.setattr(attention, "_CPU_FLASH", "_not_in_this_torch")
    assert_close(Ops().attention_block(q, k, v, causal=True), (o, lse), 4 * UNIT[dtype])
    assert len(calls) == 2
    assert_close(
        Ops().attention_block_backward(do, q, k, v, o, lse, causal=True), grads, 8 * UNIT[dtype]
    )


@DTYPES
@BACKENDS
@pytest.mark.parametrize("loudness", [1, 100])
def test_blocks_merged_are_the_whole(backend, dtype, loudness):
    """Three blocks of keys, one of them far louder than the others.

    Their gradients, by the merged o and lse, add up.
    """
    q, k, v, do = tensors = problem(5, 12, 2, dtype)
    k[:, 4:6] *= loudness
    chosen = Ops(attention_backend=backend)
    parts = [slice(0, 4), slice(4, 6), slice(6, 12)]
    o, lse = chosen.attention_block(q, k[:, parts[0]], v[:, parts[0]], causal=False)
    o = o.to(lse.dtype)
    for part in parts[1:]:
        chosen.attention_merge_(
            o, lse, *chosen.attention_block(q, k[:, part], v[:, part], causal=False)
        )
    o = o.to(dtype)
    blocks = [
        chosen.attention_block_backward(do, q, k[:, part], v[:, part], o, lse, causal=False)
        for part in parts
    ]
    dq = sum(block[0].double() for block in blocks)
    dk, dv = (torch.cat([block[i] for block in blocks], dim=1) for i in (1, 2))
    expected = exactly(tensors, everything(5, 12, False), 8**-0.5)
    # A score is rounded in proportion to its size, in fp32 at least, and its weight, relatively, by
    # as much.
    largest = max(1.0, expected[1].abs().max().item())
    assert_close(
        (o, lse, dq, dk, dv),
        expected,
        8 * UNIT[dtype] + 8 * largest * min(UNIT[dtype], UNIT[torch.float32]),
    )


@pytest.mark.parametrize("queries", [2, 5, 11])
def test_late_queries_need_no_mask(queries, monkeypatch):
    """The last T of S positions, forward and backward, without scaled_dot_product_attention and the
    mask it would take.
    """
    *inputs, do = tensors = problem(queries, 12, 2, torch.float32)
    inputs = [t.requires_grad_() for t in inputs]
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    o = Ops().attention(*inputs, causal=True, scale=0.3)
    o_exact, _, *grads = exactly(tensors, everything(queries, 12, True), 0.3)
    assert_close(
        (o, *torch.autograd.grad(o, inputs, do)), (o_exact, *grads), 8 * UNIT[torch.float32]
    )


def test_late_queries_under_dropout_see_what_they_do_without():
    """Scores of zero: an output is a mean of the values seen.

    The last two are huge, hidden from the first query, and 16 heads draw each mask.
    """
    q, k, v = torch.zeros(1, 3, 16, 8), torch.zeros(1, 64, 16, 8), torch.ones(1, 64, 16, 8)
    v[:, 62:] = 1e6
    y = Ops().attention(q, k, v, causal=True, dropout=0.5)
    assert y[:, 0].max() < 3 and y[:, 0].std() > 0
    assert y[:, 1].max() > 1e3 and y[:, 1].min() < 3, "key 62 kept in some heads, dropped in others"
    assert 5e4 < y[:, 2].max() < 1e5, "keys 62 and 63, both kept in some heads"


@DTYPES
@KV_HEADS
@pytest.mark.parametrize("backend", ["auto", "flash", "unfused"])
def test_attention_with_a_mask_matches_float64(backend, dtype, kv_heads):
    *inputs, do = tensors = problem(5, 9, kv_heads, dtype)
    mask = torch.rand(2, 5, 9) < 0.5
    mask[:, :, 0] = True
    inputs = [t.requires_grad_() for t in inputs]
    o = Ops(attention_backend=backend).attention(*inputs, causal=False, mask=mask, scale=0.3)
    o_exact, _, *grads = exactly(tensors, mask, 0.3)
    assert_close((o, *torch.autograd.grad(o, inputs, do)), (o_exact, *grads), 8 * UNIT[dtype])
    with pytest.raises(ValueError, match="either causal or has a mask"):
        Ops().attention(*inputs, causal=True, mask=mask)


def test_the_calls_for_a_gpu_fit_this_torch():
    """On tensors without memory: arguments, their order and the shapes that come back.

    What the kernels compute is for tests on a GPU.
    """
    q, k, v, do = (t.to("meta") for t in problem(6, 6, 2, torch.bfloat16))
    o, lse = attention._flash_forward([q, k, v], True, 0.3)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 6), torch.float32)
    grads = attention._flash_backward([do, q, k, v, o], lse, True, 0.3)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    masked = Ops().attention(
        q, k, v, causal=False, mask=torch.ones(2, 6, 6, dtype=torch.bool, device="meta")
    )
    assert masked.shape == q.shape
