"""Where our tensors lie in the tensors of another format: under another name, fused with others, in blocks per head, transposed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..layout import Box, Piece


class Run(NamedTuple):
    """`count` rows of ours, from `ours` on, that are the rows from `theirs` on there."""

    ours: int
    theirs: int
    count: int


@dataclass(frozen=True)
class Place:
    """One of our tensors in one of theirs. shape: of theirs. transposed: theirs is stored columns first."""

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    transposed: bool = False

    def boxes(self, box: Box) -> Iterator[tuple[int, int, Box]]:
        """For a box of ours: its rows [start, stop), counted from the box's first, and the box of theirs that holds them."""
        (first, last), *rest = box
        for run in self.runs:
            start, stop = max(first, run.ours), min(last, run.ours + run.count)
            if start < stop:
                there = ((start - run.ours + run.theirs, stop - run.ours + run.theirs), *rest)
                yield start - first, stop - first, there[::-1] if self.transposed else there


def read_piece(
    piece: Piece, place: Place, read_into: Callable[[str, Box, torch.Tensor], None]
) -> None:
    """Fill a piece of ours; `read_into` copies a box of theirs, by name, into a tensor of any dtype and strides."""
    for start, stop, box in place.boxes(piece.box):
        rows = piece.tensor[start:stop]
        read_into(place.name, box, rows.t() if place.transposed else rows)


def their_shapes(places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Their tensors, in the order in which ours first meet them."""
    return {place.name: place.shape for place in places.values()}


def assemble(
    name: str, places: Mapping[str, Place], read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """One of their tensors, in our dtype; `read` gives a whole tensor of ours by name."""
    parts = {ours: place for ours, place in places.items() if place.name == name}
    if len(parts) == 1 and not any(place.transposed for place in parts.values()):
        return read(*parts)  # it is one of ours as it stands: large ones are not copied
    whole = None
    for ours, place in parts.items():
        tensor = read(ours)
        if whole is None:
            whole = torch.empty(place.shape, dtype=tensor.dtype)
        for start, stop, box in place.boxes(tuple((0, size) for size in tensor.shape)):
            rows = tensor[start:stop]
            whole[tuple(slice(*bounds) for bounds in box)] = rows.t() if place.transposed else rows
    return whole
