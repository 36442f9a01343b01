"""Context parallelism: the tokens of a sequence cut over ranks, and causal attention across the cuts in three ways.

Causal attention gives late tokens more work than early ones. Hence zig-zag: with n ranks the sequence is cut into 2n chunks, and
rank r holds the r-th from the front and the r-th from the back, T/n tokens with the same number of visible keys on every rank
(Llama 3, Dubey et al. 2024, section 3.3.2; Brandon et al. 2023 balance by striping single tokens instead).

Which way, by the words of Megatron's --cp-comm-type, with T/n tokens, A query heads and K key-value heads on each rank:

p2p        keys and values travel round a ring while each rank computes (Liu et al. 2023). Memory T/n; any number of heads.
allgather  every rank holds all keys and values of a layer (Dubey et al. 2024). Memory T for 2K heads; any mask, dropout.
a2a        heads are exchanged for tokens and back (Ulysses: Jacobs et al. 2023). A multiple of n heads; any mask, dropout.
"""

from collections.abc import Callable
from dataclasses import replace
from math import gcd

import torch

from ..comm import all_to_all, start_all_gather, start_receive, start_reduce_scatter, start_send
from ..config import FlagError
from ..mesh import Axis
from ..ops import AttentionRule, Ops

_PLAIN = AttentionRule()


def token_positions(seq_length: int, cp: Axis, device: torch.device | None = None) -> torch.Tensor:
    """The places in the sequence of the tokens that this rank of `cp` holds, in its order: int64 [T/cp].

    Raises FlagError where the sequence cannot be cut into two chunks a rank.
    """
    if cp.size == 1:
        return torch.arange(seq_length, device=device)
    if seq_length % (2 * cp.size):
        below = seq_length // (2 * cp.size) * 2 * cp.size
        near = ", ".join(str(length) for length in (below, below + 2 * cp.size) if length)
        raise FlagError(
            f"--seq-length {seq_length} is not a multiple of 2 x --context-parallel-size {cp.size} = {2 * cp.size}; nearest that work: {near}"
        )
    chunks = torch.arange(seq_length, device=device).view(2 * cp.size, -1)
    return torch.cat([chunks[i] for i in _chunks_of(cp)])


