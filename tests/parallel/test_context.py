"""Attention over sequences that are cut across ranks, against one process.

Outputs and every gradient, norm-wise.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

from trivium.comm import Pending
from trivium.mesh import Axis, Mesh
from trivium.ops import Ops
from trivium.parallel import context
from trivium.testing import run_ranks

ALONE = Axis("cp")
TWO = Axis("cp", 2, 0, (0, 1))
WAYS = ["p2p", "allgather", "a2a"]
NAMES = ("o", "dq", "dk", "dv")


def problem(tokens, heads, kv_heads, dtype=torch.float32, batch=2, size=8, seed=0):
    """q, k, v and the gradient of o, of the whole sequence."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend(cp, tensors, way, documents=None):
    """o, dq, dk, dv of this rank's tokens."""
    *inputs, do = tensors
    inputs = [t.clone().requires_grad_() for t in inputs]
    o = context.attention(*inputs, cp=cp, comm_type=way, ops=Ops(), documents=documents)
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def on_rank(mesh: Mesh, tensors, way, documents):
    """As attend, of the tokens of this cp rank and the heads of this tp rank, with their places."""
    mine = [
        context.local_tokens(t, mesh.cp).chunk(mesh.tp.size, dim=2)[mesh.tp.rank] for t in tensors
    ]
    return (
        context.token_positions(tensors[0].shape[1], mesh.cp),
        mesh.tp.rank,
        attend(mesh.cp, mine, way, documents),
    )


def assembled(n, tensors, way, documents=None, **axes):
    """o, dq, dk, dv of the whole sequence, put together from n ranks."""
    wholes = [torch.full_like(t, float("nan")) for t in (tensors[0], *tensors[:3])]
    for positions, tp_rank, parts in run_ranks(n, on_rank, tensors, way, documents, **axes):
        for whole, part in zip(wholes, parts, strict=True):
            heads = part.shape[2]
            whole[:, positions, tp_rank * heads : (tp_rank + 1) * heads] = part
    return wholes


def errors(actual, expected):
    return {
        name: ((a.double() - e.double()).norm() / e.double().norm()).item()
        for name, a, e in zip(NAMES, actual, expected, strict=True)
    }


def assert_close(actual, expected, bound):
    found = errors(actual, expected)
    assert all(error <= bound for error in found.values()), (
        f"{found}, allowed {bound:.1e}"
    )  # NaN fails too


def rounding(tokens, unit=2**-24):
    """Sums of up to `tokens` terms in another order, sqrt(tokens) units of the norm, once each for
    scores, weights, blocks and result.
    """
    return 4 * tokens**0.5 * unit


@pytest.mark.parametrize(
    ("way", "n", "tokens", "heads", "kv_heads"),
    [
        *((way, 2, 24, 4, 2) for way in WAYS),
        *((way, 2, 40, 4, 1) for way in WAYS),
        *((way, 4, 24, 4, 2) for way in WAYS),
        *((way, 4, 40, 4, 1) for way in WAYS),
        *((way, 4, 8, 4, 4) for way in WAYS),  # chunks of one token
        *((way, 3, 30, 3, 1) for way in WAYS),  # a ring of odd length
        ("a2a", 2, 8, 6, 3),  # 3 key-value heads become 6
    ],
)
def test_ranks_match_one_process(way, n, tokens, heads, kv_heads):
    """In float64 too, where a wrong term of 1e-9 would stand out from rounding."""
    for dtype, unit in ((torch.float32, 2**-24), (torch.float64, 2**-53)):
        tensors = problem(tokens, heads, kv_heads, dtype)
        assert_close(
            assembled(n, tensors, way, cp=n), attend(ALONE, tensors, way), rounding(tokens, unit)
        )


@pytest.mark.parametrize("way", WAYS)
def test_context_inside_tensor_parallelism_matches_one_process(way):
    tensors = problem(24, 4, 2)
    assert_close(assembled(4, tensors, way, tp=2, cp=2), attend(ALONE, tensors, way), rounding(24))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_as_close_to_fp32_as_one_process_is(way, n):
    """Blocks and the fp32 sum over them each round to bf16 where one process rounds once.

    sqrt(2) of its error; 1.5 leaves room for luck.
    """
    tensors = problem(64, 4, 2, torch.bfloat16, size=16)
    exact = attend(ALONE, [t.float() for t in tensors], way)
    ours, alone = (
        errors(assembled(n, tensors, way, cp=n), exact),
        errors(attend(ALONE, tensors, way), exact),
    )
    assert all(ours[name] <= 1.5 * alone[name] for name in NAMES), f"{ours} against {alone}"


