"""The order in which the ranks start the reductions of an update.

Problem. Collectives of one process group match up by the order in which each rank starts them. A
bucket is ready when its last gradient is written, but a rank may leave a parameter out, such as an
expert that gets none of its tokens. Were a reduction started whenever a bucket is ready, then

    rank 0  would start  C, B, A
    rank 1  would start  C, A, and at the end of the update B       (no gradient in B)

and rank 0's B would be summed with rank 1's A, or the run would hang.

Idea. All ranks agree beforehand on one list of turns. A bucket that is ready waits until every turn
before its own has been taken. At the end of the update the turns that are left are taken in order,
with zeros where no gradient came:

    turns   C, B, A
    rank 0  starts C, B, A, each as soon as it is ready
    rank 1  starts C, and at the end of the update B, A

The list follows the order in which buckets become ready if no gradient is missing, so that waiting
for a turn then costs nothing: a backward pass goes from the head to the embedding. ZeRO-2 reduces a
bucket after every micro-batch, and with several model chunks their passes take turns as the
pipeline plan says: `BackwardPasses`. The plan is the same on all data-parallel ranks, and so is the
list.

ZeRO-2 waits for a reduction inside a pass, so as not to hold gradients longer than needed. There,
ranks that exchange tokens within a pass (context parallel) must leave out the same parameters; a
layer whose use depends on its tokens has to write a gradient of zeros itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..layout import layout_of


class Reduced(Protocol):
    """A bucket, as far as the order of reductions needs to know it."""

    parameters: Sequence[nn.Parameter]
    uses: int

    def is_ready(self) -> bool:
        """Return whether all gradients of the next reduction are written."""

    def start_reducing(self) -> None:
        """Start the next reduction."""

    def settle(self) -> None:
        """Wait for the reduction under way if it holds memory that nothing else needs."""


@dataclass(frozen=True)
class BackwardPasses:
    """The backward passes of one update on this rank.

    chunks: the parameters of each model chunk.
    order: for a number of micro-batches, the chunk of each pass, in the order in which the passes
        write their last gradients.
    """

    chunks: Sequence[Sequence[nn.Parameter]]
    order: Callable[[int], Sequence[int]]

    def turns(self, buckets: Sequence[Reduced], micro_batches: int) -> list[Reduced]:
        """Return the turns of an update: after every pass, the buckets that it completes.

        They are counted by gradients, as a bucket counts them: where its parameters lie in several
        chunks, two passes of one may complete it.
        """
        # gained[chunk][i]: gradients that one pass of the chunk writes into bucket i.
        gained = [[self._uses(bucket, chunk) for bucket in buckets] for chunk in self.chunks]
        written = [0] * len(buckets)
        turns: list[Reduced] = []
        for chunk in self.order(micro_batches):
            for i, bucket in enumerate(buckets):
                before = written[i] // bucket.uses
                written[i] += gained[chunk][i]
                # As often as the pass takes the bucket past a full set of gradients.
                turns += [bucket] * (written[i] // bucket.uses - before)
        return turns

    def _uses(self, bucket: Reduced, chunk: Sequence[nn.Parameter]) -> int:
        """Return how many gradients of a bucket one pass of a chunk writes."""
        inside = set(chunk)
        shared = [parameter for parameter in bucket.parameters if parameter in inside]
        return sum(layout_of(p).uses // self._holders(p) for p in shared)

    def _holders(self, parameter: nn.Parameter) -> int:
        """Return how many chunks hold a parameter: two for a tied weight with both ends here."""
        return sum(any(p is parameter for p in chunk) for chunk in self.chunks)


class ReductionOrder:
    """The turns of some buckets, and whose it is.

    buckets: in the order in which a backward pass completes them.
    once: each bucket is reduced once an update, not once a micro-batch.
    passes: needed if there are several model chunks.
    """

    def __init__(
        self, buckets: Sequence[Reduced], *, once: bool, passes: BackwardPasses | None = None
    ):
        self.buckets = buckets
        self.once = once
        self.passes = passes
        self._turns: list[Reduced] = []
        self._micro_batches: int | None = None
        self._next = 0
        self._in_flight: Reduced | None = None

    def begin(self, micro_batches: int) -> None:
        """Start an update of so many micro-batches. Each bucket may say so."""
        self._next = 0
        self._in_flight = None
        # The list is the same for every update of the same size, so it is kept.
        if micro_batches != self._micro_batches:
            self._turns = self._list(micro_batches)
            self._micro_batches = micro_batches

    def advance(self) -> None:
        """Start the reductions whose turn has come, as far as their buckets are ready."""
        while self._next < len(self._turns) and self._turns[self._next].is_ready():
            self._start_next()

    def finish(self) -> None:
        """Take all turns that are left: every gradient of the update is written."""
        while self._next < len(self._turns):
            self._start_next()

    def _list(self, micro_batches: int) -> list[Reduced]:
        if self.once:
            return list(self.buckets)
        if self.passes is None:
            return list(self.buckets) * micro_batches
        return self.passes.turns(self.buckets, micro_batches)

    def _start_next(self) -> None:
        bucket = self._turns[self._next]
        self._next += 1
        bucket.start_reducing()
        # One bucket at a time is on its way, so that no more than two are held whole.
        if self._in_flight is not None and self._in_flight is not bucket:
            self._in_flight.settle()
        self._in_flight = bucket
