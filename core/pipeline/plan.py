"""Owns the pipeline schedules as data: what each rank computes, sends and receives, in which order."""

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass
from math import inf

from ..config import PIPELINE_SCHEDULES


@dataclass(frozen=True, slots=True)
class Compute:
    """Work of one of the rank's model chunks (0 to v - 1) on one micro-batch."""

    chunk: int
    microbatch: int


class Forward(Compute):
    pass


class Backward(Compute):
    """Input and weight gradients together."""


class BackwardInput(Compute):
    pass


class BackwardWeight(Compute):
    pass


@dataclass(frozen=True, slots=True)
class Message:
    """A transfer between this rank's `chunk` and the neighbour stage, on pipeline rank `peer`.

    Sends are asynchronous. Receives are only posted; the compute action that needs one waits for it.
    """

    chunk: int
    microbatch: int
    peer: int


class SendActivation(Message):
    """Of the output of `chunk`."""


class ReceiveActivation(Message):
    """Of the input of `chunk`."""


class SendGradient(Message):
    """Of the gradient of the input of `chunk`."""


class ReceiveGradient(Message):
    """Of the gradient of the output of `chunk`."""


Action = Compute | Message


@dataclass(frozen=True)
class Costs:
    """Time of one micro-batch through all layers of a rank, in any one unit; a chunk takes 1/v of it, a whole Backward the sum of both parts.

    Every rank must plan from the same numbers: lists made from different costs do not fit together.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    transfer: float = 0.0  # of one message
    stages: tuple[
        float, ...
    ] = ()  # what each stage takes relative to the others; empty where all take the same

    def of(self, kind: type[Compute], stage: int) -> float:
        """Of one action of a stage, times v: whole numbers stay exact."""
        times = {
            Forward: self.forward,
            Backward: self.backward_input + self.backward_weight,
            BackwardInput: self.backward_input,
            BackwardWeight: self.backward_weight,
        }
        return times[kind] * (self.stages[stage] if self.stages else 1.0)


UNIT_COSTS = Costs()


@dataclass(frozen=True)
class Placement:
    """Which stage each chunk of each rank is: in rounds over the ranks, or down the ranks and up again (zb-v)."""

    schedule: str
    num_ranks: int
    num_chunks: int

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks

    def stage(self, rank: int, chunk: int) -> int:
        if self.schedule == "zb-v" and chunk == 1:
            return 2 * self.num_ranks - 1 - rank
        return chunk * self.num_ranks + rank

    def rank_and_chunk(self, stage: int) -> tuple[int, int]:
        """(rank, chunk) of a stage."""
        chunk, rank = divmod(stage, self.num_ranks)
        if self.schedule == "zb-v" and chunk == 1:
            rank = self.num_ranks - 1 - rank
        return rank, chunk


@dataclass(frozen=True)
class Plan(Placement):
    """Each rank's list of actions. Stages that follow each other on one rank exchange no messages."""

    num_microbatches: int
    forward_only: bool
    actions: tuple[tuple[Action, ...], ...]  # by pipeline rank


def make_plan(
    schedule: str,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 1,
    costs: Costs = UNIT_COSTS,
    *,
    forward_only: bool = False,
) -> Plan:
    """The plan of one step for every rank; forwards alone, over the same stages, when `forward_only`.

    Raises ValueError where the schedule does not exist or cannot be cut this way.
    """
    _check(schedule, num_ranks, num_microbatches, num_chunks, costs)
    placement = Placement(schedule, num_ranks, num_chunks)
    orders = [_order(placement, rank, num_microbatches) for rank in range(num_ranks)]
    if forward_only:
        orders = [[action for action in order if type(action) is Forward] for order in orders]
    execution = _execute(placement, orders, costs)
    if schedule == "zb-v" and not forward_only:
        execution = _better(execution, _execute(placement, orders, costs, fill=True))
    return Plan(
        schedule,
        num_ranks,
        num_chunks,
        num_microbatches,
        forward_only,
        _with_messages(placement, execution),
    )