class BlocksOf256And1(Ops):
    """Ops whose gradients of a block are all 256 on the diagonal and 1 elsewhere."""

    def attention_block_backward(self, do, q, k, v, o, lse, *, causal, **rule):
        return tuple(torch.full_like(t, 256.0 if causal else 1.0) for t in (q, k, v))


def summed_in_the_ring(mesh: Mesh):
    q, k, v, do = (t.bfloat16().requires_grad_() for t in problem(8, 2, 1))
    o = context.attention(q, k, v, cp=mesh.cp, comm_type="p2p", ops=BlocksOf256And1())
    return torch.autograd.grad(o, (q, k, v), do)


def test_the_ring_sums_gradients_in_fp32():
    """256 + 1 is 256 in bf16, and so is 256 + 1 + 1 + 1 added one by one.

    In fp32 it is 259, which rounds to 260.
    """
    for rank, (dq, dk, dv) in enumerate(run_ranks(4, summed_in_the_ring, cp=4)):
        # The second chunk's queries see all ranks, the first chunk's those before. Keys the other
        # way round.
        for gradient, seen_by_all, rest in (
            (dq, slice(4, 8), slice(0, 4)),
            (dk, slice(0, 4), slice(4, 8)),
            (dv, slice(0, 4), slice(4, 8)),
        ):
            assert (gradient[:, seen_by_all] == 260).all()
            assert (gradient[:, rest] == torch.tensor(256.0 + rank).bfloat16()).all()


def test_gathered_keys_get_their_gradient_summed_in_fp32(monkeypatch):
    summed = []
    monkeypatch.setattr(context, "start_all_gather", lambda x, axis: Pending(x.zero_()))
    monkeypatch.setattr(
        context, "start_reduce_scatter", lambda x, axis: summed.append(x.dtype) or Pending(x[:1])
    )
    q, k, v, do = (t.bfloat16().requires_grad_() for t in problem(8, 2, 1))
    gradients = torch.autograd.grad(
        context.attention(q, k, v, cp=TWO, comm_type="allgather", ops=Ops()), (q, k, v), do
    )
    assert summed == [torch.float32]
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("idle", [0, 1])
def test_a_rank_without_any_gradient_stays_free_of_nan(way, idle):
    """All of one rank's tokens may be masked in the loss.

    Its keys still get the gradient of the others' queries.
    """
    tensors = problem(24, 4, 2)
    tensors[3][:, context.token_positions(24, replace(TWO, rank=idle))] = 0
    assert_close(assembled(2, tensors, way, cp=2), attend(ALONE, tensors, way), rounding(24))
    tensors[3].zero_()
    assert all((gradient == 0).all() for gradient in assembled(2, tensors, way, cp=2)[1:])


@pytest.mark.parametrize("way", WAYS)
def test_extreme_scores_stay_finite_and_right(way):
    """Scores of hundreds: exp overflows above 88.

    A score s carries a rounding of 2^-24 s, and so, relatively, does its weight.
    """
    tensors = problem(40, 4, 2)
    tensors[0] *= 100
    exact = [t.double() for t in tensors]
    q, k = exact[0], exact[1].repeat_interleave(2, dim=2)
    largest = torch.einsum("btad,bsad->bats", q, k).abs().max().item() * q.shape[-1] ** -0.5
    assert largest > 500
    assert_close(assembled(4, tensors, way, cp=4), attend(ALONE, exact, way), 2 * largest * 2**-24)


