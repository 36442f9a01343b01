"""Run a pipeline plan on one rank: compute, send and receive in the order that the plan lists.

A plan (plan.py) lists the actions of each rank. The runtime knows neither schedules nor models:
it walks down its list and calls `stage` for the forwards. One micro-batch's way through a chunk
in the middle of the pipeline, with 1F1B:

    ReceiveActivation   post a receive into a fresh buffer; nothing waits here
    Forward             wait for that message, run the stage, keep its input and its output
    SendActivation      start to send the output; nothing waits here
    ReceiveGradient     post a receive for the gradient of the output
    Backward            wait for that message, run backward from the output that was kept
    SendGradient        start to send the gradient of the input

Only compute actions wait, and only for the message that they need, so that transfers overlap
with the compute actions that the plan puts between a receive and its consumer.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import comm
from ..gradients import Deferral
from ..mesh import Axis
from .actions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)
from .plan import Plan

# Called with (chunk, micro-batch, x), where x is the output of the stage before, or None on the
# first stage. Returns hidden states, or the loss of the last stage.
Stage = Callable[[int, int, torch.Tensor | None], torch.Tensor]

_Key = tuple[int, int]  # chunk, micro-batch


@dataclass(frozen=True)
class MessageSpec:
    """The form of every message: hidden states and their gradients have one shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def buffer(self) -> torch.Tensor:
        """Return uninitialized memory for one message."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class _Neighbours(NamedTuple):
    """The stages before and after one chunk, as its rank sees them."""

    is_first: bool  # no stage before
    is_last: bool  # no stage after
    chunk_before: int | None  # the chunk of this rank that is the stage before; None if elsewhere
    chunk_after: int | None  # the chunk of this rank that is the stage after; None if elsewhere


class _Receive(NamedTuple):
    """A message on its way to this rank."""

    pending: comm.Pending
    sent_before: list[comm.Pending]  # sends to the same rank since the receive before this one


class Runner:
    """One rank's part of a plan, prepared once and run for every pass.

    All that depends on the plan alone is looked up here, so that a pass never asks the plan.
    """

    def __init__(self, plan: Plan, pp: Axis, message: MessageSpec, deferral: Deferral):
        self.num_microbatches = plan.num_microbatches
        self.forward_only = plan.forward_only
        self.actions = plan.actions[pp.rank]
        self.pp = pp
        self.message = message
        self.deferral = deferral
        self.neighbours = [_neighbours(plan, pp.rank, chunk) for chunk in range(plan.num_chunks)]

    def run(self, stage: Stage) -> None:
        """Take all micro-batches through this rank's stages, as the plan says.

        On the last stage, `stage` returns a 0-d loss, which backward starts from. Gradients of
        weights go where the parameters' sinks lead. Every message is complete when this returns.
        """
        work = _Pass(self, stage)
        for action in self.actions:
            work.do[type(action)](action)
        work.finish()


class _Pass:
    """One pass: what is kept between its actions (graphs, messages, held-back products)."""

    def __init__(self, runner: Runner, stage: Stage):
        self.runner = runner
        self.stage = stage
        # Stages that ran forward and wait for their backward: (input, output).
        self.graphs: dict[_Key, tuple[torch.Tensor | None, torch.Tensor]] = {}
        # Inputs of stages that have not run yet.
        self.inputs: dict[_Key, torch.Tensor | _Receive] = {}
        # Gradients of outputs whose backward has not run yet.
        self.gradients: dict[_Key, torch.Tensor | _Receive] = {}
        # Results that wait for their send action, by its type, chunk and micro-batch.
        self.outgoing: dict[tuple[type, int, int], torch.Tensor] = {}
        # Products that compute weight gradients, between BackwardInput and BackwardWeight.
        self.products: dict[_Key, list[Callable[[], None]]] = {}
        # By peer: sends that were started since the last receive from it was posted.
        self.sending: dict[int, list[comm.Pending]] = defaultdict(list)
        self.do: dict[type, Callable[[Any], None]] = {
            Forward: self.forward,
            Backward: self.backward,
            BackwardInput: self.backward_input,
            BackwardWeight: self.backward_weight,
            SendActivation: self.send,
            SendGradient: self.send,
            ReceiveActivation: self.receive_activation,
            ReceiveGradient: self.receive_gradient,
        }

    # Compute.

    def forward(self, action: Forward) -> None:
        key = action.chunk, action.microbatch
        neighbours = self.runner.neighbours[action.chunk]
        x = None if neighbours.is_first else self._arrived(self.inputs.pop(key))
        if self.runner.forward_only:
            with torch.no_grad():
                y = self.stage(*key, x)
        else:
            if x is not None:
                x.requires_grad_()
            y = self.stage(*key, x)
            self.graphs[key] = x, y
        if not neighbours.is_last:
            # Detached, for the next stage's graph begins with its input: gradients cross the
            # border between two stages as messages, never inside one graph.
            self._hand_on(SendActivation, key, y.detach(), self.inputs, neighbours.chunk_after)

    def backward(self, action: Compute) -> None:
        key = action.chunk, action.microbatch
        neighbours = self.runner.neighbours[action.chunk]
        x, y = self.graphs.pop(key)
        y.backward(None if neighbours.is_last else self._arrived(self.gradients.pop(key)))
        if x is not None:
            assert x.grad is not None
            self._hand_on(SendGradient, key, x.grad, self.gradients, neighbours.chunk_before)

    def backward_input(self, action: BackwardInput) -> None:
        with self.runner.deferral.holding() as products:
            self.backward(action)
        self.products[action.chunk, action.microbatch] = products

    @torch.no_grad()
    def backward_weight(self, action: BackwardWeight) -> None:
        for product in self.products.pop((action.chunk, action.microbatch)):
            product()

    # Messages.

    def _hand_on(
        self,
        kind: type,
        key: _Key,
        tensor: torch.Tensor,
        held_here: dict[_Key, Any],
        chunk_here: int | None,
    ) -> None:
        """Give a result to the neighbour stage.

        kind: the action that sends it, if the neighbour is on another rank.
        held_here, chunk_here: where it is kept if the neighbour is a chunk of this rank.
        """
        chunk, microbatch = key
        if chunk_here is None:
            self.outgoing[kind, chunk, microbatch] = tensor
        else:
            held_here[chunk_here, microbatch] = tensor

    def send(self, action: SendActivation | SendGradient) -> None:
        tensor = self.outgoing.pop((type(action), action.chunk, action.microbatch))
        sent = comm.start_send(tensor.contiguous(), self.runner.pp, action.peer)
        self.sending[action.peer].append(sent)

    def receive_activation(self, action: ReceiveActivation) -> None:
        self.inputs[action.chunk, action.microbatch] = self._receive(action.peer)

    def receive_gradient(self, action: ReceiveGradient) -> None:
        self.gradients[action.chunk, action.microbatch] = self._receive(action.peer)

    def _receive(self, peer: int) -> _Receive:
        pending = comm.start_receive(self.runner.message.buffer(), self.runner.pp, peer)
        return _Receive(pending, self.sending.pop(peer, []))

    def _arrived(self, held: torch.Tensor | _Receive) -> torch.Tensor:
        """Return a tensor that a compute action needs; wait for it if it comes in a message."""
        if isinstance(held, torch.Tensor):
            return held
        # The messages of a pair of ranks complete in order, so what was sent to that rank before
        # this receive was posted is complete when the receive is. Waiting for it here costs
        # nothing and lets go of the memory that was sent.
        for sent in held.sent_before:
            sent.wait()
        return held.pending.wait()

    def finish(self) -> None:
        """Wait for the sends that no later receive has completed."""
        for sends in self.sending.values():
            for sent in sends:
                sent.wait()


def _neighbours(plan: Plan, rank: int, chunk: int) -> _Neighbours:
    stage = plan.stage(rank, chunk)

    def chunk_here(other: int) -> int | None:
        """Return the chunk of this rank that is stage `other`, or None."""
        if not 0 <= other < plan.num_stages:
            return None
        its_rank, its_chunk = plan.rank_and_chunk(other)
        return its_chunk if its_rank == rank else None

    return _Neighbours(
        is_first=stage == 0,
        is_last=stage == plan.num_stages - 1,
        chunk_before=chunk_here(stage - 1),
        chunk_after=chunk_here(stage + 1),
    )
