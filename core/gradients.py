"""Bring the gradient of each weight to its place while a backward pass runs.

The problem. An optimizer keeps all gradients in flat fp32 memory and wants to reduce a bucket over
data parallel as soon as its last gradient is there. Torch's own way is `.grad`, in the working
dtype, with hooks that say when it is there. That is not enough for three reasons:

  - bf16 gradients of many micro-batches must add up in fp32, without a copy in between;
  - zero-bubble schedules hold weight-gradient products back. Autograd's hooks then fire while the
    gradient is still to be computed;
  - a hook does not fire at all for a parameter that a micro-batch did not use, so it cannot be
    counted on.

The idea. A parameter that an optimizer owns has a Sink, its way to the owner's memory. Every use of
the parameter is one of two: a linear layer or the head computes the product dy^T x and adds it to
the sink's memory, at once or when the schedule says; everything else (a norm's weight, a bias, an
embedding) calls `use`, which lets autograd compute the gradient and then adds it. Autograd itself
is told that the parameter has no gradient. The owner counts what was written.

    bucket = Bucket([scale], ...)      # attaches a sink to the parameter `scale`
    y = x * use(scale)                 # waits until the last update's weights have arrived
    y.sum().backward()                 # bucket.gradient_of(0) += dy;  bucket.wrote()
    scale.grad                         # None

A parameter without a sink works as in plain torch: its gradient is `.grad`. torch.compile does not
look into any of this, since it cannot follow the side effects.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .layout import LaidOut


class Deferral:
    """Decides when weight-gradient products run: inside the backward pass, or later.

    Zero-bubble schedules hold them back and run them as their actions W (Qi et al. 2023).

    held: the products that wait, None while products run at once.
    """

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] | None = None

    @contextmanager
    def holding(self) -> Iterator[list[Callable[[], None]]]:
        """Hold products back within, and give the list that they are appended to.

        Calling them in order computes the gradients.
        """
        # Each pass has a list of its own, since the passes of several micro-batches wait at once.
        products: list[Callable[[], None]] = []
        self.held = products
        try:
            yield products
        finally:
            self.held = None

    def run(self, product: Callable[[], None]) -> None:
        """Run a product now, or append it to those that are held back."""
        if self.held is None:
            product()
        else:
            self.held.append(product)


class Owner(Protocol):
    """The memory that holds parameters and their gradients: a bucket of the optimizer.

    In each update it is told of every gradient that is added. It may start to reduce when it has
    seen as many as the layouts promise; a parameter that got none has a gradient of zero.
    """

    deferral: Deferral

    def wait_for_weights(self) -> None:
        """Return when the weights are those of the last update."""

    def gradient_of(self, slot: int) -> Tensor:
        """Return fp32 memory in the parameter's shape, for the next gradient to be added to.

        slot: which of the owner's parameters.
        """
        ...

    def wrote(self) -> None:
        """Take note that one gradient has been added."""


class Sink:
    """One parameter's way to its owner.

    owner: the memory that holds the parameter.
    slot: which of the owner's parameters it is.
    """

    def __init__(self, owner: Owner, slot: int):
        self.owner = owner
        self.slot = slot

    def add(self, gradient: Tensor) -> None:
        """Add a finished gradient."""
        self.owner.gradient_of(self.slot).add_(gradient)
        self.owner.wrote()

    def memory(self) -> Tensor:
        """Return the fp32 memory to add one gradient to, in one or more steps; then call wrote."""
        return self.owner.gradient_of(self.slot)

    def wrote(self) -> None:
        """Tell the owner that the gradient is complete."""
        self.owner.wrote()


class ManagedParameter(LaidOut, Protocol):
    """A torch parameter with its layout and, once an optimizer owns it, its sink."""

    sink: Sink


def attach_sink(parameter: nn.Parameter, sink: Sink) -> None:
    """Send the parameter's gradients to `sink` from now on."""
    cast(ManagedParameter, parameter).sink = sink


def sink_of(parameter: Tensor) -> Sink | None:
    """Return the parameter's sink, None where no optimizer owns its memory."""
    return getattr(parameter, "sink", None)


def ready_sink(parameter: Tensor) -> Sink | None:
    """Wait until the parameter's last update has arrived, then return its sink, if any.

    For use inside an autograd function, which brings the gradient to the sink itself.
    """
    sink = sink_of(parameter)
    if sink is not None:
        sink.owner.wait_for_weights()
    return sink


# Outside of compiled graphs, which cannot hold the waiting and the adding.
@torch.compiler.disable
def use(parameter: nn.Parameter) -> Tensor:
    """Return the parameter for use in plain operations; autograd's gradient goes to its sink."""
    sink = ready_sink(parameter)
    return parameter if sink is None else _Use.apply(parameter, sink)


class _Use(torch.autograd.Function):
    """The identity, whose backward adds the gradient to a sink and gives autograd none."""

    @staticmethod
    def forward(ctx, parameter, sink):
        ctx.sink = sink
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, gradient):
        ctx.sink.add(gradient)
        # None to autograd: it would keep a second copy in `.grad`, in the working dtype.
        return None, None