def some_documents(tokens):
    """Documents of both samples: [B, T].

    Ends inside chunks and on their borders, a document of one token, one over nearly all ranks.
    """
    ends = torch.zeros(2, tokens, dtype=torch.int64)
    ends[0, [3, 5, 6, tokens // 2, tokens - 1]] = 1
    ends[1, [tokens - 4]] = 1
    return ends.cumsum(1)


def densely(tensors, documents):
    """o, dq, dk, dv with every score written out and masked."""
    *inputs, do = (t.double() for t in tensors)
    q, k, v = inputs = [t.requires_grad_() for t in inputs]
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("btad,bsad->bats", q, k.repeat_interleave(group, 2)) * q.shape[-1] ** -0.5
    place = torch.arange(q.shape[1])
    seen = (documents[:, :, None] == documents[:, None, :]) & (place[:, None] >= place[None, :])
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    o = torch.einsum("bats,bsad->btad", weights, v.repeat_interleave(group, 2))
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("way", ["allgather", "a2a"])
def test_documents_do_not_see_each_other(way, n):
    tensors, documents = problem(24, 4, 2), some_documents(24)
    found = (
        attend(ALONE, tensors, way, documents)
        if n == 1
        else assembled(n, tensors, way, documents, cp=n)
    )
    assert_close(found, densely(tensors, documents), rounding(24))


def dropped_out(mesh: Mesh, way: str):
    """Outputs and gradient of v, of zero scores and values of one.

    Without dropout each output would be 1.
    """
    torch.manual_seed(mesh.rank)
    q, k, v = (
        torch.zeros(1, 64, 4, 8),
        torch.zeros(1, 64, 2, 8),
        torch.ones(1, 64, 2, 8, requires_grad=True),
    )
    o = context.attention(q, k, v, cp=mesh.cp, comm_type=way, ops=Ops(), dropout=0.5)
    o.sum().backward()
    return o.detach(), v.grad


@pytest.mark.parametrize("way", ["allgather", "a2a"])
def test_attention_dropout_drops_weights(way):
    """A row that sees s keys varies by 1/s around 1.

    Over 4 heads and s = 1 to 128, the mean deviates by sqrt(4 x 5.4) / 512 = 0.009.
    """
    ranks = run_ranks(2, dropped_out, way, cp=2)
    outputs = torch.cat([o[..., 0] for o, _ in ranks])
    assert outputs.std() > 0.05
    assert abs(outputs.mean() - 1) < 5 * 0.009
    # o is linear in v, and v is 1: the gradient's sum is o's, up to the rounding of sums of 4096
    # terms of size 1.
    assert (
        abs(sum(grad.sum() for _, grad in ranks) - sum(o.sum() for o, _ in ranks)) <= 4096 * 2**-20
    )


def test_what_a_way_cannot_do_is_an_error_that_names_flags_and_remedy():
    q, k, v, _ = problem(12, 3, 1)

    def refused(message, way, q=q, k=k, v=v, **settings):
        with pytest.raises(ValueError, match=message):
            context.attention(q, k, v, cp=TWO, comm_type=way, ops=Ops(), **settings)

    documents = torch.zeros(2, 24, dtype=torch.int64)
    refused(
        "--cp-comm-type p2p with --reset-attention-mask: .*; use --cp-comm-type allgather or a2a",
        "p2p",
        documents=documents,
    )
    refused(
        r"--cp-comm-type p2p with --attention-dropout 0\.1: "
        ".*allgather or a2a, or --attention-dropout 0",
        "p2p",
        dropout=0.1,
    )
    refused(
        "3 attention heads .* --context-parallel-size 2; "
        "use .* divides 3, or --cp-comm-type p2p or allgather",
        "a2a",
    )
    refused("--cp-comm-type ring is not one of p2p, allgather, a2a", "ring")
    refused("11 queries and 11 keys", "p2p", q[:, :11], k[:, :11], v[:, :11])
    with pytest.raises(
        ValueError,
        match="--seq-length 30 is not a multiple of 2 x --context-parallel-size 4 = 8; "
        "nearest that work: 24, 32",
    ):
        context.token_positions(30, replace(TWO, size=4))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_ranks_hold_every_token_once_and_the_same_work(n):
    """Work: the keys that a rank's queries see, all together."""
    ranks = [replace(ALONE, size=n, rank=rank) for rank in range(n)]
    positions = [context.token_positions(48, cp) for cp in ranks]
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(48))
    assert len({(p + 1).sum().item() for p in positions}) == 1
    x = torch.randn(2, 48, 3)
    for cp, p in zip(ranks, positions, strict=True):
        assert (p.diff() > 0).all(), "the ring's own block is causal in this order"
        assert torch.equal(context.local_tokens(x, cp), x[:, p])


@dataclass(frozen=True)
class Watched(Ops):
    """Ops that write down the blocks they compute."""

    events: list = field(default_factory=list)

    def attention_block(self, q, k, v, *, causal, **rule):
        self.events.append(("block", q.shape[1], k.shape[1], causal))
        return super().attention_block(q, k, v, causal=causal, **rule)

    def attention_block_backward(self, do, q, k, v, o, lse, *, causal, **rule):
        self.events.append(("block", q.shape[1], k.shape[1], causal))
        return super().attention_block_backward(do, q, k, v, o, lse, causal=causal, **rule)


@pytest.fixture
def events(monkeypatch):
    """What a rank sends, receives, waits for and computes, in its order.

    Nothing arrives but zeros.
    """
    seen = []

    class Watch(Pending):
        def wait(self):
            seen.append(("wait",))
            return self.result

    monkeypatch.setattr(
        context, "start_send", lambda x, axis, to: seen.append(("send", to)) or Watch(x)
    )
    monkeypatch.setattr(
        context,
        "start_receive",
        lambda x, axis, source: seen.append(("receive", source)) or Watch(x.zero_()),
    )
    return seen


def ring_on(rank, n, events):
    """Forward on one rank, 8 tokens of 2 samples with 2 query heads and 1 key-value head of size 8:
    q, o, do.
    """
    q, k, v, do = problem(8, 2, 1)
    q.requires_grad_()
    o = context.attention(
        q,
        k,
        v,
        cp=Axis("cp", n, rank, tuple(range(n))),
        comm_type="p2p",
        ops=Watched(events=events),
    )
    return q, o, do


@pytest.mark.parametrize("n", [2, 3, 4])
def test_messages_travel_while_a_block_is_computed(events, n):
    """Forward: the next keys. Backward: the next keys, and the sums of the keys before.

    Each other rank's keys are half a block of work.
    """
    hop, arrived, block = ["message"] * 2, ["wait"] * 2, ["block"]
    for rank in range(n):
        events.clear()
        q, o, do = ring_on(rank, n, events)
        events.append(("backward",))
        torch.autograd.grad(o, q, do)
        kinds = [{"send": "message", "receive": "message"}.get(kind, kind) for kind, *_ in events]
        split = kinds.index("backward")
        assert kinds[:split] == (hop + block + arrived) * (n - 1) + block
        first, between, last = (
            hop + block + hop + arrived,
            hop + block + arrived + hop + arrived,
            block + arrived + hop + arrived,
        )
        assert kinds[split + 1 :] == first + between * (n - 2) + last
        blocks = [event[1:] for event in events if event[0] == "block"]
        assert blocks[0] == blocks[n] == (8, 8, True)
        assert all(
            queries * keys == 8 * 8 // 2 and not causal
            for queries, keys, causal in blocks[1:n] + blocks[n + 1 :]
        )


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_ring_completes_where_messages_are_not_buffered(events, n):
    """As over NCCL at its strictest.

    A rank's next message starts when the one before it has met its counterpart.
    """
    queues = []
    for rank in range(n):
        events.clear()
        q, o, do = ring_on(rank, n, events)
        torch.autograd.grad(o, q, do)
        queues.append([event for event in events if event[0] in ("send", "receive")])
    assert {len(queue) for queue in queues} == {2 * (n - 1) + 2 * (n - 1) + 2 * n}
    while any(queues):
        first = [queue[0] if queue else ("done", None) for queue in queues]
        sending = [(rank, peer) for rank, (kind, peer) in enumerate(first) if kind == "send"]
        meeting = [(rank, peer) for rank, peer in sending if first[peer] == ("receive", rank)]
        assert meeting, f"everyone waits: {first}"
        for pair in meeting:
            for rank in pair:
                queues[rank].pop(0)


def test_the_ring_keeps_only_what_is_local_for_its_backward(events):
    """q and o, k and v, and lse of one rank, on a ring of four."""
    _, o, _ = ring_on(0, 4, events)
    assert sorted(t.numel() for t in o.grad_fn.saved_tensors) == [
        2 * 2 * 8,
        *[2 * 8 * 8] * 2,
        *[2 * 8 * 2 * 8] * 2,
    ]
