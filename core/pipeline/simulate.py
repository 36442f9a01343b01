"""The proof of a plan: it is complete, in order and free of deadlock; and what it costs.

What is proven, and how, by reading and by running the lists of a plan, without torch:

1. Complete. Each rank does all that its stages need exactly once for every micro-batch, with the
   right peer: forward, both parts of backward, and the messages with neighbours on other ranks.
   `_rules` derives from the placement alone what that is; `_check_order` counts.
2. In order. Nothing comes before what it needs on its own rank: a send after the action that makes
   its tensor, a backward after its forward and after the receive of its gradient, and so on.
   `_rules` lists the needs of each deed; `_check_order` looks them up.
3. Free of deadlock, on any transport. `_Walk` runs all lists side by side under the strictest rules
   that a transport has: no buffers (a message passes when both ends have posted it) and one queue
   for each pair of ranks (it passes only when it is first at both ends). The lists have no
   branches, and whether a rank gets past an action depends only on what the others have
   posted, never on time. So if one walk gets to all ends, every walk does, at any speed.

The same walk gives the times, for assumed costs: bubbles and peak activations.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import NamedTuple

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
from .plan import UNIT_COSTS, Costs, Plan

RECEIVE_OF: dict[type[Action], type[Message]] = {
    SendActivation: ReceiveActivation,
    SendGradient: ReceiveGradient,
}
INPUT_OF: dict[type[Compute], type[Message]] = {
    Forward: ReceiveActivation,
    Backward: ReceiveGradient,
    BackwardInput: ReceiveGradient,
}
# A whole backward counts as both of its parts.
PARTS: dict[type[Action], tuple[type[Action], ...]] = {Backward: (BackwardInput, BackwardWeight)}


class PlanError(ValueError):
    """A plan that cannot run; the message names rank and action."""


class Span(NamedTuple):
    """One compute action with its time."""

    action: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When everything runs, in the unit of the costs; one entry per rank.

    spans: the compute actions with start and end.
    bubbles: last end - first start - busy.
    peak_activations: the most micro-batches that a rank holds at a time; a chunk's count 1/v. An
        activation is held from the start of its forward to the end of its backward; if backward is
        in two parts, to the end of the weight gradient, which needs it too. Neither messages
        under way nor output gradients that wait for a BackwardWeight are counted.
    """

    spans: tuple[tuple[Span, ...], ...]
    busy: tuple[float, ...]
    bubbles: tuple[float, ...]
    makespan: float
    peak_activations: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Return the longest bubble of any rank."""
        return max(self.bubbles)

    @property
    def activations_vs_1f1b(self) -> float:
        """Return the highest peak over p, the micro-batches that rank 0 of 1F1B holds."""
        return max(self.peak_activations) / len(self.peak_activations)


def simulate(plan: Plan, costs: Costs = UNIT_COSTS) -> Timeline:
    """Run the plan under unbuffered in-order messages and time it.

    Each pair of ranks has one queue, as NCCL has for a communicator: a message starts when it is
    first at both ends, and takes `costs.transfer`. Sends and receives do not hold up their rank; a
    compute action waits for its own receive. Raises PlanError if the plan cannot run to its end.
    """
    if len(plan.actions) != plan.num_ranks:
        raise PlanError(f"{len(plan.actions)} lists of actions for {plan.num_ranks} ranks")
    rules = [_rules(plan, rank) for rank in range(plan.num_ranks)]
    for rank in range(plan.num_ranks):
        _check_order(plan, rank, rules[rank])
    walked = _Walk(plan, rules, costs).run()
    scale = plan.num_chunks  # Costs.of gives times v
    busy = [sum(span.end - span.start for span in spans) for spans in walked]
    bubbles = []
    for spans, total in zip(walked, busy, strict=True):
        bubbles.append(spans[-1].end - spans[0].start - total)
    return Timeline(
        spans=tuple(_scaled(spans, scale) for spans in walked),
        busy=tuple(total / scale for total in busy),
        bubbles=tuple(bubble / scale for bubble in bubbles),
        makespan=max(spans[-1].end for spans in walked) / scale,
        peak_activations=tuple(_peak(spans) / scale for spans in walked),
    )


def _scaled(spans: list[Span], scale: int) -> tuple[Span, ...]:
    """Return the spans with their times divided by `scale`."""
    scaled = []
    for action, start, end in spans:
        scaled.append(Span(action, start / scale, end / scale))
    return tuple(scaled)


def _peak(spans: list[Span]) -> int:
    """Return the most activations of a chunk that a rank holds at a time."""
    held = peak = 0
    for span in spans:
        if isinstance(span.action, Forward):
            held += 1
        elif isinstance(span.action, Backward | BackwardWeight):
            held -= 1
        peak = max(peak, held)
    return peak


# 1 and 2: complete and in order.

_Deed = tuple[type[Action], int]  # (kind, chunk), to be done once for each micro-batch


class _Rule(NamedTuple):
    """The conditions under which one deed is legal."""

    peer: int | None  # of a message
    needs: tuple[_Deed, ...]  # what has to be done before it on the same rank


_Rules = dict[_Deed, _Rule]


def _rules(plan: Plan, rank: int) -> _Rules:
    """Return all that this rank has to do for every micro-batch."""
    rules: _Rules = {}
    for chunk in range(plan.num_chunks):
        rules |= _rules_of_chunk(plan, rank, chunk)
    if not plan.forward_only:
        return rules
    kinds = (Forward, SendActivation, ReceiveActivation)
    return {deed: rule for deed, rule in rules.items() if deed[0] in kinds}


def _rules_of_chunk(plan: Plan, rank: int, chunk: int) -> _Rules:
    """Return what one chunk of the rank has to do for every micro-batch.

    A message with a neighbour on another rank has a send after the action that makes its tensor,
    and a receive before the one that uses it. With a neighbour on this rank there is none: the
    action that uses the tensor then comes after the action that makes it.
    """
    rules: _Rules = {}
    stage = plan.stage(rank, chunk)
    forward_needs: list[_Deed] = []  # the input of the stage
    backward_needs: list[_Deed] = [(Forward, chunk)]  # and the gradient of its output
    if stage > 0:
        before = plan.rank_and_chunk(stage - 1)
        if before.rank == rank:
            forward_needs.append((Forward, before.chunk))
        else:
            forward_needs.append((ReceiveActivation, chunk))
            rules[ReceiveActivation, chunk] = _Rule(before.rank, ())
            rules[SendGradient, chunk] = _Rule(before.rank, ((BackwardInput, chunk),))
    if stage + 1 < plan.num_stages:
        after = plan.rank_and_chunk(stage + 1)
        if after.rank == rank:
            backward_needs.append((BackwardInput, after.chunk))
        else:
            backward_needs.append((ReceiveGradient, chunk))
            rules[ReceiveGradient, chunk] = _Rule(after.rank, ())
            rules[SendActivation, chunk] = _Rule(after.rank, ((Forward, chunk),))
    rules[Forward, chunk] = _Rule(None, tuple(forward_needs))
    rules[BackwardInput, chunk] = _Rule(None, tuple(backward_needs))
    rules[BackwardWeight, chunk] = _Rule(None, ((BackwardInput, chunk),))
    return rules


def _check_order(plan: Plan, rank: int, rules: _Rules) -> None:
    """Raise PlanError unless everything is done once, and nothing before what it needs."""
    done: dict[_Deed, set[int]] = {deed: set() for deed in rules}  # micro-batches
    for action in plan.actions[rank]:
        for kind in PARTS.get(type(action), (type(action),)):
            _check_deed(plan, rank, rules, done, action, (kind, action.chunk))
            done[kind, action.chunk].add(action.microbatch)
    for (kind, chunk), microbatches in done.items():
        for i in range(plan.num_microbatches):
            if i not in microbatches:
                deed = f"{kind.__name__}(chunk={chunk}, microbatch={i})"
                raise PlanError(f"rank {rank}: {deed} is missing")


def _check_deed(
    plan: Plan,
    rank: int,
    rules: _Rules,
    done: dict[_Deed, set[int]],
    action: Action,
    deed: _Deed,
) -> None:
    """Raise PlanError if a deed is not to be done, is done already, or comes too early."""
    i = action.microbatch
    if deed not in rules or not 0 <= i < plan.num_microbatches:
        raise PlanError(f"rank {rank}: {action} is no part of this plan")
    if i in done[deed]:
        raise PlanError(f"rank {rank}: {action} does again what is done")
    rule = rules[deed]
    if isinstance(action, Message) and action.peer != rule.peer:
        raise PlanError(
            f"rank {rank}: {action} goes to the wrong rank; "
            f"the neighbour stage is on rank {rule.peer}"
        )
    for kind, chunk in rule.needs:
        if i not in done[kind, chunk]:
            needed = f"{kind.__name__}(chunk={chunk}, microbatch={i})"
            raise PlanError(f"rank {rank}: {action} comes before {needed}, which it needs")


# 3: free of deadlock.


class _Posted(NamedTuple):
    """A message that one end has posted."""

    rank: int
    time: float
    message: Message


_Key = tuple[type[Message], int, int]  # kind, chunk, micro-batch


class _Links:
    """One queue for each pair of ranks; a message passes as soon as it is first at both ends."""

    def __init__(self, plan: Plan, transfer: float):
        self.plan = plan
        self.transfer = transfer
        # By (rank, peer), each end by itself.
        self.queues: dict[tuple[int, int], deque[_Posted]] = defaultdict(deque)
        # By pair: when its last message has passed.
        self.free: dict[tuple[int, int], float] = defaultdict(float)
        # By rank: when each of its messages has arrived.
        self.received: list[dict[_Key, float]] = [{} for _ in plan.actions]

    def post(self, rank: int, message: Message, time: float) -> bool:
        """Return whether anything passes now.

        Raises PlanError if the two ends do not put the same message first.
        """
        ours = self.queues[rank, message.peer]
        theirs = self.queues[message.peer, rank]
        ours.append(_Posted(rank, time, message))
        if not theirs:
            return False
        while ours and theirs:
            self._pass(ours.popleft(), theirs.popleft())
        return True

    def _pass(self, here: _Posted, there: _Posted) -> None:
        """Let the first message of both ends pass.

        It starts when both have posted it and the one before it is through.
        """
        sender, receiver = here, there
        if type(here.message) not in RECEIVE_OF:
            sender, receiver = there, here
        if not self._match(sender, receiver):
            raise PlanError(
                f"deadlock: rank {here.rank} has {here.message} first in its queue with rank "
                f"{there.rank}, which has {there.message}"
            )
        low = min(here.rank, there.rank)
        high = max(here.rank, there.rank)
        pair = low, high
        start = max(here.time, there.time, self.free[pair])
        self.free[pair] = start + self.transfer
        message = receiver.message
        key = type(message), message.chunk, message.microbatch
        self.received[receiver.rank][key] = self.free[pair]

    def _match(self, sender: _Posted, receiver: _Posted) -> bool:
        """Return whether the two ends mean the same tensor."""
        send, receive = sender.message, receiver.message
        if RECEIVE_OF.get(type(send)) is not type(receive):
            return False
        step = 1 if isinstance(send, SendActivation) else -1
        goes_to = self.plan.stage(sender.rank, send.chunk) + step
        comes_to = self.plan.stage(receiver.rank, receive.chunk)
        return goes_to == comes_to and send.microbatch == receive.microbatch


class _Walk:
    """Each rank walks down its list; a rank that has to wait goes on when a message passes.

    Messages are posted as a rank gets to them; a compute action stops it until its receive is
    there. If the ranks stop for good before their ends, they wait for each other: a deadlock.
    """

    def __init__(self, plan: Plan, rules: list[_Rules], costs: Costs):
        self.plan = plan
        self.rules = rules
        self.links = _Links(plan, costs.transfer * plan.num_chunks)
        self.duration = costs.by_stage(plan.num_stages)
        self.clock = [0.0 for _ in plan.actions]
        self.position = [0 for _ in plan.actions]
        self.spans: list[list[Span]] = [[] for _ in plan.actions]
        self.awake = deque(range(plan.num_ranks))

    def run(self) -> list[list[Span]]:
        """Return the compute actions of each rank with their times."""
        while self.awake:
            self._walk(self.awake.popleft())
        stuck = []
        for rank, at in enumerate(self.position):
            if at < len(self.plan.actions[rank]):
                stuck.append(f"rank {rank} at {self.plan.actions[rank][at]}")
        if stuck:
            raise PlanError(f"deadlock: ranks wait for each other, {', '.join(stuck)}")
        return self.spans

    def _walk(self, rank: int) -> None:
        """Take a rank as far as it can go now."""
        actions = self.plan.actions[rank]
        while self.position[rank] < len(actions):
            action = actions[self.position[rank]]
            if isinstance(action, Message):
                passed = self.links.post(rank, action, self.clock[rank])
                if passed and action.peer not in self.awake:
                    self.awake.append(action.peer)
            elif not self._compute(rank, action):
                return
            self.position[rank] += 1

    def _compute(self, rank: int, action: Compute) -> bool:
        """Run a compute action; return False if its input is not there yet."""
        start = self.clock[rank]
        source = INPUT_OF.get(type(action))
        if source is not None and (source, action.chunk) in self.rules[rank]:
            key = source, action.chunk, action.microbatch
            arrival = self.links.received[rank].get(key)
            if arrival is None:
                return False
            start = max(start, arrival)
        stage = self.plan.stage(rank, action.chunk)
        end = start + self.duration[type(action)][stage]
        self.clock[rank] = end
        self.spans[rank].append(Span(action, start, end))
        return True
