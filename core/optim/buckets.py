"""Flat memory for parameters, and the data-parallel collectives over it.

Problem. A model has hundreds of tensors. To reduce, update and gather each by itself would cost a
message and a kernel launch a tensor, and ZeRO wants the optimizer's state cut into equal shares
whatever the shapes are.

Idea. Parameters lie one after another in flat memory, a *bucket* of about 40 million elements, and
each of them is a view of it. One collective then reduces a bucket, one kernel updates it, and a
rank's *shard* is an equal range of its elements. Example with three parameters over two shards,
each slot aligned to 8 elements (really to 64); parameters that decay come first (groups.py):

    element   0          8                     24     32
              | w [2, 3] . | v [4, 4]          | b [5] . |
              | shard of rank 0     | shard of rank 1    |
              0                     16                   32

Rank 1 updates the second half of v with weight decay, and b without.

An update goes through these steps:

1. begin: the gradients are zero.
2. Backward passes add gradients to flat fp32 memory, through the parameters' sinks.
3. Reduce-scatter over `shards`: each rank has the sum of its shard. When: see order.py.
4. All-reduce over `copies`, the ranks with the same shard, and over the twins of a tied weight.
5. The optimizer updates the shard's fp32 masters and rounds its weights from them.
6. All-gather over `shards`: each rank has all updated weights.

Bytes a rank holds of P elements, d shards and a working dtype of e bytes, beside the moments:

    strategy     weights   gradients                    masters
    no_shard     e P       4 P                          4 P, or the weights themselves if fp32
    optim        e P       4 P                          4 P / d, or a part of the weights
    optim_grads  e P       4 P / d and two buckets      as optim (ZeRO-2)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from .. import comm
from ..config.sizes import BUCKET_ALIGNMENT
from ..gradients import Deferral, Sink, attach_sink
from ..layout import Layout, Part, Piece, ReductionGroup, layout_of
from ..mesh import Axis, Mesh
from ..role import Role
from .groups import Group, group_of
from .order import BackwardPasses, ReductionOrder

_NO_SHARDS = Axis("shards")
_NO_COPIES = Axis("copies")


@dataclass(frozen=True)
class Reduction:
    """The way that the ranks that hold the same parameters work together.

    shards: the ranks over which the optimizer's state is cut.
    copies: the ranks that hold the same shard.
    overlap: reduce a bucket while the backward pass goes on.
    keep_gradients: False (ZeRO-2) to reduce after each micro-batch and keep the shard's sum alone.
    deferral: where weight-gradient products may wait.
    """

    shards: Axis = _NO_SHARDS
    copies: Axis = _NO_COPIES
    overlap: bool = False
    keep_gradients: bool = True
    deferral: Deferral = field(default_factory=Deferral)


# How the parameters of each reduction group are reduced.
Reductions = Mapping[ReductionGroup, Reduction]


def reductions_over(mesh: Mesh, dense: Reduction | None = None) -> Reductions:
    """Return the reductions of dense parameters and of experts over the axes of a mesh.

    dense: overlap, gradients to keep and deferral of both; its axes are the mesh's.
    """
    how = Reduction() if dense is None else dense
    return {
        ReductionGroup.DENSE: replace(how, shards=mesh.shards, copies=mesh.copies),
        ReductionGroup.EXPERT: replace(how, shards=mesh.expert_shards, copies=mesh.expert_copies),
    }


class GroupSpan(NamedTuple):
    """The elements start to stop of a shard, all of one parameter group."""

    group: Group
    start: int
    stop: int


class PartialSum(NamedTuple):
    """The elements start to stop of a shard, whose gradient adds up over an axis."""

    axis: Axis
    start: int
    stop: int


class Shard(ABC):
    """One rank's share of the memory of some parameters: what the optimizer updates as one.

    parameters, slots: each parameter and its place in the whole memory, in elements.
    start, length: this rank's share of it, in elements.
    spans: the shard by parameter group; only those with elements.
    counted: ranges of the shard that this rank counts in the gradient norm. Over all ranks each
        element counts once: of a box that several model-parallel ranks hold, the primary part; of a
        shard, the first of its copies. Ranks of `ep` hold different experts, and each counts its
        own.
    partial_sums: ranges whose gradients are shares of a sum over an axis.

    All of these are fixed when the shard is made: a step looks nothing up in the layouts.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        slots: Sequence[tuple[int, int]],
        reduction: Reduction,
        start: int,
        length: int,
    ):
        self.parameters = parameters
        self.slots = slots
        self.reduction = reduction
        self.start = start
        self.length = length
        self.layouts: list[Layout] = [layout_of(parameter) for parameter in parameters]
        self.spans = self._find_spans()
        self.counted: list[tuple[int, int]] = []
        self.partial_sums: list[PartialSum] = []
        for part, first, last in self._parts():
            if part.primary and reduction.copies.rank == 0:
                self.counted.append((first, last))
            if part.partial.size > 1:
                self.partial_sums.append(PartialSum(part.partial, first, last))

    @property
    @abstractmethod
    def masters(self) -> torch.Tensor:
        """Return the shard's weights, flat fp32."""

    @property
    @abstractmethod
    def gradients(self) -> torch.Tensor:
        """Return the shard's gradients, flat fp32: of the whole batch once `finish` is done."""

    @property
    @abstractmethod
    def own_weights(self) -> torch.Tensor:
        """Return the shard's weights in the working dtype, flat; may be masters itself."""

    @abstractmethod
    def begin(self, micro_batches: int) -> None:
        """Start an update of so many micro-batches from gradients of zero."""

    @abstractmethod
    def start_reduction(self) -> None:
        """Start the sum over the shards, unless that has begun: all gradients are written.

        A parameter without a gradient has one of zeros.
        """

    @abstractmethod
    def finish(self) -> None:
        """Wait until `gradients` are summed over all copies of the parameters."""

    @abstractmethod
    def start_gather(self) -> None:
        """Fetch the other shards' updated weights; whoever uses a weight next waits for them."""

    @abstractmethod
    def wait_for_weights(self) -> None:
        """Wait until the weights are those of the last update."""

    def pieces(self, shard: torch.Tensor, prefix: str = "") -> Iterator[Piece]:
        """Return the named pieces of a flat tensor of this shard.

        prefix: of the names; none for masters, `optim.exp_avg.` for that moment.
        """
        for layout, (start, stop) in zip(self.layouts, self.slots, strict=True):
            first = max(start, self.start)
            last = min(stop, self.start + shard.numel())
            if last > first:
                memory = shard[first - self.start : last - self.start]
                yield from layout.pieces(memory, prefix, first - start)

    def _parts(self) -> Iterator[tuple[Part, int, int]]:
        """Return every part that reaches into this shard, and its elements first to last there."""
        for layout, (slot, _) in zip(self.layouts, self.slots, strict=True):
            for part in layout.parts:
                first, last = (self._inside(slot + element) for element in part.range)
                # Equal where the part ends before the shard or begins after it.
                if last > first:
                    yield part, first, last

    def _find_spans(self) -> list[GroupSpan]:
        """Return the spans of each group: from its first slot to the first slot of the next one."""
        starts: dict[Group, int] = {}
        for parameter, (slot, _) in zip(self.parameters, self.slots, strict=True):
            starts.setdefault(group_of(parameter), self._inside(slot))
        groups = list(starts)
        spans = []
        for i, group in enumerate(groups):
            stop = starts[groups[i + 1]] if i + 1 < len(groups) else self.length
            if stop > starts[group]:
                spans.append(GroupSpan(group, starts[group], stop))
        return spans

    def _inside(self, element: int) -> int:
        """Return where an element of the whole memory lies in this shard, or the nearest end."""
        return min(max(element - self.start, 0), self.length)