def _check(
    schedule: str, num_ranks: int, num_microbatches: int, num_chunks: int, costs: Costs
) -> None:
    if schedule not in PIPELINE_SCHEDULES:
        raise ValueError(
            f"there is no pipeline schedule {schedule!r}; there are {', '.join(PIPELINE_SCHEDULES)}"
        )
    for name, count in (
        ("ranks", num_ranks),
        ("micro-batches", num_microbatches),
        ("chunks", num_chunks),
    ):
        if count < 1:
            raise ValueError(f"a pipeline needs at least 1 of its {name}, not {count}")
    if schedule == "interleaved" and num_chunks == 1:
        raise ValueError("interleaved has at least 2 chunks a rank, not 1; use 1f1b")
    wanted = {"interleaved": num_chunks, "zb-v": 2}.get(schedule, 1)
    if num_chunks != wanted:
        raise ValueError(
            f"{schedule} has {wanted} chunk{'s' * (wanted > 1)} a rank, not {num_chunks}{'; use interleaved' * (wanted == 1)}"
        )
    if not (
        all(
            0 < cost < inf
            for cost in (costs.forward, costs.backward_input, costs.backward_weight, *costs.stages)
        )
        and 0 <= costs.transfer < inf
    ):
        raise ValueError(
            f"a pipeline is planned from times above 0 and transfers of 0 or more, all finite, not from {costs}"
        )
    if costs.stages and len(costs.stages) != num_ranks * num_chunks:
        raise ValueError(
            f"costs of {len(costs.stages)} stages for {num_ranks} ranks x {num_chunks} chunks = {num_ranks * num_chunks} stages"
        )


# The schedules: what one rank computes, in order. p ranks, m micro-batches, v chunks.


def _order(placement: Placement, rank: int, m: int) -> list[Compute]:
    p, v = placement.num_ranks, placement.num_chunks
    match placement.schedule:
        case "gpipe":
            return _gpipe(m)
        case "1f1b":
            return _one_forward_one_backward(rank, p, m)
        case "interleaved":
            return _interleaved(rank, p, m, v)
        case "zb-h1":
            return _zb_h1(rank, p, m)
        case _:
            return _zb_v(rank, p, m)


def _gpipe(m: int) -> list[Compute]:
    """All forwards, then all backwards (Huang et al. 2019, section 2.2). Holds m activations."""
    return [Forward(0, i) for i in range(m)] + [Backward(0, i) for i in range(m)]


def _one_forward_one_backward(rank: int, p: int, m: int) -> list[Compute]:
    """Warm up, alternate, drain (Narayanan et al. 2021, section 2.2.1). Holds at most `p - rank` activations."""
    return _alternate(
        [Forward(0, i) for i in range(m)], [Backward(0, i) for i in range(m)], warmup=p - 1 - rank
    )


