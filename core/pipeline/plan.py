"""Pipeline plans: what each rank computes, sends and receives, in which order.

The problem. A schedule (schedules.py) says in which order each rank computes. Between two stages
on different ranks there is a message for every micro-batch, so sends and receives have to be put
between the compute actions. Wherever they are put, all is well as long as the transport buffers
messages, as gloo does. NCCL does not: a send completes only when its receive is posted on the other
side, and the messages of a pair of ranks pass strictly one after another, in the order in which
each side posts them. If both sides do not post the same order, they wait for each other for ever.
Two ranks in the steady state of 1F1B, for example:

    rank 0: ... SendActivation(5)   ReceiveGradient(4) ...
    rank 1: ... SendGradient(4)     ReceiveActivation(5) ...      both send first: deadlock

The idea. Run the orders of all ranks on paper first, with assumed times (`_PaperRun`), which tells
when each message is produced. Each pair of ranks then gets one list of its messages, by the time of
their production, and both sides post their messages in the order of this list: one side its
sends, the other the receives that belong to them. In the example, if rank 0 is done with forward 5
before rank 1 is done with backward 4, the list is [activation 5, gradient 4]:

    rank 0: ... SendActivation(5)   ReceiveGradient(4) ...
    rank 1: ... ReceiveActivation(5) SendGradient(4)   ...

Real times differ from the assumed ones. That costs waiting, but it cannot cause a deadlock: see
`_with_messages` for the reason, and simulate.py, which checks every plan under these rules.
"""

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from ..config import PIPELINE_SCHEDULES
from .actions import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Message,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)
from .placement import Placement
from .schedules import compute_order


@dataclass(frozen=True)
class Costs:
    """Times of one micro-batch through all layers of a rank, in any one unit.

    A chunk takes 1/v of it, a whole Backward the sum of both parts. Every rank must plan from the
    same numbers: lists that were made from different costs do not fit together.

    transfer: of one message.
    stages: what each stage takes relative to the others; empty if all take the same.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    transfer: float = 0.0
    stages: tuple[float, ...] = ()

    def of(self, kind: type[Compute], stage: int) -> float:
        """Return the time of one action of a stage, times v: whole numbers stay exact."""
        times: dict[type[Compute], float] = {
            Forward: self.forward,
            Backward: self.backward_input + self.backward_weight,
            BackwardInput: self.backward_input,
            BackwardWeight: self.backward_weight,
        }
        relative = self.stages[stage] if self.stages else 1.0
        return times[kind] * relative

    def by_stage(self, num_stages: int) -> dict[type[Compute], list[float]]:
        """Return `of` for every kind of action and every stage."""
        kinds = (Forward, Backward, BackwardInput, BackwardWeight)
        return {kind: [self.of(kind, stage) for stage in range(num_stages)] for kind in kinds}


UNIT_COSTS = Costs()


@dataclass(frozen=True)
class Plan(Placement):
    """Each rank's list of actions. Neighbour stages on one rank exchange no messages."""

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
    """Plan one step for every rank; if `forward_only`, its forwards alone over the same stages.

    Raises ValueError if the schedule does not exist or cannot be cut this way.
    """
    _check(schedule, num_ranks, num_microbatches, num_chunks)
    _check_costs(costs, num_ranks, num_chunks)
    placement = Placement(schedule, num_ranks, num_chunks)
    orders = [compute_order(placement, rank, num_microbatches) for rank in range(num_ranks)]
    if forward_only:
        orders = [[action for action in order if type(action) is Forward] for order in orders]
    executed = _PaperRun(placement, orders, costs).run()
    if schedule == "zb-v" and not forward_only:
        filled = _PaperRun(placement, orders, costs, fill=True).run()
        executed = _better(executed, filled)
    return Plan(
        schedule,
        num_ranks,
        num_chunks,
        num_microbatches,
        forward_only,
        actions=_with_messages(placement, executed),
    )