def local_tokens(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """This rank's tokens of x [B, T, ...]: [B, T/cp, ...], in the order of token_positions."""
    return x if cp.size == 1 else x[:, token_positions(x.shape[1], cp, x.device)]


@torch.compiler.disable
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cp: Axis,
    comm_type: str,
    ops: Ops,
    rule: AttentionRule = _PLAIN,
    documents: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention over the whole sequence of q [B, T/cp, A, D], k and v [B, T/cp, K, D], this rank's zig-zag tokens: [B, T/cp, A, D].

    rule: what else is done to the scores. documents: int [B, T] of the whole sequence, equal on all ranks: a token sees only tokens of its
    own document. dropout: of the attention weights; its masks come from torch's generator and so depend on the layout, and are independent
    between ranks only if their generators are. Every rank of `cp` must call this, forward and backward.
    Raises FlagError, naming flags and remedy, on what comm_type cannot do.
    """
    if comm_type not in _WAYS:
        raise FlagError(f"--cp-comm-type {comm_type} is not one of {', '.join(_WAYS)}")
    if cp.size == 1:
        return causal(q, k, v, ops, rule, documents, dropout)
    if q.shape[1] % 2 or k.shape[1] != q.shape[1]:
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys on one rank of {cp.name} are not two zig-zag chunks of each, as local_tokens gives"
        )
    return _WAYS[comm_type](q, k, v, cp, ops, rule, documents, dropout)


def causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ops: Ops,
    rule: AttentionRule = _PLAIN,
    documents: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of the last T of S consecutive tokens, q [B, T, A, D], to all of them, k and v [B, S, K, D]; documents [B, S]."""
    length, scores = k.shape[1], {"scale": rule.scale, "softcap": rule.softcap, "dropout": dropout}
    past, window = (
        length - q.shape[1],
        rule.window if rule.window is not None and rule.window < length else None,
    )
    if documents is None and window is None:
        return ops.attention(q, k, v, causal=True, **scores)
    places = torch.arange(length, device=q.device)
    mask = _sees(places[past:], places, window)
    if documents is not None:
        mask = mask & (documents[:, past:, None] == documents[:, None, :])
    return ops.attention(q, k, v, causal=False, mask=mask, **scores)


def _sees(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [1, T, S]: which keys at places [S] the queries at places [T] see."""
    distance = queries[None, :, None] - keys[None, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _by_ring(
    q, k, v, cp: Axis, ops: Ops, rule: AttentionRule, documents: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    other = "use --cp-comm-type allgather or a2a"
    if documents is not None:
        raise FlagError(
            f"--cp-comm-type p2p with --reset-attention-mask: the ring's blocks are whole or causal, never cut by documents; {other}"
        )
    if dropout > 0.0:
        flags = f"--cp-comm-type p2p with --attention-dropout {dropout}"
        raise FlagError(
            f"{flags}: the ring's backward cannot draw the masks of its forward again; {other}, or --attention-dropout 0"
        )
    return _Ring.apply(q, k, v, cp, ops, rule)


class _Ring(torch.autograd.Function):
    """Step i of n: attend to the keys and values of rank r - i while those of rank r - i - 1 arrive (Liu et al. 2023, section 3).

    Sums over the blocks, o forward, dq, dk and dv backward, are kept in fp32 (float64 of float64). Kept for the backward: this
    rank's own q, k, v, o and lse. The backward sends k and v round once more, and the sums of dk and dv after them, which so
    come to n hops and end on the rank that owns them. A block that no window reaches is sent on, and not computed.
    """

    @staticmethod
    def forward(ctx, q, k, v, cp, ops, rule):
        kv, o, lse = torch.stack((k, v)), None, None
        for step in range(cp.size):
            arriving = _start_hop(kv, cp) if step + 1 < cp.size else None
            source = (cp.rank - step) % cp.size
            rows, columns = _visible(cp.rank, source, q.shape[1])
            told = _told(rule, cp, source, rows, columns, q)
            if told is not None:
                block_o, block_lse = ops.attention_block(q[:, rows], *kv[:, :, columns], **told)
                if step == 0:
                    o, lse = block_o.to(block_lse.dtype), block_lse
                else:
                    ops.attention_merge_(o[:, rows], lse[:, :, rows], block_o, block_lse)
            kv = arriving() if arriving else None
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.cp, ctx.ops, ctx.rule = cp, ops, rule
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        (q, k, v, o, lse), cp, rule = ctx.saved_tensors, ctx.cp, ctx.rule
        do, kv = do.contiguous(), torch.stack((k, v))
        dq, summed = torch.zeros_like(q, dtype=lse.dtype), None
        for step in range(cp.size):
            arriving = _start_hop(kv, cp) if step + 1 < cp.size else None
            source = (cp.rank - step) % cp.size
            rows, columns = _visible(cp.rank, source, q.shape[1])
            told, block_dkv = _told(rule, cp, source, rows, columns, q), []
            if told is not None:
                block = (do[:, rows], q[:, rows], *kv[:, :, columns], o[:, rows], lse[:, :, rows])
                block_dq, *block_dkv = ctx.ops.attention_block_backward(*block, **told)
                dq[:, rows] += block_dq
            # What the ranks before this one found for these keys: on its way since their last step, during this one's work.
            dkv = summed() if summed else torch.zeros_like(kv, dtype=lse.dtype)
            for total, part in zip(
                dkv, block_dkv, strict=False
            ):  # nothing to add for a block that no query sees
                total[:, columns] += part
            summed = _start_hop(dkv, cp)
            kv = arriving() if arriving else None
        dk, dv = summed()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _told(
    rule: AttentionRule, cp: Axis, source: int, rows: slice, columns: slice, q: torch.Tensor
) -> dict | None:
    """What the ops are told of a block beside its tensors: the keys `columns` of rank `source`, the queries `rows` of q [B, T/cp, A, D] here.

    None where no query sees a key. A window is a mask only where its edge crosses the block.
    """
    told = {"causal": source == cp.rank, "scale": rule.scale, "softcap": rule.softcap}
    if rule.window is None:
        return told
    length = q.shape[1] * cp.size
    queries, keys = (
        token_positions(length, cp)[rows],
        token_positions(length, replace(cp, rank=source))[columns],
    )
    mask = _sees(
        queries, keys, rule.window
    )  # on the host: what it decides must not wait for a device
    if not mask.any():
        return None
    if torch.equal(mask, _sees(queries, keys, None)):
        return told
    return told | {"causal": False, "mask": mask.to(q.device, non_blocking=True)}


def _visible(rank: int, source: int, tokens: int) -> tuple[slice, slice]:
    """Which of a rank's queries see which keys of `source`, both [tokens]; on the diagonal, source == rank, causally.

    Of an earlier rank the first chunk lies before both of ours and the second after both; of a later rank both chunks lie between
    ours. So every other rank is half the work of a whole block, on every rank.
    """
    half, everything = tokens // 2, slice(None)
    if source == rank:
        return everything, everything
    return (everything, slice(half)) if source < rank else (slice(half, None), everything)


def _start_hop(outgoing: torch.Tensor, cp: Axis) -> Callable[[], torch.Tensor]:
    """Send a contiguous tensor to the next rank and receive the previous one's of the same shape; call what is returned for that.

    `outgoing` may be read in between, not written. Even ranks send first and odd ranks receive first: over NCCL messages wait in
    line, and a ring in which everyone's send is first in line never moves. Two ranks that are each other's both neighbours too.
    """
    incoming = torch.empty_like(outgoing)
    following, previous = (cp.rank + 1) % cp.size, (cp.rank - 1) % cp.size
    if cp.rank % 2 == 0:
        send = start_send(outgoing, cp, following)
        receive = start_receive(incoming, cp, previous)
    else:
        receive = start_receive(incoming, cp, previous)
        send = start_send(outgoing, cp, following)

    def wait() -> torch.Tensor:
        send.wait()
        return receive.wait()

    return wait


def _by_gathered_keys(
    q, k, v, cp: Axis, ops: Ops, rule: AttentionRule, documents: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Each of this rank's two chunks of queries sees the sequence up to its own end: two causal calls."""
    whole = _Gather.apply(torch.cat((k, v), dim=2), cp)
    keys, values = whole.split((k.shape[2], v.shape[2]), dim=2)
    outputs = []
    for queries, chunk in zip(q.chunk(2, dim=1), _chunks_of(cp), strict=True):
        end = (chunk + 1) * queries.shape[1]
        seen = None if documents is None else documents[:, :end]
        outputs.append(causal(queries, keys[:, :end], values[:, :end], ops, rule, seen, dropout))
    return torch.cat(outputs, dim=1)


class _Gather(torch.autograd.Function):
    """[B, T/cp, ...] of zig-zag tokens -> [B, T, ...] in order. The gradient is summed over the ranks and cut again.

    It is summed in fp32: in bf16 each of the n - 1 additions would round, in an order that is the transport's affair. Costs twice the
    bytes of the forward; the ring's sums of dk and dv are fp32 as well.
    """

    @staticmethod
    def forward(ctx, x, cp):
        ctx.cp = cp
        parts = x.new_empty(cp.size, *x.shape)
        parts[cp.rank] = x
        return _in_order(start_all_gather(parts, cp).wait())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wide = torch.promote_types(grad.dtype, torch.float32)
        parts = _zigzag(grad.to(wide), ctx.cp)
        return start_reduce_scatter(parts, ctx.cp).wait()[0].to(grad.dtype), None


def _by_exchanged_heads(
    q, k, v, cp: Axis, ops: Ops, rule: AttentionRule, documents: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """All tokens of A/cp query heads, and of their key-value heads: each repeated until cp divides their number.

    That number, the least common multiple of K and cp, divides A too, so the repeated heads group as the others do.
    """
    n, heads, kv_heads = cp.size, q.shape[2], k.shape[2]
    if heads % n:
        raise FlagError(
            f"--cp-comm-type a2a: {heads} attention heads on a tensor-parallel rank cannot be cut over --context-parallel-size {n}; "
            f"use a context-parallel size that divides {heads}, or --cp-comm-type p2p or allgather"
        )
    k, v = (_repeated(t, n // gcd(kv_heads, n)) for t in (k, v))
    to_send = torch.cat(
        [t.unflatten(2, (n, -1)) for t in (q, k, v)], dim=3
    )  # one message: q, k and v heads for each rank
    whole = _Exchange.apply(to_send, cp, _to_heads, _to_tokens)
    q, k, v = whole.split([t.shape[2] // n for t in (q, k, v)], dim=2)
    o = causal(q, k, v, ops, rule, documents, dropout)
    return _Exchange.apply(o, cp, _to_tokens, _to_heads).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """`there` forward, `back` backward: a permutation of elements over ranks, whose transpose is its inverse."""

    @staticmethod
    def forward(ctx, x, cp, there, back):
        ctx.cp, ctx.back = cp, back
        return there(x, cp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.back(grad, ctx.cp), None, None, None


def _to_heads(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """[B, T/cp, cp, h, D] of zig-zag tokens and the heads for each rank -> [B, T, h, D], this rank's heads of all tokens in order."""
    return _in_order(all_to_all(x.movedim(2, 0), cp))


def _to_tokens(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """The inverse of _to_heads."""
    return all_to_all(_zigzag(x, cp), cp).movedim(0, 2)


def _in_order(parts: torch.Tensor) -> torch.Tensor:
    """[cp, B, T/cp, ...], the zig-zag tokens of each rank -> [B, T, ...]."""
    early, late = parts.chunk(2, dim=2)
    return torch.cat((early, late.flip(0))).transpose(0, 1).flatten(1, 2)


def _zigzag(x: torch.Tensor, cp: Axis) -> torch.Tensor:
    """The inverse of _in_order."""
    early, late = x.unflatten(1, (2 * cp.size, -1)).transpose(0, 1).chunk(2)
    return torch.cat((early, late.flip(0)), dim=2)


def _chunks_of(cp: Axis) -> tuple[int, int]:
    """Which two of the sequence's 2 x cp chunks this rank holds."""
    return cp.rank, 2 * cp.size - 1 - cp.rank


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """Each head of x [B, T, K, D] `times` over, side by side. Expanded, so that the gradient is one sum, rounded once."""
    return x.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


_WAYS = {"p2p": _by_ring, "allgather": _by_gathered_keys, "a2a": _by_exchanged_heads}
