"""Owns the proof of a plan, that it is complete, in order and free of deadlock, and what it costs in time and memory."""

from collections import defaultdict, deque
from dataclasses import dataclass

from .plan import (
    UNIT_COSTS,
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Costs,
    Forward,
    Message,
    Plan,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)

RECEIVE_OF = {SendActivation: ReceiveActivation, SendGradient: ReceiveGradient}
INPUT_OF = {Forward: ReceiveActivation, Backward: ReceiveGradient, BackwardInput: ReceiveGradient}
PARTS = {Backward: (BackwardInput, BackwardWeight)}  # a whole backward counts as both
Deed = tuple[type[Action], int]  # (kind, chunk), to be done once for each micro-batch
Rules = dict[
    Deed, tuple[int | None, tuple[Deed, ...]]
]  # the peer of a message, and what has to be done before on this rank


class PlanError(ValueError):
    """A plan that cannot run; the message names rank and action."""


@dataclass(frozen=True)
class Timeline:
    """When everything runs, in the unit of the costs; one entry per rank.

    `bubbles`: last end - first start - busy.
    `peak_activations`: the most micro-batches a rank holds at a time, a chunk's being 1/v of one. An activation is held from the start of its
    forward to the end of its backward, with a backward in two parts to the end of the weight gradient, which needs it too. Neither the
    messages under way nor the output gradients that wait for a BackwardWeight are counted.
    """

    spans: tuple[tuple[tuple[Compute, float, float], ...], ...]  # (action, start, end)
    busy: tuple[float, ...]
    bubbles: tuple[float, ...]
    makespan: float
    peak_activations: tuple[float, ...]

    @property
    def bubble(self) -> float:
        return max(self.bubbles)

    @property
    def activations_vs_1f1b(self) -> float:
        """The most of any rank, against the p micro-batches that rank 0 of 1F1B holds when there are as many."""
        return max(self.peak_activations) / len(self.peak_activations)


def simulate(plan: Plan, costs: Costs = UNIT_COSTS) -> Timeline:
    """Run the plan under unbuffered in-order messages and time it. Raises PlanError if it cannot run to its end.

    Each pair of ranks has one queue, as NCCL has for a communicator: a message starts when it is first at both ends, and takes
    `costs.transfer`. Sends and receives do not hold up their rank; a compute action waits for its own receive.
    """
    if len(plan.actions) != plan.num_ranks:
        raise PlanError(f"{len(plan.actions)} lists of actions for {plan.num_ranks} ranks")
    rules = [_rules(plan, rank) for rank in range(plan.num_ranks)]
    for rank in range(plan.num_ranks):
        _check_order(plan, rank, rules[rank])
    spans = _run(plan, rules, costs)
    scale = plan.num_chunks  # Costs.of gives times v
    busy = [sum(end - start for _, start, end in rank) for rank in spans]
    bubbles = [rank[-1][2] - rank[0][1] - total for rank, total in zip(spans, busy, strict=True)]
    return Timeline(
        spans=tuple(
            tuple((action, start / scale, end / scale) for action, start, end in rank)
            for rank in spans
        ),
        busy=tuple(total / scale for total in busy),
        bubbles=tuple(bubble / scale for bubble in bubbles),
        makespan=max(rank[-1][2] for rank in spans) / scale,
        peak_activations=tuple(_peak(rank) / scale for rank in spans),
    )


def _peak(spans: list[tuple[Compute, float, float]]) -> int:
    held = peak = 0
    for action, _, _ in spans:
        held += (type(action) is Forward) - (type(action) in (Backward, BackwardWeight))
        peak = max(peak, held)
    return peak


def _rules(plan: Plan, rank: int) -> Rules:
    """All that this rank has to do for every micro-batch."""
    rules: Rules = {}
    for chunk in range(plan.num_chunks):
        stage = plan.stage(rank, chunk)
        before = plan.rank_and_chunk(stage - 1) if stage > 0 else None
        behind = plan.rank_and_chunk(stage + 1) if stage + 1 < plan.num_stages else None
        given, returned = (), ()  # the input, the gradient of the output
        if before and before[0] == rank:
            given = ((Forward, before[1]),)
        elif before:
            given = ((ReceiveActivation, chunk),)
            rules[given[0]] = (before[0], ())
            rules[SendGradient, chunk] = (before[0], ((BackwardInput, chunk),))
        if behind and behind[0] == rank:
            returned = ((BackwardInput, behind[1]),)
        elif behind:
            returned = ((ReceiveGradient, chunk),)
            rules[returned[0]] = (behind[0], ())
            rules[SendActivation, chunk] = (behind[0], ((Forward, chunk),))
        rules[Forward, chunk] = (None, given)
        rules[BackwardInput, chunk] = (None, ((Forward, chunk), *returned))
        rules[BackwardWeight, chunk] = (None, ((BackwardInput, chunk),))
    if plan.forward_only:
        return {
            deed: rule
            for deed, rule in rules.items()
            if deed[0] in (Forward, SendActivation, ReceiveActivation)
        }
    return rules


