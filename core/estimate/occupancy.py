"""Find the moment at which a pipeline rank holds the most activations.

While a rank works through its plan it holds, for each of its chunks, some micro-batches whole (from
their forward to their backward pass) and of some others only the operands of the weights' gradient
(from BackwardInput to BackwardWeight, in schedules that split the two). Chunks differ in size, so
the fullest moment depends on bytes that a plan does not know. `occupancies` therefore lists every
count that could be the fullest, once for a plan; `fullest` takes the largest for given bytes.

An example, one chunk under 1F1B on the first of two ranks, three micro-batches:

    F0        holds 1, works on it
    F1        holds 2, works on one of them
    B0, F2    holds 2 again
    B1, B2    hold less

Only "holds 2, works on one of them" is listed: every other moment holds no more of anything.
"""

from collections.abc import Iterable, Sequence
from operator import ge, mul
from typing import NamedTuple

from ..pipeline.actions import Action, Backward, BackwardInput, BackwardWeight, Forward, Message
from .activations import ActivationMemory


class Occupancy(NamedTuple):
    """The micro-batches that a rank holds at one moment, counted by chunk.

    held: first of every chunk those held whole, then of every chunk those whose weights' gradient
    waits. at_work: the chunk that computes, and so needs working memory; None between two actions.
    """

    held: tuple[int, ...]
    at_work: int | None

    def covers(self, other: "Occupancy") -> bool:
        """Return whether this moment needs at least as much as `other`, whatever the bytes."""
        works_alike = other.at_work is None or other.at_work == self.at_work
        return works_alike and all(map(ge, self.held, other.held))


class Peak(NamedTuple):
    """The moment that needs most memory.

    activations, working: bytes. chunks: how many chunks' activations are held, whole or in part.
    """

    activations: int
    working: int
    chunks: int


def occupancies(actions: Iterable[Action], chunks: int) -> list[Occupancy]:
    """List what a rank holds while its actions run, leaving out moments that another one covers."""
    found = _all_occupancies(actions, chunks)
    return [
        moment
        for moment in found
        if not any(other.covers(moment) for other in found if other != moment)
    ]


def _all_occupancies(actions: Iterable[Action], chunks: int) -> set[Occupancy]:
    held = [0] * (2 * chunks)
    found = set()
    for action in actions:
        if isinstance(action, Message):
            continue
        kind = type(action)
        whole, waiting = action.chunk, chunks + action.chunk
        if kind is Forward:
            held[whole] += 1
        if kind is not BackwardWeight:
            found.add(Occupancy(tuple(held), action.chunk))
        if kind in (Backward, BackwardInput):
            held[whole] -= 1
        if kind is BackwardInput:
            held[waiting] += 1
            found.add(Occupancy(tuple(held), None))
        if kind is BackwardWeight:
            held[waiting] -= 1
    return found


def fullest(found: Iterable[Occupancy], activations: Sequence[ActivationMemory]) -> Peak:
    """Return the moment that needs most. activations: the bytes of each of the rank's chunks."""
    whole = [chunk.held for chunk in activations]
    waiting = [chunk.deferred for chunk in activations]
    sizes = whole + waiting
    peaks = []
    for held, at_work in found:
        working = 0 if at_work is None else activations[at_work].working
        peaks.append(Peak(sum(map(mul, held, sizes)), working, sum(held)))
    return max(peaks, key=lambda peak: peak.activations + peak.working)