def _interleaved(rank: int, p: int, m: int, v: int) -> list[Compute]:
    """1F1B whose chunks take turns, a group of micro-batches each time (Narayanan et al. 2021, section 2.2.2).

    Groups of p where p divides m, as in Megatron. Elsewhere of a few more, and never fewer while m >= p: what a chunk sends off comes back
    for the next chunk p micro-batches later, and after a shorter turn the rank would wait for it. The larger groups come first, so that no
    backward is due before its own forward. Holds at most ((v-1) * largest group + 2p - 1) / v micro-batches.
    """
    rounds = max(1, m // p)
    sizes = [m // rounds + (i < m % rounds) for i in range(rounds)]
    forwards, backwards, start = [], [], 0
    for size in sizes:
        group = range(start, start + size)
        forwards += [Forward(chunk, i) for chunk in range(v) for i in group]
        backwards += [Backward(chunk, i) for chunk in reversed(range(v)) for i in group]
        start += size
    return _alternate(forwards, backwards, warmup=(v - 1) * sizes[0] + 2 * (p - 1 - rank))


def _zb_h1(rank: int, p: int, m: int) -> list[Compute]:
    """1F1B with W split off, and `rank` backwards late to fill the drain (Qi et al. 2023, section 2.1). Holds at most p activations."""
    order = []
    for action in _one_forward_one_backward(rank, p, m):
        i = action.microbatch
        if type(action) is Forward:
            order.append(action)
        else:
            order += [BackwardInput(0, i)] + [BackwardWeight(0, i - rank)] * (i >= rank)
    return order + [BackwardWeight(0, i) for i in range(max(0, m - rank), m)]


def _zb_v(rank: int, p: int, m: int) -> list[Compute]:
    """Chunk 0 down the ranks, chunk 1 up again, W split off (ZB-V of Qi et al. 2023, section 6). Holds at most p micro-batches.

    The pattern is made of 2p - 1 micro-batches or more; with fewer, those beyond m are left out of it.
    """
    f0, b0, w0 = (Forward, 0), (BackwardInput, 0), (BackwardWeight, 0)
    f1, b1, w1 = (Forward, 1), (BackwardInput, 1), (BackwardWeight, 1)
    pattern = (
        [f0] * (2 * (p - rank) - 1)
        + [f1, f0] * rank
        + [f1, b1, w1] * (p - rank)
        + [f0, b0, w0, f1, b1, w1] * (max(m, 2 * p - 1) - 2 * p + 1 + rank)
        + [b0, w0, f1, b1, w1] * (p - 1 - rank)
        + [b0, b1] * rank
        + [b0, w0] * (p - rank)
        + [w1] * rank
        + [w0] * rank
    )
    return _numbered(pattern, m)


def _alternate(forwards: list[Compute], backwards: list[Compute], warmup: int) -> list[Compute]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    order = forwards[:warmup]
    for pair in zip(forwards[warmup:], backwards, strict=False):
        order += pair
    return order + backwards[max(0, len(forwards) - warmup) :]


def _numbered(pattern: list[tuple[type[Compute], int]], m: int) -> list[Compute]:
    """Micro-batch 0, 1, ... for each (kind, chunk) of the pattern; those from m on are left out."""
    done = defaultdict(int)
    order = []
    for kind, chunk in pattern:
        if done[kind, chunk] < m:
            order.append(kind(chunk, done[kind, chunk]))
        done[kind, chunk] += 1
    return order


# Times: when everything runs, v times too long as in Costs.of.

Execution = list[
    tuple[float, float, int, Compute]
]  # (start, end, rank, action), in the order of the starts
Edge = tuple[
    bool, int, int
]  # what a stage is given: (forward or backward, that stage, micro-batch)


def _input(action: Compute, stage: int, num_stages: int) -> Edge | None:
    """What the stage's action needs from its neighbour."""
    forward = type(action) is Forward
    if type(action) is BackwardWeight or stage == (0 if forward else num_stages - 1):
        return None
    return forward, stage, action.microbatch


def _output(action: Compute, stage: int, num_stages: int) -> Edge | None:
    """What the stage's action makes for its neighbour."""
    forward = type(action) is Forward
    if type(action) is BackwardWeight or stage == (num_stages - 1 if forward else 0):
        return None
    return forward, stage + 1 if forward else stage - 1, action.microbatch


def _execute(
    placement: Placement, orders: list[list[Compute]], costs: Costs, *, fill: bool = False
) -> Execution:
    """Run the orders of all ranks side by side, each action as soon as its rank is free and its input there.

    With `fill` the ranks place their weight gradients themselves, the oldest first: where they would wait otherwise, and before a forward
    with which they would hold more than p micro-batches.
    """
    num_stages, ranks, chunks = (
        placement.num_stages,
        range(placement.num_ranks),
        range(placement.num_chunks),
    )
    stage_of = [[placement.stage(rank, chunk) for chunk in chunks] for rank in ranks]
    rank_of = [placement.rank_and_chunk(stage)[0] for stage in range(num_stages)]
    kinds = (Forward, Backward, BackwardInput, BackwardWeight)
    duration = {kind: [costs.of(kind, stage) for stage in range(num_stages)] for kind in kinds}
    ahead = [
        deque(action for action in order if not fill or type(action) is not BackwardWeight)
        for order in orders
    ]
    weights = [deque() for _ in ranks]  # gradients that can run, with `fill`
    held = [0 for _ in ranks]  # activations of one chunk, with `fill`
    arrival: dict[Edge, float] = {}
    asleep: dict[Edge, int] = {}  # the rank that can do nothing before this is on its way
    free = [(0.0, rank) for rank in ranks]
    execution: Execution = []
    while free:
        now, rank = heapq.heappop(free)
        queue, need, ready = ahead[rank], None, inf
        if queue:
            need = _input(queue[0], stage_of[rank][queue[0].chunk], num_stages)
            ready = arrival.get(need, inf) if need else now
        full = held[rank] == num_stages and queue and type(queue[0]) is Forward
        if weights[rank] and (ready > now or full):
            queue, ready = weights[rank], now
        if ready > now:
            if ready < inf:
                heapq.heappush(free, (ready, rank))
            elif need:
                asleep[need] = rank
            continue
        action = queue.popleft()
        stage = stage_of[rank][action.chunk]
        end = now + duration[type(action)][stage]
        execution.append((now, end, rank, action))
        heapq.heappush(free, (end, rank))
        if fill:
            held[rank] += (type(action) is Forward) - (type(action) is BackwardWeight)
            if type(action) is BackwardInput:
                weights[rank].append(BackwardWeight(action.chunk, action.microbatch))
        if made := _output(action, stage, num_stages):
            arrival[made] = end + (rank_of[made[1]] != rank) * costs.transfer * placement.num_chunks
            if made in asleep:
                heapq.heappush(free, (arrival[made], asleep.pop(made)))
    return execution


def _better(paper: Execution, filled: Execution) -> Execution:
    """zb-v with its weight gradients where the paper puts them, or where ranks wait, if neither the bubble nor the step gets longer by that.

    The paper's places are made for F = B = W and 2p - 1 or more micro-batches; elsewhere they leave gaps.
    """
    (bubble, makespan), (papers_bubble, papers_makespan) = (
        _bubble_and_makespan(filled),
        _bubble_and_makespan(paper),
    )
    return filled if bubble <= papers_bubble and makespan <= papers_makespan else paper


def _bubble_and_makespan(execution: Execution) -> tuple[float, float]:
    """The most time any rank idles between its first start and its last end; the last end of all."""
    first, last, busy = {}, {}, defaultdict(float)
    for start, end, rank, _ in execution:
        first.setdefault(rank, start)
        last[rank] = end
        busy[rank] += end - start
    return max(last[rank] - first[rank] - busy[rank] for rank in first), max(last.values())


# Messages.


def _with_messages(placement: Placement, execution: Execution) -> tuple[tuple[Action, ...], ...]:
    """Put sends and receives between the compute actions, such that in-order messages cannot deadlock, even unbuffered ones.

    A pair of ranks has one queue for both directions. Both ends list its messages by the end of their producers, ties by the producers' order
    of execution. A send comes right after its producer; a receive one compute action ahead of its consumer, so that the transfer overlaps
    with that one, unless the queue has a send in between that is still to be produced.

    Nothing hangs: take the hanging compute action that started first in `execution`. Its input was produced by then, and so was all that is
    listed before it: those producers ran, their sends are posted. What this rank receives among these was posted before the action.
    """
    num_stages = placement.num_stages
    place_of = [placement.rank_and_chunk(stage) for stage in range(num_stages)]
    stage_of = {place: stage for stage, place in enumerate(place_of)}
    queues: dict[tuple[int, int], list[Message]] = defaultdict(
        list
    )  # (rank, peer): the rank's side of their queue
    sent: dict[Edge, tuple[int, int]] = {}  # (peer, place in the queue), for the producer
    awaited: dict[Edge, tuple[int, int]] = {}  # the same for the consumer
    for _, index in sorted((end, index) for index, (_, end, _, _) in enumerate(execution)):
        rank, action = execution[index][2:]
        made = _output(action, stage_of[rank, action.chunk], num_stages)
        if made and place_of[made[1]][0] != rank:
            peer, chunk = place_of[made[1]]
            send, receive = (
                (SendActivation, ReceiveActivation) if made[0] else (SendGradient, ReceiveGradient)
            )
            sent[made], awaited[made] = (
                (peer, len(queues[rank, peer])),
                (rank, len(queues[rank, peer])),
            )
            queues[rank, peer].append(send(action.chunk, action.microbatch, peer))
            queues[peer, rank].append(receive(chunk, action.microbatch, rank))

    programs = []
    for rank in range(placement.num_ranks):
        computes = [action for _, _, owner, action in execution if owner == rank]
        needs = [
            awaited.get(_input(action, stage_of[rank, action.chunk], num_stages))
            for action in computes
        ]
        gives = [
            sent.get(_output(action, stage_of[rank, action.chunk], num_stages))
            for action in computes
        ]
        program: list[Action] = []
        done = defaultdict(int)  # by peer: how much of the queue is in the program
        for i, action in enumerate(computes):
            for peer, last in filter(None, needs[i : i + 2]):
                queue = queues[rank, peer]
                while done[peer] <= last and type(queue[done[peer]]) in (
                    ReceiveActivation,
                    ReceiveGradient,
                ):
                    program.append(queue[done[peer]])
                    done[peer] += 1
            program.append(action)
            if gives[i]:
                peer, last = gives[i]
                program += queues[rank, peer][done[peer] : last + 1]
                done[peer] = last + 1
        programs.append(tuple(program))
    return tuple(programs)
