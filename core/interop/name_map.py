"""Correspondences between our tensors and those of another format.

Other formats hold the same numbers under other names, and often in another order: query, key and
value are one tensor, gate and up are one, rows go head by head, or a matrix is stored transposed.
A Correspondence says, for one tensor of ours, which tensor of theirs holds it and which rows there
are which rows of ours. Code that reads or writes a format loops over a table of them and needs no
special case for fused, interleaved or transposed weights.

Example: our q [4, H] and k [4, H] in their qk [8, H], fused head by head with a head size of 2:

    rows of qk    0 1    2 3    4 5    6 7
    hold          q 0 1  k 0 1  q 2 3  k 2 3

    q: Run(ours=0, theirs=0, num_rows=2), Run(ours=2, theirs=4, num_rows=2)
    k: Run(ours=0, theirs=2, num_rows=2), Run(ours=2, theirs=6, num_rows=2)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..layout import Box, Piece


class Run(NamedTuple):
    """Neighbouring rows: the `num_rows` rows from `ours` on are the rows from `theirs` on there."""

    ours: int
    theirs: int
    num_rows: int


class Overlap(NamedTuple):
    """Rows start to stop of a box of ours, and the box of their tensor that holds them."""

    start: int
    stop: int
    theirs: Box


@dataclass(frozen=True)
class Correspondence:
    """One of our tensors in one of theirs.

    name: their tensor
    shape: the shape of their tensor
    runs: which rows are which
    transposed: their tensor is stored as [columns, rows]
    """

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    transposed: bool = False

    def overlaps(self, box: Box) -> Iterator[Overlap]:
        """Yield where a box of our tensor lies in theirs. Rows are counted from the box's first."""
        (first, last), *columns = box
        for run in self.runs:
            start = max(first, run.ours)
            stop = min(last, run.ours + run.num_rows)
            if start >= stop:
                continue
            shift = run.theirs - run.ours
            theirs = ((start + shift, stop + shift), *columns)
            if self.transposed:
                theirs = theirs[::-1]
            yield Overlap(start - first, stop - first, theirs)


def whole_box(shape: tuple[int, ...]) -> Box:
    """Return the box that is all of a tensor of this shape."""
    return tuple((0, size) for size in shape)


def read_piece(
    piece: Piece,
    correspondence: Correspondence,
    read_into: Callable[[str, Box, torch.Tensor], None],
) -> None:
    """Fill a piece of one of our tensors from theirs.

    read_into: copies a box of their tensor, by name, into a tensor of any dtype and strides
    """
    for start, stop, theirs in correspondence.overlaps(piece.box):
        rows = piece.tensor[start:stop]
        read_into(correspondence.name, theirs, rows.t() if correspondence.transposed else rows)


def their_shapes(correspondences: Mapping[str, Correspondence]) -> dict[str, tuple[int, ...]]:
    """Return their tensors with their shapes, in the order in which ours first meet them."""
    return {found.name: found.shape for found in correspondences.values()}


def assemble(
    name: str,
    correspondences: Mapping[str, Correspondence],
    read: Callable[[str], torch.Tensor],
) -> torch.Tensor:
    """Return their tensor `name`, put together from ours, in our dtype.

    read: gives a whole tensor of ours by its name
    """
    parts = {ours: found for ours, found in correspondences.items() if found.name == name}
    first, *others = parts
    tensor = read(first)
    if not others and not parts[first].transposed:
        return tensor  # ours as it stands: a large one is not copied
    whole = torch.empty(parts[first].shape, dtype=tensor.dtype)
    _put(whole, tensor, parts[first])
    for ours in others:
        _put(whole, read(ours), parts[ours])
    return whole


def _put(whole: torch.Tensor, tensor: torch.Tensor, correspondence: Correspondence) -> None:
    """Copy one of our tensors to where it lies in theirs."""
    for start, stop, theirs in correspondence.overlaps(whole_box(tuple(tensor.shape))):
        rows = tensor[start:stop]
        there = tuple(slice(*bounds) for bounds in theirs)
        whole[there] = rows.t() if correspondence.transposed else rows