class Bucket(Shard):
    """Parameters that are reduced, updated and gathered together.

    weights: flat, in the working dtype; the data of every parameter is a view of it. Between slots
        lies alignment, always zero.
    uses: how many gradients the parameters get from one micro-batch.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        reduction: Reduction,
    ):
        # By group, so that each group is one range of the memory and a rule is called once for it.
        ordered = sorted(parameters, key=group_of)
        slots, end = _slots_of(ordered)
        shards = reduction.shards
        # Collectives want shares of equal size, and each share begins on an aligned element.
        self.size = _aligned(end, BUCKET_ALIGNMENT * shards.size)
        length = self.size // shards.size
        super().__init__(ordered, slots, reduction, shards.rank * length, length)
        self.deferral = reduction.deferral
        self.uses = sum(layout.uses for layout in self.layouts)
        self.twins = self.layouts[0].twins
        self._take_weights(dtype, device)
        keeps = reduction.keep_gradients
        # One shard that keeps its gradients has nothing to reduce over shards, and takes no turns.
        self._takes_turns = shards.size > 1 or not keeps
        self._sum = torch.zeros(self.size if keeps else length, device=device)
        self._gradients = comm.own_slice(self._sum, shards) if keeps else self._sum
        self._fresh: torch.Tensor | None = None  # ZeRO-2: gradients that are not yet reduced
        self._order = ReductionOrder([self], once=keeps)
        self._reducing: comm.Pending | None = None
        self._gathering: comm.Pending | None = None
        self._expected = 0  # gradients in this update
        self._written = 0
        self._reductions = 0  # started in this update

    def _take_weights(self, dtype: torch.dtype, device: torch.device) -> None:
        """Copy the parameters' values into flat memory, and make each parameter a view of it."""
        initial = torch.zeros(self.size, dtype=torch.float32, device=device)
        for parameter, (start, stop) in zip(self.parameters, self.slots, strict=True):
            initial[start:stop] = parameter.detach().flatten()
        self.weights = initial.to(dtype)
        shards = self.reduction.shards
        self._own_weights = comm.own_slice(self.weights, shards)
        # fp32 weights are their own masters: no second copy, and nothing to round.
        if dtype == torch.float32:
            self._masters = self._own_weights
        else:
            self._masters = comm.own_slice(initial, shards)
            if shards.size > 1:
                self._masters = self._masters.clone()  # a view would keep all of `initial`
        for slot, parameter in enumerate(self.parameters):
            start, stop = self.slots[slot]
            parameter.data = self.weights[start:stop].view(parameter.shape)
            attach_sink(parameter, Sink(self, slot))

    @property
    def masters(self) -> torch.Tensor:
        return self._masters

    @property
    def gradients(self) -> torch.Tensor:
        return self._gradients

    @property
    def own_weights(self) -> torch.Tensor:
        return self._own_weights

    def reduce_in(self, order: ReductionOrder) -> None:
        """Reduce in turn with other buckets from now on."""
        self._order = order

    def begin(self, micro_batches: int) -> None:
        self._sum.zero_()
        self._expected = micro_batches * self.uses
        self._written = 0
        self._reductions = 0
        if self._takes_turns:
            self._order.begin(micro_batches)

    def gradient_of(self, slot: int) -> torch.Tensor:
        """Return the fp32 memory that the next gradient of a parameter is to be added to."""
        start, stop = self.slots[slot]
        memory = self._sum if self.reduction.keep_gradients else self._fresh_memory()
        return memory[start:stop].view(self.parameters[slot].shape)

    def wrote(self) -> None:
        """Take note that one gradient has been added."""
        self._written += 1
        if self._written > self._expected:
            count = f"gradient {self._written} of {self._expected}"
            raise RuntimeError(
                f"{self}: {count}: a parameter was used more often than its layout says"
            )
        if self._takes_turns and self.is_ready():
            self._order.advance()

    def is_ready(self) -> bool:
        """Return whether the next reduction may start, as far as this bucket knows."""
        if self.reduction.keep_gradients:
            return self.reduction.overlap and self._written == self._expected
        # Every so many gradients, not the micro-batch's own: where products are deferred those of
        # two micro-batches mix, and the sum is the same.
        return self._written // self.uses > self._reductions

    def start_reducing(self) -> None:
        """Start the next reduction over the shards: this bucket's turn has come."""
        self._reductions += 1
        if self.reduction.keep_gradients:
            self._reducing = comm.start_reduce_scatter(self._sum, self.reduction.shards)
            return
        fresh = self._fresh_memory()
        self._fresh = None
        self._reducing = comm.start_reduce_scatter(fresh, self.reduction.shards)
        if not self.reduction.overlap:
            self.settle()

    def settle(self) -> None:
        """Wait for the reduction under way, and add what it brought to the sum (ZeRO-2)."""
        if self._reducing is not None and not self.reduction.keep_gradients:
            self._sum += self._reducing.wait()
            self._reducing = None

    def start_reduction(self) -> None:
        if self._takes_turns:
            self._order.finish()

    def finish(self) -> None:
        self.settle()
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None
        # After the sum over shards, so that only this rank's share travels between the copies.
        comm.all_reduce(self._gradients, self.reduction.copies)
        # Last: each end of a tied weight adds what its whole data-parallel group has found.
        comm.all_reduce(self._gradients, self.twins)

    def start_gather(self) -> None:
        self._gathering = comm.start_all_gather(self.weights, self.reduction.shards)

    def wait_for_weights(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def _fresh_memory(self) -> torch.Tensor:
        """Return the memory of gradients not yet reduced, zeros to begin with (ZeRO-2)."""
        if self._fresh is None:
            self.settle()  # so that this bucket is held whole once, not twice
            self._fresh = torch.zeros(self.size, device=self._sum.device)
        return self._fresh

    def __str__(self) -> str:
        others = len(self.parameters) - 1
        return f"bucket of {self.layouts[0].parts[0].name} and {others} more"


def make_buckets(
    parameters: Iterable[nn.Parameter],
    dtype: torch.dtype,
    device: torch.device,
    reductions: Reductions,
    size: int,
    passes: BackwardPasses | None = None,
) -> list[Bucket]:
    """Lay parameters out in buckets of about `size` elements.

    parameters: in the order in which a forward pass uses them. Neighbours share a bucket, if their
        reduction group is the same; a tied weight has one of its own.
    passes: the backward passes of an update, if there are several model chunks.
    """
    # Once each: a tied weight on the rank of both ends comes up twice.
    ordered = list(dict.fromkeys(parameters))
    shared: list[list[nn.Parameter]] = []
    last: ReductionGroup | None = None
    room = 0
    for parameter in ordered:
        layout = layout_of(parameter)
        # A tied weight is summed over its twins as well, and neighbours must not be.
        alone = layout.twins.size > 1 or layout.uses > 1
        if alone or room <= 0 or layout.reduction is not last:
            shared.append([parameter])
            room = 0 if alone else size - parameter.numel()
        else:
            shared[-1].append(parameter)
            room -= parameter.numel()
        last = layout.reduction
    buckets = []
    for group in shared:
        reduction = reductions[layout_of(group[0]).reduction]
        buckets.append(Bucket(group, dtype, device, reduction))
    _put_in_order(buckets, ordered, passes)
    return buckets


def _put_in_order(
    buckets: Sequence[Bucket], ordered: Sequence[nn.Parameter], passes: BackwardPasses | None
) -> None:
    """Let buckets reduce in the order in which a backward pass completes them.

    A bucket is complete with the gradient of its parameter that a forward pass uses first.
    """
    place = {parameter: i for i, parameter in enumerate(ordered)}

    def first_use(bucket: Bucket) -> int:
        return min(
            len(ordered) if _is_head(layout) else place[parameter]
            for parameter, layout in zip(bucket.parameters, bucket.layouts, strict=True)
        )

    last_first = sorted(buckets, key=first_use, reverse=True)
    order = ReductionOrder(
        last_first,
        once=all(bucket.reduction.keep_gradients for bucket in buckets),
        passes=passes,
    )
    for bucket in buckets:
        bucket.reduce_in(order)


def _is_head(layout: Layout) -> bool:
    """Return whether a parameter is used at the end of a pass: a head, or the last twin of one."""
    return layout.parts[0].role is Role.HEAD or layout.twins.rank > 0


def _slots_of(parameters: Sequence[nn.Parameter]) -> tuple[list[tuple[int, int]], int]:
    """Return the elements of each parameter in flat memory, and where the last slot ends."""
    slots = []
    end = 0
    for parameter in parameters:
        slots.append((end, end + parameter.numel()))
        end += _aligned(parameter.numel(), BUCKET_ALIGNMENT)
    return slots, end


def _aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
