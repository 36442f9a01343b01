"""Context parallelism: a sequence's tokens cut over ranks, and causal attention across the cuts.

Causal attention gives late tokens more work than early ones. Hence zig-zag: with n ranks the
sequence is cut into 2n chunks, and rank r holds the r-th from the front and the r-th from the back.
With n = 2 and chunks 0 1 2 3, rank 0 holds 0 and 3, rank 1 holds 1 and 2: T/n tokens each, with the
same number of visible keys (Llama 3, Dubey et al. 2024, section 3.3.2; Brandon et al. 2023 balance
by striping single tokens instead).

There are three ways, by the words of Megatron's --cp-comm-type. Each rank starts with T/n tokens of
A query heads and K key-value heads.

p2p        keys and values travel round a ring while each rank computes (Liu et al. 2023).
           Memory T/n; any number of heads; no documents, no dropout.
allgather  every rank holds all keys and values of a layer (Dubey et al. 2024).
           Memory T for 2K heads; any mask, dropout.
a2a        heads are exchanged for tokens and back (Ulysses: Jacobs et al. 2023).
           A multiple of n heads; any mask, dropout.
"""

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm import all_to_all, start_all_gather, start_receive, start_reduce_scatter, start_send
from ..config import FlagError
from ..mesh import Axis
from ..ops import AttentionRule, Ops

_PLAIN = AttentionRule()
_EVERYTHING = slice(None)


def token_positions(seq_length: int, cp: Axis, device: torch.device | None = None) -> Tensor:
    """Return the places in the sequence of the tokens that this rank holds: int64 [T/cp].

    They are in the order in which it holds them.
    Raises FlagError where the sequence cannot be cut into two chunks a rank.
    """
    if cp.size == 1:
        return torch.arange(seq_length, device=device)
    chunks = 2 * cp.size
    if seq_length % chunks:
        below = seq_length // chunks * chunks
        near = ", ".join(str(length) for length in (below, below + chunks) if length)
        raise FlagError(
            f"--seq-length {seq_length} is not a multiple of "
            f"2 x --context-parallel-size {cp.size} = {chunks}; nearest that work: {near}"
        )
    whole = torch.arange(seq_length, device=device).view(chunks, -1)
    return torch.cat([whole[chunk] for chunk in _chunks_of(cp)])


def local_tokens(x: Tensor, cp: Axis) -> Tensor:
    """Return this rank's tokens of x [B, T, ...]: [B, T/cp, ...], as token_positions has them."""
    if cp.size == 1:
        return x
    return x[:, token_positions(x.shape[1], cp, x.device)]