def _check_order(plan: Plan, rank: int, rules: Rules) -> None:
    """Everything once, and nothing before what it needs on its own rank."""
    done: dict[Deed, set[int]] = {deed: set() for deed in rules}  # micro-batches
    for action in plan.actions[rank]:
        chunk, i = action.chunk, action.microbatch
        for kind in PARTS.get(type(action), (type(action),)):
            if (kind, chunk) not in rules or not 0 <= i < plan.num_microbatches:
                raise PlanError(f"rank {rank}: {action} is no part of this plan")
            if i in done[kind, chunk]:
                raise PlanError(f"rank {rank}: {action} does again what is done")
            peer, earlier = rules[kind, chunk]
            if peer is not None and action.peer != peer:
                raise PlanError(
                    f"rank {rank}: {action} goes to the wrong rank; the neighbour stage is on rank {peer}"
                )
            for needed in earlier:
                if i not in done[needed]:
                    raise PlanError(
                        f"rank {rank}: {action} comes before {needed[0].__name__}(chunk={needed[1]}, microbatch={i}), which it needs"
                    )
            done[kind, chunk].add(i)
    for (kind, chunk), microbatches in done.items():
        for i in range(plan.num_microbatches):
            if i not in microbatches:
                raise PlanError(
                    f"rank {rank}: {kind.__name__}(chunk={chunk}, microbatch={i}) is missing"
                )


class _Links:
    """One queue for each pair of ranks. Its messages pass one after another, each as soon as it is first at both ends."""

    def __init__(self, plan: Plan, transfer: float):
        self.plan = plan
        self.transfer = transfer
        self.posted: dict[tuple[int, int], deque[tuple[float, Message]]] = defaultdict(
            deque
        )  # by (rank, peer), each end by itself
        self.free: dict[tuple[int, int], float] = defaultdict(float)
        self.received: list[dict[tuple, float]] = [
            {} for _ in plan.actions
        ]  # (kind, chunk, micro-batch) -> time

    def post(self, rank: int, action: Message, time: float) -> bool:
        """Whether anything passes now. Raises PlanError if the two ends do not put the same message first."""
        peer = action.peer
        ours, theirs = self.posted[rank, peer], self.posted[peer, rank]
        ours.append((time, action))
        if not theirs:
            return False
        while ours and theirs:
            here, there = (rank, *ours.popleft()), (peer, *theirs.popleft())
            sender, receiver = (here, there) if type(here[2]) in RECEIVE_OF else (there, here)
            if not self._match(sender, receiver):
                raise PlanError(
                    f"deadlock: rank {rank} has {here[2]} first in its queue with rank {peer}, which has {there[2]}"
                )
            pair = min(rank, peer), max(rank, peer)
            self.free[pair] = max(here[1], there[1], self.free[pair]) + self.transfer
            receive = receiver[2]
            self.received[receiver[0]][type(receive), receive.chunk, receive.microbatch] = (
                self.free[pair]
            )
        return True

    def _match(self, sender: tuple, receiver: tuple) -> bool:
        (rank, _, send), (peer, _, receive) = sender, receiver
        if RECEIVE_OF.get(type(send)) is not type(receive):
            return False
        step = 1 if type(send) is SendActivation else -1
        return (
            self.plan.stage(rank, send.chunk) + step == self.plan.stage(peer, receive.chunk)
            and send.microbatch == receive.microbatch
        )


def _run(plan: Plan, rules: list[Rules], costs: Costs) -> list[list[tuple[Compute, float, float]]]:
    """Each rank walks down its list: messages are posted as it gets to them, a compute action stops it until its receive is there.

    A rank that stopped goes on when a message passes. If the ranks stop for good before their ends, they wait for each other.
    """
    links = _Links(plan, costs.transfer * plan.num_chunks)
    kinds = (Forward, Backward, BackwardInput, BackwardWeight)
    duration = {kind: [costs.of(kind, stage) for stage in range(plan.num_stages)] for kind in kinds}
    clock = [0.0 for _ in plan.actions]
    position = [0 for _ in plan.actions]
    spans = [[] for _ in plan.actions]
    awake = deque(range(plan.num_ranks))
    while awake:
        rank = awake.popleft()
        actions = plan.actions[rank]
        while position[rank] < len(actions):
            action = actions[position[rank]]
            kind = type(action)
            if isinstance(action, Message):
                if links.post(rank, action, clock[rank]) and action.peer not in awake:
                    awake.append(action.peer)
            else:
                start = clock[rank]
                source = INPUT_OF.get(kind)
                if (source, action.chunk) in rules[rank]:
                    arrival = links.received[rank].get((source, action.chunk, action.microbatch))
                    if arrival is None:
                        break
                    start = max(start, arrival)
                clock[rank] = start + duration[kind][plan.stage(rank, action.chunk)]
                spans[rank].append((action, start, clock[rank]))
            position[rank] += 1
    stuck = [
        f"rank {rank} at {plan.actions[rank][at]}"
        for rank, at in enumerate(position)
        if at < len(plan.actions[rank])
    ]
    if stuck:
        raise PlanError(f"deadlock: ranks wait for each other, {', '.join(stuck)}")
    return spans
