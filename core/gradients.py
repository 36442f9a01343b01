"""Where a weight's gradient goes while a backward pass runs: into memory that its owner gives, at once or when the schedule says.

Every use of a parameter passes through here, because hooks cannot tell what is needed: autograd's fire even where a gradient is
still to be computed, and not at all where a parameter was not used. torch.compile does not see it: it cannot follow the side effects.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import nn

from .layout import LaidOut


class Deferral:
    """Whether weight-gradient products run inside a backward pass, or are held back for later: the W of zero-bubble schedules."""

    def __init__(self):
        self.held: list[Callable[[], None]] | None = None

    @contextmanager
    def holding(self) -> Iterator[list[Callable[[], None]]]:
        """Within, products are appended to the list this gives; calling them in order computes the gradients."""
        self.held = []
        try:
            yield self.held
        finally:
            self.held = None

    def run(self, product: Callable[[], None]) -> None:
        if self.held is None:
            product()
        else:
            self.held.append(product)


class Owner(Protocol):
    """The memory that holds a parameter (an optimizer's bucket)."""

    deferral: Deferral

    def wait_for_weights(self) -> None:
        """Return when the weights are those of the last update."""

    def gradient_of(self, slot: int) -> torch.Tensor:
        """fp32 memory in the parameter's shape, which the next gradient is to be added to."""

    def wrote(self) -> None:
        """Take note that one gradient has been added."""


class Sink:
    """One parameter's way to its owner. A parameter without a sink gets its gradient from autograd as `.grad`."""

    def __init__(self, owner: Owner, slot: int):
        self.owner, self.slot = owner, slot

    def add(self, gradient: torch.Tensor) -> None:
        """Add a finished gradient."""
        self.owner.gradient_of(self.slot).add_(gradient)
        self.owner.wrote()

    def add_product(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """Add dy^T x, of dy [N, O] and x [N, I]."""
        with self.opened() as main:
            add_product(main, dy, x)

    @contextmanager
    def opened(self) -> Iterator[torch.Tensor]:
        """The fp32 memory that a gradient is to be added to in several steps; it counts as one when this is left."""
        yield self.owner.gradient_of(self.slot)
        self.owner.wrote()


def add_product(main: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """Add dy^T x to fp32 memory, of dy [N, O] and x [N, I]; in fp32 the GEMM itself accumulates."""
    if x.dtype == main.dtype:
        main.addmm_(dy.t(), x)
    else:
        main.add_(dy.t() @ x)


def current(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, once its last update has arrived: for use inside an autograd function, which brings the gradient to the sink itself."""
    sink = sink_of(parameter)
    if sink is not None:
        sink.owner.wait_for_weights()
    return parameter


@torch.compiler.disable
def use(parameter: nn.Parameter) -> torch.Tensor:
    """The parameter for use in plain operations: autograd's gradient of it goes to its sink."""
    sink = sink_of(current(parameter))
    return parameter if sink is None else _Use.apply(parameter, sink)


class ManagedParameter(LaidOut, Protocol):
    """What we add to a torch parameter: its layout, and once an optimizer owns its memory, its sink."""

    sink: Sink


def attach_sink(parameter: nn.Parameter, sink: Sink) -> None:
    """Send the parameter's gradients to `sink` from now on."""
    cast(ManagedParameter, parameter).sink = sink


def sink_of(parameter: nn.Parameter) -> Sink | None:
    """Return the parameter's sink, None where no optimizer owns its memory."""
    return getattr(parameter, "sink", None)


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, sink):
        ctx.sink = sink
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, gradient):
        ctx.sink.add(gradient)
        return None, None
