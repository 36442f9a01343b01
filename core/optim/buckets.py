"""Flat memory for parameters, and the data-parallel collectives over it: weights, gradients, and this rank's shard of the optimizer's state."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import comm
from ..config.sizes import BUCKET_ALIGNMENT
from ..gradients import Deferral, Sink, attach_sink
from ..layout import Part, Piece, layout_of
from ..mesh import Axis

_NO_SHARDS, _NO_COPIES = Axis("shards"), Axis("copies")


@dataclass(frozen=True)
class Reduction:
    """How the copies of a parameter work together: `shards` cut the optimizer's state, each of `copies` holds the same shard.

    overlap: reduce a bucket as soon as its last gradient is there. keep_gradients False (ZeRO-2): after each micro-batch reduce and
    keep the shard's sum alone. deferral: where weight-gradient products may wait.
    """

    shards: Axis = _NO_SHARDS
    copies: Axis = _NO_COPIES
    overlap: bool = False
    keep_gradients: bool = True
    deferral: Deferral = field(default_factory=Deferral)
    in_flight: list["Bucket"] = field(
        default_factory=list
    )  # ZeRO-2: whose gradients are being reduced


class Shard(ABC):
    """What the optimizer updates as one: this rank's share of the memory of some parameters, and what lies where in it.

    slots: the place of each parameter in the whole memory, in elements; this rank's share begins at `start`. masters: the share,
    flat fp32, of which elements before `decayed` have weight decay. gradients: theirs, fp32, summed over data parallel once
    `finish` has returned. own_weights: the share in the working dtype, to be rounded from masters; it may be masters itself.
    """

    reduction: Reduction
    parameters: Sequence[nn.Parameter]
    slots: Sequence[tuple[int, int]]
    start: int
    decayed: int
    masters: torch.Tensor
    gradients: torch.Tensor
    own_weights: torch.Tensor

    @abstractmethod
    def begin(self, micro_batches: int) -> None:
        """Start an update of so many micro-batches from gradients of zero."""

    @abstractmethod
    def start_reduction(self) -> None:
        """All gradients are written: sum them over the shards, unless that has begun."""

    @abstractmethod
    def finish(self) -> None:
        """Return when `gradients` are summed over all copies of the parameters."""

    @abstractmethod
    def start_gather(self) -> None:
        """Fetch the other shards' updated weights; whoever uses a weight next waits for them."""

    @abstractmethod
    def wait_for_weights(self) -> None:
        """Return when the weights are those of the last update."""

    def parts(self) -> Iterator[tuple[Part, int, int]]:
        """Every part that reaches into this shard, and where it lies in it: elements [start, stop)."""
        length = self.masters.numel()
        for parameter, (slot, _) in zip(self.parameters, self.slots, strict=True):
            for part in layout_of(parameter).parts:
                first, last = (
                    min(max(slot + place - self.start, 0), length) for place in part.range
                )
                if last > first:
                    yield part, first, last

    def pieces(self, shard: torch.Tensor, prefix: str = "") -> Iterator[Piece]:
        """The named pieces of a flat tensor of this shard: masters under their plain names, moments under a prefix."""
        for parameter, (start, stop) in zip(self.parameters, self.slots, strict=True):
            first, last = max(start, self.start), min(stop, self.start + shard.numel())
            if last > first:
                yield from layout_of(parameter).pieces(
                    shard[first - self.start : last - self.start], prefix, first - start
                )


