"""Runs a plan on one rank: computes, sends and receives in its order. It knows schedules as lists of actions and stages as a callable."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import comm
from ..gradients import Deferral
from ..mesh import Axis
from .plan import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Plan,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)

# (chunk, micro-batch, what the stage before gave or None for the first stage) -> hidden states, or the loss of the last stage.
Stage = Callable[[int, int, torch.Tensor | None], torch.Tensor]

_Key = tuple[int, int]  # chunk, micro-batch


@dataclass(frozen=True)
class MessageSpec:
    """What passes between stages, known ahead: hidden states and their gradients have one shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def buffer(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def run(plan: Plan, pp: Axis, message: MessageSpec, stage: Stage, deferral: Deferral) -> None:
    """One pass of all micro-batches through this rank's stages, forwards alone or with gradients, as `plan` says.

    The stage of the last one returns a 0-d loss, which backward starts from. Gradients of weights go where the parameters' sinks
    lead; those that the plan defers are held in between. Every message is complete when this returns.
    """
    work = _Pass(plan, pp, message, stage, deferral)
    for action in plan.actions[pp.rank]:
        work.do[type(action)](action)
    work.finish()


@dataclass(frozen=True)
class _Receive:
    pending: comm.Pending
    sent_before: list[comm.Pending]  # to the same rank, since the receive before


class _Pass:
    """What lives between the actions of one pass: graphs waiting for their gradients, messages under way, deferred products."""

    def __init__(
        self, plan: Plan, pp: Axis, message: MessageSpec, stage: Stage, deferral: Deferral
    ):
        self.plan, self.pp, self.message, self.stage, self.deferral = (
            plan,
            pp,
            message,
            stage,
            deferral,
        )
        self.graphs: dict[
            _Key, tuple[torch.Tensor | None, torch.Tensor]
        ] = {}  # input and output of a stage
        self.inputs: dict[_Key, torch.Tensor | _Receive] = {}  # of stages that have not run
        self.gradients: dict[_Key, torch.Tensor | _Receive] = {}  # of their outputs
        self.outgoing: dict[tuple[type, int, int], torch.Tensor] = {}
        self.products: dict[_Key, list[Callable[[], None]]] = {}
        self.sending: dict[int, list[comm.Pending]] = defaultdict(
            list
        )  # by peer, since the last receive from it was posted
        self.do: dict[type, Callable[[Action], None]] = {
            Forward: self.forward,
            Backward: self.backward,
            BackwardInput: self.backward_input,
            BackwardWeight: self.backward_weight,
            SendActivation: self.send,
            SendGradient: self.send,
            ReceiveActivation: self.receive_activation,
            ReceiveGradient: self.receive_gradient,
        }

    def forward(self, action: Forward) -> None:
        key = action.chunk, action.microbatch
        stage = self.plan.stage(self.pp.rank, action.chunk)
        x = self._arrived(self.inputs.pop(key)) if stage > 0 else None
        if self.plan.forward_only:
            with torch.no_grad():
                y = self.stage(*key, x)
        else:
            x = None if x is None else x.requires_grad_()
            y = self.stage(*key, x)
            self.graphs[key] = x, y
        if stage + 1 < self.plan.num_stages:
            self._hand_on(SendActivation, self.inputs, key, stage + 1, y.detach())

    def backward(self, action: Backward) -> None:
        key = action.chunk, action.microbatch
        stage = self.plan.stage(self.pp.rank, action.chunk)
        x, y = self.graphs.pop(key)
        y.backward(
            self._arrived(self.gradients.pop(key)) if stage + 1 < self.plan.num_stages else None
        )
        if stage > 0:
            self._hand_on(SendGradient, self.gradients, key, stage - 1, x.grad)

    def backward_input(self, action: BackwardInput) -> None:
        with self.deferral.holding() as products:
            self.backward(action)
        self.products[action.chunk, action.microbatch] = products

    @torch.no_grad()
    def backward_weight(self, action: BackwardWeight) -> None:
        for product in self.products.pop((action.chunk, action.microbatch)):
            product()

    def send(self, action: SendActivation | SendGradient) -> None:
        tensor = self.outgoing.pop((type(action), action.chunk, action.microbatch))
        self.sending[action.peer].append(comm.start_send(tensor.contiguous(), self.pp, action.peer))

    def receive_activation(self, action: ReceiveActivation) -> None:
        self.inputs[action.chunk, action.microbatch] = self._receive(action.peer)

    def receive_gradient(self, action: ReceiveGradient) -> None:
        self.gradients[action.chunk, action.microbatch] = self._receive(action.peer)

    def finish(self) -> None:
        for sent in self.sending.values():
            for pending in sent:
                pending.wait()

    def _hand_on(
        self, kind: type, local: dict, key: _Key, to_stage: int, tensor: torch.Tensor
    ) -> None:
        """To the neighbour stage: kept for the send that follows, or straight to another chunk of this rank."""
        rank, chunk = self.plan.rank_and_chunk(to_stage)
        if rank == self.pp.rank:
            local[chunk, key[1]] = tensor
        else:
            self.outgoing[kind, *key] = tensor

    def _receive(self, peer: int) -> "_Receive":
        return _Receive(
            comm.start_receive(self.message.buffer(), self.pp, peer), self.sending.pop(peer, [])
        )

    def _arrived(self, held: "torch.Tensor | _Receive") -> torch.Tensor:
        """The tensor; if it came in a message, let go of what was sent to that rank before: messages of a pair complete in order."""
        if isinstance(held, torch.Tensor):
            return held
        for pending in held.sent_before:
            pending.wait()
        return held.pending.wait()