def _check(schedule: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> None:
    if schedule not in PIPELINE_SCHEDULES:
        raise ValueError(
            f"there is no pipeline schedule {schedule!r}; there are {', '.join(PIPELINE_SCHEDULES)}"
        )
    counts = (("ranks", num_ranks), ("micro-batches", num_microbatches), ("chunks", num_chunks))
    for name, count in counts:
        if count < 1:
            raise ValueError(f"a pipeline needs at least 1 of its {name}, not {count}")
    if schedule == "interleaved":
        if num_chunks == 1:
            raise ValueError("interleaved has at least 2 chunks a rank, not 1; use 1f1b")
    elif schedule == "zb-v":
        if num_chunks != 2:
            raise ValueError(f"zb-v has 2 chunks a rank, not {num_chunks}")
    elif num_chunks != 1:
        raise ValueError(f"{schedule} has 1 chunk a rank, not {num_chunks}; use interleaved")


def _check_costs(costs: Costs, num_ranks: int, num_chunks: int) -> None:
    times = (costs.forward, costs.backward_input, costs.backward_weight, *costs.stages)
    if not (all(0 < time < inf for time in times) and 0 <= costs.transfer < inf):
        raise ValueError(
            "a pipeline is planned from times above 0 and transfers of 0 or more, all finite, "
            f"not from {costs}"
        )
    num_stages = num_ranks * num_chunks
    if costs.stages and len(costs.stages) != num_stages:
        raise ValueError(
            f"costs of {len(costs.stages)} stages for {num_ranks} ranks x {num_chunks} chunks "
            f"= {num_stages} stages"
        )


# Times: when everything runs, v times too long as in Costs.of.


class _Executed(NamedTuple):
    """One compute action with its time on paper."""

    start: float
    end: float
    rank: int
    action: Compute


class _Edge(NamedTuple):
    """One tensor between two stages: an activation (`forward`) or a gradient, given to `stage`."""

    forward: bool
    stage: int
    microbatch: int


def _input(action: Compute, stage: int, num_stages: int) -> _Edge | None:
    """Return what the stage's action needs from its neighbour, if anything."""
    forward = type(action) is Forward
    first_to_run = 0 if forward else num_stages - 1
    if type(action) is BackwardWeight or stage == first_to_run:
        return None
    return _Edge(forward, stage, action.microbatch)


def _output(action: Compute, stage: int, num_stages: int) -> _Edge | None:
    """Return what the stage's action makes for its neighbour, if anything."""
    forward = type(action) is Forward
    last_to_run = num_stages - 1 if forward else 0
    if type(action) is BackwardWeight or stage == last_to_run:
        return None
    return _Edge(forward, stage + 1 if forward else stage - 1, action.microbatch)


class _PaperRun:
    """The orders of all ranks run side by side on paper, each action as soon as it can.

    An action can start when its rank is free and its input is there. With `fill` the ranks place
    their weight gradients themselves, the oldest first: where they would wait otherwise, and
    before a forward with which they would hold more than p micro-batches.
    """

    def __init__(
        self,
        placement: Placement,
        orders: list[list[Compute]],
        costs: Costs,
        *,
        fill: bool = False,
    ):
        ranks = range(placement.num_ranks)
        self.fill = fill
        self.placement = placement
        self.num_stages = placement.num_stages
        self.duration = costs.by_stage(self.num_stages)
        self.transfer = costs.transfer * placement.num_chunks
        # What each rank has still to do, in order. With `fill`, W is queued when its B has run.
        self.ahead: list[deque[Compute]] = []
        for order in orders:
            listed = [kept for kept in order if not (fill and type(kept) is BackwardWeight)]
            self.ahead.append(deque(listed))
        self.weights: list[deque[Compute]] = [deque() for _ in ranks]  # W that can run, `fill`
        self.held = [0 for _ in ranks]  # activations of one chunk that a rank holds, with `fill`
        self.arrival: dict[_Edge, float] = {}  # when a tensor is there
        # A rank whose next action needs a tensor that nobody has begun to make. It sleeps until
        # the producer starts: only then is the time of the arrival known.
        self.asleep: dict[_Edge, int] = {}
        self.free = [(0.0, rank) for rank in ranks]  # heap of (time, rank): ranks to look at
        self.executed: list[_Executed] = []

    def run(self) -> list[_Executed]:
        """Return all compute actions in the order of their starts."""
        while self.free:
            now, rank = heapq.heappop(self.free)
            self._continue(rank, now)
        return self.executed

    def _continue(self, rank: int, now: float) -> None:
        """Start the next action of a rank that is free, or note when to look at it again."""
        queue = self.ahead[rank]
        need = None
        ready = inf
        full = False
        if queue:
            action = queue[0]
            need = _input(action, self._stage(rank, action), self.num_stages)
            ready = now if need is None else self.arrival.get(need, inf)
            full = type(action) is Forward and self.held[rank] == self.num_stages
        if self.weights[rank] and (ready > now or full):
            queue, ready = self.weights[rank], now
        if ready <= now:
            self._start(rank, queue.popleft(), now)
        elif ready < inf:
            heapq.heappush(self.free, (ready, rank))
        elif need is not None:
            self.asleep[need] = rank

    def _start(self, rank: int, action: Compute, now: float) -> None:
        """Run an action; wake the rank that sleeps until its output is under way."""
        stage = self._stage(rank, action)
        end = now + self.duration[type(action)][stage]
        self.executed.append(_Executed(now, end, rank, action))
        heapq.heappush(self.free, (end, rank))
        if self.fill:
            self._count_held(rank, action)
        made = _output(action, stage, self.num_stages)
        if made is None:
            return
        stays_here = self.placement.rank_and_chunk(made.stage).rank == rank
        self.arrival[made] = end if stays_here else end + self.transfer
        if made in self.asleep:
            heapq.heappush(self.free, (self.arrival[made], self.asleep.pop(made)))

    def _count_held(self, rank: int, action: Compute) -> None:
        if type(action) is Forward:
            self.held[rank] += 1
        elif type(action) is BackwardWeight:
            self.held[rank] -= 1
        elif type(action) is BackwardInput:
            weight = BackwardWeight(action.chunk, action.microbatch)
            self.weights[rank].append(weight)

    def _stage(self, rank: int, action: Compute) -> int:
        return self.placement.stage(rank, action.chunk)


def _better(paper: list[_Executed], filled: list[_Executed]) -> list[_Executed]:
    """Return zb-v as in the paper, or with W where ranks wait.

    The paper's places of W are made for F = B = W and 2p - 1 or more micro-batches; elsewhere they
    leave gaps. The filled one is taken if neither the bubble nor the step gets longer by it.
    """
    paper_bubble, paper_makespan = _bubble_and_makespan(paper)
    bubble, makespan = _bubble_and_makespan(filled)
    if bubble <= paper_bubble and makespan <= paper_makespan:
        return filled
    return paper


def _bubble_and_makespan(executed: list[_Executed]) -> tuple[float, float]:
    """Return two times: the longest that any rank idles, and the last end of all.

    A rank idles between its first start and its last end.
    """
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    busy: dict[int, float] = defaultdict(float)
    for start, end, rank, _ in executed:
        first.setdefault(rank, start)
        last[rank] = end
        busy[rank] += end - start
    idle = [last[rank] - first[rank] - busy[rank] for rank in first]
    return max(idle), max(last.values())


# Messages.


class _Posted(NamedTuple):
    """The position of a message in one rank's list with one peer."""

    peer: int
    position: int


def _with_messages(
    placement: Placement, executed: list[_Executed]
) -> tuple[tuple[Action, ...], ...]:
    """Put sends and receives between the compute actions; return the list of each rank.

    In-order messages cannot deadlock then, even unbuffered ones. Take, of the compute actions that
    would hang, the one that started first on paper. Its input was produced by then, and so was
    all that its pair of ranks lists before it. Those producers started earlier, so they do not
    hang, and their sends are posted. What this rank receives among these was posted before the
    action. So everything up to its input can pass, and the action does not hang.
    """
    messages = _Messages(placement, executed)
    programs = []
    for rank in range(placement.num_ranks):
        computes = [one.action for one in executed if one.rank == rank]
        programs.append(tuple(_program(rank, computes, messages)))
    return tuple(programs)


class _Messages:
    """The messages of every pair of ranks, in the one order in which both sides post them.

    They are listed by the end of their producers on paper, ties by the producers' start.
    """

    def __init__(self, placement: Placement, executed: list[_Executed]):
        self.placement = placement
        # By (rank, peer): the rank's side of the list. The peer's side has as many entries.
        self.lists: dict[tuple[int, int], list[Message]] = defaultdict(list)
        self.sent: dict[_Edge, _Posted] = {}  # in the producer's list
        self.received: dict[_Edge, _Posted] = {}  # in the consumer's list
        ends = sorted((one.end, index) for index, one in enumerate(executed))
        for _, index in ends:
            self._add(executed[index].rank, executed[index].action)

    def sent_after(self, rank: int, action: Compute) -> _Posted | None:
        """Return the send of the action's output, None if the output stays on the rank."""
        made = _output(action, self._stage(rank, action), self.placement.num_stages)
        return None if made is None else self.sent.get(made)

    def received_for(self, rank: int, action: Compute) -> _Posted | None:
        """Return the receive of the action's input, None if it comes from the same rank."""
        need = _input(action, self._stage(rank, action), self.placement.num_stages)
        return None if need is None else self.received.get(need)

    def _add(self, rank: int, action: Compute) -> None:
        made = _output(action, self._stage(rank, action), self.placement.num_stages)
        if made is None:
            return
        peer, chunk = self.placement.rank_and_chunk(made.stage)
        if peer == rank:
            return
        send: type[Message] = SendActivation if made.forward else SendGradient
        receive: type[Message] = ReceiveActivation if made.forward else ReceiveGradient
        ours, theirs = self.lists[rank, peer], self.lists[peer, rank]
        self.sent[made] = _Posted(peer, len(ours))
        self.received[made] = _Posted(rank, len(theirs))
        ours.append(send(action.chunk, action.microbatch, peer))
        theirs.append(receive(chunk, action.microbatch, rank))

    def _stage(self, rank: int, action: Compute) -> int:
        return self.placement.stage(rank, action.chunk)


def _program(rank: int, computes: list[Compute], messages: _Messages) -> list[Action]:
    """Merge one rank's compute actions with its side of the lists of messages.

    A send comes right after its producer. A receive comes one compute action ahead of its
    consumer, so that the transfer overlaps with that action, unless the list has a send in between
    that is still to be produced.
    """
    program: list[Action] = []
    num_posted: dict[int, int] = defaultdict(int)  # by peer: how much of its list is posted
    needs = [messages.received_for(rank, action) for action in computes]
    for i, action in enumerate(computes):
        # Post the receives of this action, which may still be due, and of the next one.
        for need in needs[i : i + 2]:
            if need is None:
                continue
            listed = messages.lists[rank, need.peer]
            while num_posted[need.peer] <= need.position:
                message = listed[num_posted[need.peer]]
                if not isinstance(message, ReceiveActivation | ReceiveGradient):
                    break
                program.append(message)
                num_posted[need.peer] += 1
        program.append(action)
        sent = messages.sent_after(rank, action)
        if sent is not None:
            # What is listed before this send are receives: earlier sends are posted already.
            listed = messages.lists[rank, sent.peer]
            program += listed[num_posted[sent.peer] : sent.position + 1]
            num_posted[sent.peer] = sent.position + 1
    return program