class _Mixing(NamedTuple):
    """The values that every way of attending over cp takes beside q, k, v: see `attention`."""

    cp: Axis
    ops: Ops
    rule: AttentionRule
    documents: Tensor | None
    dropout: float

    def causal(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """Attend from the last tokens of a sequence to all of it, on this rank alone."""
        return causal(q, k, v, self.ops, self.rule, documents, self.dropout)


@torch.compiler.disable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: Axis,
    comm_type: str,
    ops: Ops,
    rule: AttentionRule = _PLAIN,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend causally over the whole sequence: [B, T/cp, A, D] of this rank's zig-zag tokens.

    Every rank of `cp` must call this, forward and backward.

    q: [B, T/cp, A, D].
    k, v: [B, T/cp, K, D].
    comm_type: p2p, allgather or a2a.
    rule: what else is done to the scores.
    documents: int [B, T] of the whole sequence, equal on all ranks; a token sees only tokens of its
        own document.
    dropout: of the attention weights. Its masks come from torch's generator, so they depend on the
        layout; they are independent between ranks only if the generators are.
    Raises FlagError, naming flags and remedy, on what comm_type cannot do.
    """
    if comm_type not in _WAYS:
        raise FlagError(f"--cp-comm-type {comm_type} is not one of {', '.join(_WAYS)}")
    if cp.size == 1:
        return causal(q, k, v, ops, rule, documents, dropout)
    if q.shape[1] % 2 or k.shape[1] != q.shape[1]:
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys on one rank of {cp.name} are not "
            "two zig-zag chunks of each, as local_tokens gives"
        )
    return _WAYS[comm_type](q, k, v, _Mixing(cp, ops, rule, documents, dropout))


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ops: Ops,
    rule: AttentionRule = _PLAIN,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from the last T of S consecutive tokens to all of them: [B, T, A, D].

    q: [B, T, A, D].
    k, v: [B, S, K, D].
    documents: int [B, S].
    """
    length = k.shape[1]
    past = length - q.shape[1]
    window = rule.window
    # A window that reaches the first token hides nothing; without a mask flash attention serves.
    if window is not None and window >= length:
        window = None
    mask = None
    if documents is not None or window is not None:
        places = torch.arange(length, device=q.device)
        mask = _sees(places[past:], places, window)
        if documents is not None:
            mask = mask & (documents[:, past:, None] == documents[:, None, :])
    return ops.attention(
        q,
        k,
        v,
        causal=mask is None,
        mask=mask,
        dropout=dropout,
        scale=rule.scale,
        softcap=rule.softcap,
    )


def _sees(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return which keys at places [S] the queries at places [T] see: bool [1, T, S]."""
    distance = queries[None, :, None] - keys[None, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


# --- p2p: the ring ---


def _by_ring(q: Tensor, k: Tensor, v: Tensor, mixing: _Mixing) -> Tensor:
    """Attend to each rank's keys as they come by."""
    other = "use --cp-comm-type allgather or a2a"
    if mixing.documents is not None:
        raise FlagError(
            "--cp-comm-type p2p with --reset-attention-mask: "
            f"the ring's blocks are whole or causal, never cut by documents; {other}"
        )
    if mixing.dropout > 0.0:
        raise FlagError(
            f"--cp-comm-type p2p with --attention-dropout {mixing.dropout}: the ring's backward "
            f"cannot draw the masks of its forward again; {other}, or --attention-dropout 0"
        )
    return _Ring.apply(q, k, v, mixing.cp, mixing.ops, mixing.rule)


class _Ring(torch.autograd.Function):
    """Attention round a ring (Liu et al. 2023, section 3).

    In step i of n, rank r attends to the keys and values of rank r - i while those of rank
    r - i - 1 arrive. A block that no query of this rank sees is sent on and not computed.

    Kept for the backward: this rank's own q, k, v, o and lse. The backward sends k and v round
    once more, and the sums of dk and dv after them, which so come to n hops and end on the rank
    that owns them. Sums over the blocks, o forward, dq, dk and dv backward, are fp32 (float64 of
    float64).
    """

    @staticmethod
    def forward(ctx, q, k, v, cp, ops, rule):
        # One message a hop instead of two.
        kv = torch.stack((k, v))
        o = lse = None
        for step in range(cp.size):
            # Phase 1: the next rank's keys set out before this step's work begins.
            arriving = _start_hop(kv, cp) if step + 1 < cp.size else None
            # Phase 2: this step's block, with o and lse of its own.
            block = _block_of(cp, step, q, rule)
            if block.rule is not None:
                keys, values = kv[:, :, block.columns]
                found = ops.attention_block(q[:, block.rows], keys, values, **block.rule)
                # Phase 3: merged into o and lse. Step 0 is a rank's own block, and all of it.
                if step == 0:
                    o, lse = found[0].to(found[1].dtype), found[1]
                else:
                    ops.attention_merge_(o[:, block.rows], lse[:, :, block.rows], *found)
            kv = arriving() if arriving else None
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.cp = cp
        ctx.ops = ops
        ctx.rule = rule
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        cp = ctx.cp
        do = do.contiguous()
        kv = torch.stack((k, v))
        dq = torch.zeros_like(q, dtype=lse.dtype)
        summed = None
        for step in range(cp.size):
            # Phase 1: the next rank's keys set out.
            arriving = _start_hop(kv, cp) if step + 1 < cp.size else None
            # Phase 2: this step's block, from the merged o and lse.
            block = _block_of(cp, step, q, ctx.rule)
            block_dk = block_dv = None
            if block.rule is not None:
                rows = block.rows
                keys, values = kv[:, :, block.columns]
                of_queries = (o[:, rows], lse[:, :, rows])
                block_dq, block_dk, block_dv = ctx.ops.attention_block_backward(
                    do[:, rows], q[:, rows], keys, values, *of_queries, **block.rule
                )
                dq[:, rows] += block_dq
            # Phase 3: the sums for these keys from the ranks before this one. They have been under
            # way since those ranks' last step, during this one's work.
            dkv = summed() if summed else torch.zeros_like(kv, dtype=lse.dtype)
            if block_dk is not None:
                dkv[0][:, block.columns] += block_dk
                dkv[1][:, block.columns] += block_dv
            summed = _start_hop(dkv, cp)
            kv = arriving() if arriving else None
        dk, dv = summed()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _Block(NamedTuple):
    """One step's share of the attention of a rank.

    rows: which of this rank's queries take part.
    columns: which of the source's keys.
    rule: what attention_block is told beside the tensors; None where no query sees a key.
    """

    rows: slice
    columns: slice
    rule: dict | None


def _block_of(cp: Axis, step: int, q: Tensor, rule: AttentionRule) -> _Block:
    """Return the block of one step of the ring, for queries q [B, T/cp, A, D]."""
    source = (cp.rank - step) % cp.size
    rows, columns = _visible(cp.rank, source, q.shape[1])
    return _Block(rows, columns, _told(rule, cp, source, rows, columns, q))


def _told(
    rule: AttentionRule, cp: Axis, source: int, rows: slice, columns: slice, q: Tensor
) -> dict | None:
    """Return the arguments of attention_block that are no tensors of the block.

    The block is the queries `rows` of this rank and the keys `columns` of rank `source`. None where
    no query sees a key. A window is a mask only where its edge crosses the block.
    """
    told = {"causal": source == cp.rank, "scale": rule.scale, "softcap": rule.softcap}
    if rule.window is None:
        return told
    length = q.shape[1] * cp.size
    queries = token_positions(length, cp)[rows]
    keys = token_positions(length, replace(cp, rank=source))[columns]
    # On the host: what the mask decides must not wait for a device.
    mask = _sees(queries, keys, rule.window)
    if not mask.any():
        return None
    if torch.equal(mask, _sees(queries, keys, None)):
        return told
    return told | {"causal": False, "mask": mask.to(q.device, non_blocking=True)}


def _visible(rank: int, source: int, tokens: int) -> tuple[slice, slice]:
    """Return which of a rank's queries see which keys of `source`, both of [tokens].

    On the diagonal, source == rank, they see them causally. Of an earlier rank the first chunk lies
    before both of ours and the second after both; of a later rank both chunks lie between ours. So
    every other rank is half the work of a whole block, on every rank.
    """
    half = tokens // 2
    if source == rank:
        return _EVERYTHING, _EVERYTHING
    return (_EVERYTHING, slice(half)) if source < rank else (slice(half, None), _EVERYTHING)


def _start_hop(outgoing: Tensor, cp: Axis) -> Callable[[], Tensor]:
    """Send a contiguous tensor to the next rank and receive one like it from the previous rank.

    Call what is returned for the tensor received. Until then `outgoing` may be read, not written.

    Even ranks send first and odd ranks receive first. Over NCCL messages wait in line, and a ring
    in which everyone's send is first in line never moves; the same holds for two ranks that are
    each other's next and previous.
    """
    incoming = torch.empty_like(outgoing)
    following = (cp.rank + 1) % cp.size
    previous = (cp.rank - 1) % cp.size
    if cp.rank % 2 == 0:
        send = start_send(outgoing, cp, following)
        receive = start_receive(incoming, cp, previous)
    else:
        receive = start_receive(incoming, cp, previous)
        send = start_send(outgoing, cp, following)

    def wait() -> Tensor:
        send.wait()
        return receive.wait()

    return wait


# --- allgather ---


def _by_gathered_keys(q: Tensor, k: Tensor, v: Tensor, mixing: _Mixing) -> Tensor:
    """Gather all keys and values, then make two causal calls.

    Each of this rank's two chunks of queries sees the sequence up to its own end.
    """
    cp = mixing.cp
    # k and v as one tensor: one collective forward and one backward.
    whole = _Gather.apply(torch.cat((k, v), dim=2), cp)
    keys, values = whole.split((k.shape[2], v.shape[2]), dim=2)
    outputs = []
    for queries, chunk in zip(q.chunk(2, dim=1), _chunks_of(cp), strict=True):
        end = (chunk + 1) * queries.shape[1]
        seen = None if mixing.documents is None else mixing.documents[:, :end]
        outputs.append(mixing.causal(queries, keys[:, :end], values[:, :end], seen))
    return torch.cat(outputs, dim=1)


class _Gather(torch.autograd.Function):
    """[B, T/cp, ...] of zig-zag tokens -> [B, T, ...] in order.

    The gradient is summed over the ranks and cut again. The sum is in fp32: in bf16 each of the
    n - 1 additions would round, in an order that is the transport's affair. It costs twice the
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
        own = start_reduce_scatter(parts, ctx.cp).wait()[0]
        return own.to(grad.dtype), None


# --- a2a: heads for tokens ---


def _by_exchanged_heads(q: Tensor, k: Tensor, v: Tensor, mixing: _Mixing) -> Tensor:
    """Exchange heads for tokens: all tokens of A/cp query heads, and of their key-value heads.

    Key-value heads are repeated until cp divides their number. That number, the least common
    multiple of K and cp, divides A too, so the repeated heads group as the others do.
    """
    cp = mixing.cp
    n = cp.size
    heads = q.shape[2]
    if heads % n:
        raise FlagError(
            f"--cp-comm-type a2a: {heads} attention heads on a tensor-parallel rank "
            f"cannot be cut over --context-parallel-size {n}; use a context-parallel size that "
            f"divides {heads}, or --cp-comm-type p2p or allgather"
        )
    times = n // gcd(k.shape[2], n)
    k = _repeated(k, times)
    v = _repeated(v, times)
    # One message: the q, k and v heads for each rank, side by side.
    to_send = torch.cat([t.unflatten(2, (n, -1)) for t in (q, k, v)], dim=3)
    whole = _Exchange.apply(to_send, cp, _to_heads, _to_tokens)
    q, k, v = whole.split([t.shape[2] // n for t in (q, k, v)], dim=2)
    o = mixing.causal(q, k, v, mixing.documents)
    return _Exchange.apply(o, cp, _to_tokens, _to_heads).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """`there` forward, `back` backward.

    Both permute elements over ranks, and the transpose of a permutation is its inverse.
    """

    @staticmethod
    def forward(ctx, x, cp, there, back):
        ctx.cp = cp
        ctx.back = back
        return there(x, cp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.back(grad, ctx.cp), None, None, None


def _to_heads(x: Tensor, cp: Axis) -> Tensor:
    """[B, T/cp, cp, h, D] -> [B, T, h, D].

    From zig-zag tokens with the heads for each rank to this rank's heads of all tokens, in order.
    """
    return _in_order(all_to_all(x.movedim(2, 0), cp))


def _to_tokens(x: Tensor, cp: Axis) -> Tensor:
    """Invert _to_heads."""
    return all_to_all(_zigzag(x, cp), cp).movedim(0, 2)


def _in_order(parts: Tensor) -> Tensor:
    """[cp, B, T/cp, ...], the zig-zag tokens of each rank -> [B, T, ...]."""
    early, late = parts.chunk(2, dim=2)
    return torch.cat((early, late.flip(0))).transpose(0, 1).flatten(1, 2)


def _zigzag(x: Tensor, cp: Axis) -> Tensor:
    """Invert _in_order."""
    chunks = x.unflatten(1, (2 * cp.size, -1)).transpose(0, 1)
    early, late = chunks.chunk(2)
    return torch.cat((early, late.flip(0)), dim=2)


def _chunks_of(cp: Axis) -> tuple[int, int]:
    """Return which two of the sequence's 2 x cp chunks this rank holds."""
    return cp.rank, 2 * cp.size - 1 - cp.rank


def _repeated(x: Tensor, times: int) -> Tensor:
    """Return each head of x [B, T, K, D] `times` over, side by side.

    Expanded, so that the gradient is one sum, rounded once.
    """
    return x.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


_WAYS: dict[str, Callable[..., Tensor]] = {
    "p2p": _by_ring,
    "allgather": _by_gathered_keys,
    "a2a": _by_exchanged_heads,
}
