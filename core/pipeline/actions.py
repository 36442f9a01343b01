"""The actions that a pipeline plan is made of: compute actions and messages."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Compute:
    """Work of one of the rank's model chunks (0 to v - 1) on one micro-batch."""

    chunk: int
    microbatch: int


class Forward(Compute):
    """Run the chunk forward (F)."""


class Backward(Compute):
    """Compute input and weight gradients together."""


class BackwardInput(Compute):
    """Compute the gradient of the chunk's input alone (B), which the stage before waits for."""


class BackwardWeight(Compute):
    """Compute the gradients of the chunk's weights (W), which nobody waits for."""


@dataclass(frozen=True, slots=True)
class Message:
    """A transfer between this rank's `chunk` and the neighbour stage, on pipeline rank `peer`.

    Sends are asynchronous. Receives are only posted; the compute action that needs one waits.
    """

    chunk: int
    microbatch: int
    peer: int


class SendActivation(Message):
    """Send the output of `chunk`."""


class ReceiveActivation(Message):
    """Receive the input of `chunk`."""


class SendGradient(Message):
    """Send the gradient of the input of `chunk`."""


class ReceiveGradient(Message):
    """Receive the gradient of the output of `chunk`."""


Action = Compute | Message
