"""Attention with capped scores against plain autograd, in fp64, and blocks of which some queries
see nothing.
"""

import pytest
import torch

from trivium.ops import Ops


def problem(queries: int, keys: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


def by_hand(q, k, v, hidden: torch.Tensor, cap: float, scale: float) -> torch.Tensor:
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    scores = cap * torch.tanh(torch.einsum("btad,bsad->bats", q, k) * scale / cap)
    return torch.einsum("bats,bsad->btad", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (1, 9)])
def test_capped_attention_and_its_gradients(queries, keys):
    inputs = problem(queries, keys)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    expected = by_hand(*inputs, hidden, 2.0, 0.7)
    found = Ops().attention(*inputs, causal=True, scale=0.7, softcap=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ways = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, ways),
        torch.autograd.grad(expected, inputs, ways),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_cap_and_dropout_exclude_each_other():
    with pytest.raises(ValueError, match="a softcap has no dropout"):
        Ops().attention(*problem(3, 3), causal=True, softcap=2.0, dropout=0.1)


@torch.no_grad()
def test_a_query_that_sees_nothing_adds_nothing():
    q, k, v = problem(5, 7)
    mask = torch.ones(1, 5, 7, dtype=torch.bool)
    mask[:, 2] = False
    o, lse = Ops().attention_block(q, k, v, causal=False, mask=mask)
    assert (o[:, 2] == 0).all() and (lse[:, :, 2] == -torch.inf).all() and not o.isnan().any()
    whole, log = Ops().attention_block(q, k, v, causal=False, mask=torch.ones_like(mask))
    before = whole[:, 2].clone(), log[:, :, 2].clone()
    Ops().attention_merge_(whole, log, o, lse)
    assert torch.equal(whole[:, 2], before[0]) and torch.equal(log[:, :, 2], before[1])
