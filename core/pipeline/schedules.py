"""The pipeline schedules: the order in which one rank computes. Messages are added by plan.py.

Letters: p ranks, r this rank, m micro-batches, v chunks on each rank; F forward, B input gradient,
W weight gradient. A chunk's micro-batches are always taken in the order 0, 1, ..., m - 1.
"""

from collections import defaultdict
from collections.abc import Sequence

from .actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from .placement import Placement


def compute_order(placement: Placement, rank: int, m: int) -> list[Compute]:
    """Return the compute actions of one rank for one step of m micro-batches, in order."""
    p = placement.num_ranks
    match placement.schedule:
        case "gpipe":
            return gpipe(m)
        case "1f1b":
            return one_forward_one_backward(rank, p, m)
        case "interleaved":
            return interleaved(rank, p, m, placement.num_chunks)
        case "zb-h1":
            return zb_h1(rank, p, m)
        case "zb-v":
            return zb_v(rank, p, m)
    raise ValueError(f"there is no order of computation for the schedule {placement.schedule}")


def gpipe(m: int) -> list[Compute]:
    """Run all forwards, then all backwards (Huang et al. 2019, section 2.2).

    Holds m activations.
    """
    forwards = [Forward(0, i) for i in range(m)]
    backwards = [Backward(0, i) for i in range(m)]
    return [*forwards, *backwards]


def one_forward_one_backward(r: int, p: int, m: int) -> list[Compute]:
    """Run one forward and one backward in turn (1F1B; Narayanan et al. 2021, section 2.2.1).

    1. Warm up: p - 1 - r forwards. Micro-batch 0 needs as many steps to the last stage.
    2. Alternate: one forward, one backward.
    3. Drain: the p - 1 - r backwards that are left.

    Holds at most p - r activations, whatever m is.
    """
    forwards = [Forward(0, i) for i in range(m)]
    backwards = [Backward(0, i) for i in range(m)]
    return _alternate(forwards, backwards, warmup=p - 1 - r)


def interleaved(r: int, p: int, m: int, v: int) -> list[Compute]:
    """Run 1F1B whose chunks take turns (Narayanan et al. 2021, section 2.2.2).

    The micro-batches are cut into groups. Forwards go through a group with chunk 0, then with
    chunk 1, ... chunk v - 1, then through the next group; backwards do so with the last chunk
    first. Both lists are then merged as in 1F1B:

    1. Warm up: (v - 1) * (size of the first group) + 2 * (p - 1 - r) forwards.
    2. Alternate: one forward, one backward.
    3. Drain: as many backwards as there were forwards in the warm-up.

    Groups have p micro-batches where p divides m, as in Megatron. Elsewhere they have a few more,
    and never fewer while m >= p: what a chunk sends off comes back for the next chunk p
    micro-batches later, and after a shorter turn the rank would wait for it. The larger groups
    come first, so that no backward is due before its own forward.

    Holds at most ((v - 1) * (size of the largest group) + 2p - 1) / v micro-batches.
    """
    num_groups = max(1, m // p)
    sizes = [m // num_groups + (i < m % num_groups) for i in range(num_groups)]
    forwards: list[Compute] = []
    backwards: list[Compute] = []
    start = 0
    for size in sizes:
        group = range(start, start + size)
        for chunk in range(v):
            forwards += [Forward(chunk, i) for i in group]
        for chunk in reversed(range(v)):
            backwards += [Backward(chunk, i) for i in group]
        start += size
    return _alternate(forwards, backwards, warmup=(v - 1) * sizes[0] + 2 * (p - 1 - r))


def zb_h1(r: int, p: int, m: int) -> list[Compute]:
    """Run 1F1B with W split off and r micro-batches late (ZB-H1; Qi et al. 2023, section 2.1).

    Only B is on the way between the stages. W can be computed at any time, so a rank holds r of
    them back and fills the drain with them, where 1F1B waits for gradients:

    1. Warm up: p - 1 - r forwards.
    2. Alternate: F and B of 1F1B, at first without W, r times.
    3. Alternate: F, B(i) and W(i - r).
    4. Drain: B(i) and W(i - r) in turn.
    5. The last r W.

    Holds at most p activations.
    """
    order: list[Compute] = []
    for action in one_forward_one_backward(r, p, m):
        if isinstance(action, Forward):
            order.append(action)
            continue
        i = action.microbatch
        order.append(BackwardInput(0, i))
        if i >= r:
            order.append(BackwardWeight(0, i - r))
    left = range(max(0, m - r), m)
    return order + [BackwardWeight(0, i) for i in left]


def zb_v(r: int, p: int, m: int) -> list[Compute]:
    """Run chunk 0 down the ranks, chunk 1 up again, W split off (ZB-V; Qi et al. 2023, section 6).

    Rank 0 has the first and the last stage, so backwards start where forwards end, and every rank
    holds equally much: at most p micro-batches.

    The pattern is made of M = max(m, 2p - 1) micro-batches; those from m on are left out of it.
    """
    f0, f1 = (Forward, 0), (Forward, 1)
    b0, b1 = (BackwardInput, 0), (BackwardInput, 1)
    w0, w1 = (BackwardWeight, 0), (BackwardWeight, 1)
    steady = max(m, 2 * p - 1) - (2 * p - 1) + r
    pattern = [
        # 1. Fill: micro-batch 0 comes back as input of chunk 1 after it has gone down p - 1 - r
        #    ranks and up as many. Until then: 2(p - 1 - r) + 1 forwards of chunk 0.
        *[f0] * (2 * (p - r) - 1),
        # 2. Chunk 1 has inputs, its gradients are still on their way from rank 0, r ranks up:
        #    r forwards of each chunk. Chunk 0 has now done 2p - 1 - r.
        *[f1, f0] * r,
        # 3. Chunk 1 has gradients, chunk 0 has not: they come after p - r micro-batches, once down
        #    to the last rank and back. No forward of chunk 0, or more than p would be held.
        *[f1, b1, w1] * (p - r),
        # 4. Steady state, all six of a micro-batch: until chunk 0 has done M forwards, which are
        #    M - (2p - 1 - r) more.
        *[f0, b0, w0, f1, b1, w1] * steady,
        # 5. Chunk 0 has no forward left. Chunk 1 has: M - r - (p - r) - steady = p - 1 - r.
        *[b0, w0, f1, b1, w1] * (p - 1 - r),
        # 6. No forward is left. The other ranks wait for B: r of each chunk, W held back.
        *[b0, b1] * r,
        # 7. Chunk 1 has no B left. Chunk 0 has: M - steady - (p - 1 - r) - r = p - r.
        *[b0, w0] * (p - r),
        # 8. The W that step 6 held back: r of each chunk, while others still compute.
        *[w1] * r,
        *[w0] * r,
    ]
    return _numbered(pattern, m)


def _alternate(
    forwards: Sequence[Compute], backwards: Sequence[Compute], warmup: int
) -> list[Compute]:
    """Merge as 1F1B does: warm up, then one forward and one backward in turn, then drain."""
    order = list(forwards[:warmup])
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    num_paired = max(0, len(forwards) - warmup)
    return [*order, *backwards[num_paired:]]


def _numbered(pattern: list[tuple[type[Compute], int]], m: int) -> list[Compute]:
    """Number the micro-batches of each (kind, chunk) of the pattern: 0, 1, ... m - 1, no more."""
    done: dict[tuple[type[Compute], int], int] = defaultdict(int)
    order: list[Compute] = []
    for kind, chunk in pattern:
        i = done[kind, chunk]
        if i < m:
            order.append(kind(chunk, i))
        done[kind, chunk] += 1
    return order