class Bucket(Shard):
    """Parameters that are reduced, updated and gathered together.

    weights: flat, in the working dtype; every parameter's data is a view of it. masters: the same memory as the shard's part of
    weights when the working dtype is fp32. Between the slots lies alignment, always zero. Matrices come first: they have weight decay.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        reduction: Reduction,
    ):
        self.reduction, self.deferral = reduction, reduction.deferral
        self.parameters = sorted(parameters, key=lambda parameter: parameter.dim() < 2)
        self.slots: list[tuple[int, int]] = []
        end = decayed = 0
        for parameter in self.parameters:
            self.slots.append((end, end + parameter.numel()))
            end += _aligned(parameter.numel(), BUCKET_ALIGNMENT)
            decayed = end if parameter.dim() > 1 else decayed
        shards = reduction.shards
        self.size = _aligned(end, BUCKET_ALIGNMENT * shards.size)
        length = self.size // shards.size
        self.start = shards.rank * length  # of this rank's shard
        self.decayed = min(max(decayed - self.start, 0), length)
        initial = torch.zeros(self.size, dtype=torch.float32, device=device)
        for parameter, (start, stop) in zip(self.parameters, self.slots, strict=True):
            initial[start:stop] = parameter.detach().flatten()
        self.weights = initial.to(dtype)
        self.masters = comm.share(self.weights if dtype == torch.float32 else initial, shards)
        if dtype != torch.float32 and shards.size > 1:
            self.masters = self.masters.clone()
        self.uses = sum(layout_of(parameter).uses for parameter in self.parameters)
        self._sum = torch.zeros(self.size if reduction.keep_gradients else length, device=device)
        self._fresh: torch.Tensor | None = None  # ZeRO-2: gradients that are not yet reduced
        self._reducing: comm.Pending | None = None
        self._gathering: comm.Pending | None = None
        self._expected = self._written = 0
        for slot, (parameter, (start, stop)) in enumerate(
            zip(self.parameters, self.slots, strict=True)
        ):
            parameter.data = self.weights[start:stop].view(parameter.shape)
            attach_sink(parameter, Sink(self, slot))

    @property
    def gradients(self) -> torch.Tensor:
        return (
            comm.share(self._sum, self.reduction.shards)
            if self.reduction.keep_gradients
            else self._sum
        )

    @property
    def own_weights(self) -> torch.Tensor:
        return comm.share(self.weights, self.reduction.shards)

    def begin(self, micro_batches: int) -> None:
        self._sum.zero_()
        self._expected, self._written = micro_batches * self.uses, 0

    def gradient_of(self, slot: int) -> torch.Tensor:
        start, stop = self.slots[slot]
        if self.reduction.keep_gradients:
            memory = self._sum
        else:
            self._take_in()
            if self._fresh is None:
                self._fresh = torch.zeros(self.size, device=self._sum.device)
            memory = self._fresh
        return memory[start:stop].view(self.parameters[slot].shape)

    def wrote(self) -> None:
        self._written += 1
        if self._written > self._expected:
            raise RuntimeError(
                f"{self}: gradient {self._written} of {self._expected}: a parameter was used more often than its layout says"
            )
        if self.reduction.keep_gradients:
            if self.reduction.overlap and self._written == self._expected:
                self._reducing = comm.start_reduce_scatter(self._sum, self.reduction.shards)
        elif self._written % self.uses == 0:
            # Every so many gradients, not the micro-batch's own: where products are deferred those of two micro-batches mix, and the sum is the same.
            self._reducing = comm.start_reduce_scatter(self._fresh, self.reduction.shards)
            self._fresh = None
            # One bucket at a time is on its way, so that no more than two are held whole.
            for bucket in self.reduction.in_flight:
                bucket._take_in()
            self.reduction.in_flight[:] = [self]
            if not self.reduction.overlap:
                self._take_in()

    def start_reduction(self) -> None:
        if self._written != self._expected:
            raise RuntimeError(
                f"{self}: {self._written} gradients of {self._expected}: a parameter was used less often than its layout says"
            )
        if self.reduction.keep_gradients and self._reducing is None:
            self._reducing = comm.start_reduce_scatter(self._sum, self.reduction.shards)

    def finish(self) -> None:
        if self.reduction.keep_gradients:
            self._reducing.wait()
            self._reducing = None
        else:
            self._take_in()
        comm.all_reduce(self.gradients, self.reduction.copies)
        comm.all_reduce(self.gradients, layout_of(self.parameters[0]).twins)

    def start_gather(self) -> None:
        self._gathering = comm.start_all_gather(self.weights, self.reduction.shards)

    def wait_for_weights(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def _take_in(self) -> None:
        """ZeRO-2: add what the last reduction brought."""
        if self._reducing is not None:
            self._sum += self._reducing.wait()
            self._reducing = None

    def __str__(self) -> str:
        return f"bucket of {layout_of(self.parameters[0]).parts[0].name} and {len(self.parameters) - 1} more"


def make_buckets(
    parameters: Iterable[nn.Parameter],
    dtype: torch.dtype,
    device: torch.device,
    reduction: Reduction,
    size: int,
) -> list[Bucket]:
    """Neighbours in buckets of about `size` elements, in the order in which a forward pass uses them; a tied weight has its own."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in dict.fromkeys(parameters):
        if layout_of(parameter).twins.size > 1 or layout_of(parameter).uses > 1:
            groups.append([parameter])
            room = 0
        elif room <= 0:
            groups.append([parameter])
            room = size - parameter.numel()
        else:
            groups[-1].append(parameter)
            room -= parameter.numel()
    return [Bucket(group, dtype, device, reduction) for group in groups]


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
