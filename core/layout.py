"""The one fact per parameter: which named parts it holds, which box of each lies in this rank's tensor, and how its gradient comes together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, Protocol, cast

import torch

from .mesh import Axis
from .role import Role

Box = tuple[tuple[int, int], ...]  # (start, stop) along every dim

_ALONE = Axis("alone")


@dataclass(frozen=True)
class Part:
    """A tensor as a checkpoint knows it, and the box of it that this rank holds.

    `shape` is the global shape without padding; `box` is in its coordinates; `first_row` is where the box begins in the local
    tensor, of which it fills whole rows. `primary` is True on exactly one of the model-parallel ranks that hold the same box:
    that one counts it in the grad norm and writes it. `partial` is the axis over which each rank computes only a share of the
    gradient; over an axis of size 1 the gradient is complete. `role` says what the tensor does in the model: weight decay and
    optimizers that treat matrices by themselves go by it.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    first_row: int = 0
    primary: bool = True
    partial: Axis = _ALONE
    role: Role = Role.MATRIX

    @property
    def columns(self) -> int:
        """Elements of one row of the box."""
        return prod(stop - start for start, stop in self.box[1:])

    @property
    def range(self) -> tuple[int, int]:
        """Where the box lies in the local tensor's memory, in elements: a box of whole rows is one range."""
        first = self.first_row * self.columns
        return first, first + prod(stop - start for start, stop in self.box)

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a contiguous local `tensor` that holds this part."""
        first, last = self.range
        return tensor.view(-1)[first:last].view([stop - start for start, stop in self.box])


@dataclass(frozen=True)
class Piece:
    """A box of a named global tensor together with the memory that holds it: what a checkpoint writes and reads."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    primary: bool = True


class Rows(NamedTuple):
    """The rows of one of several fused projections; `copies` is the axis of the ranks that hold the same ones (fewer heads than ranks)."""

    count: int
    copies: Axis = _ALONE


@dataclass(frozen=True)
class Layout:
    """What one parameter is: its local shape (padding included) and its parts. Elements outside all parts are padding: zero, without gradient.

    `twins` is the axis of the pipeline ranks that hold a copy of it (a tied embedding), over which gradients add up; `uses` is how
    often one micro-batch uses it on this rank, and so how many gradients it gets.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    twins: Axis = _ALONE
    uses: int = 1

    @staticmethod
    def whole(
        name: str,
        shape: tuple[int, ...],
        tp: Axis,
        *,
        partial: bool = False,
        role: Role = Role.MATRIX,
    ) -> "Layout":
        """The same full tensor on every rank of `tp`; `partial` where each of them sees only some of the tokens or heads."""
        box = tuple((0, size) for size in shape)
        axis = tp if partial else _ALONE
        part = Part(name, shape, box, primary=tp.rank == 0, partial=axis, role=role)
        return Layout(shape, (part,))

    @staticmethod
    def rows_cut(
        parts: Mapping[str, int | Rows],
        columns: tuple[int, ...],
        tp: Axis,
        *,
        role: Role = Role.MATRIX,
    ) -> "Layout":
        """Named parts stacked by rows, each cut over `tp` by itself: q, k and v of one fused weight.

        columns: (H,) for a weight, () for a bias.
        """
        placed, row = [], 0
        for name, rows in parts.items():
            count, copies = rows if isinstance(rows, Rows) else Rows(rows)
            local, index = _share(count, tp.size // copies.size, name), tp.rank // copies.size
            box = ((index * local, (index + 1) * local), *((0, c) for c in columns))
            placed.append(Part(name, (count, *columns), box, row, copies.rank == 0, copies, role))
            row += local
        return Layout((row, *columns), tuple(placed))

    @staticmethod
    def columns_cut(
        name: str, rows: int, columns: int, tp: Axis, *, role: Role = Role.MATRIX
    ) -> "Layout":
        """One part [rows, columns], its columns cut over `tp`."""
        local = _share(columns, tp.size, name)
        box = ((0, rows), (tp.rank * local, (tp.rank + 1) * local))
        return Layout((rows, local), (Part(name, (rows, columns), box, role=role),))

    @staticmethod
    def vocabulary_cut(
        name: str,
        rows: int,
        padded_rows: int,
        columns: int,
        tp: Axis,
        *,
        role: Role = Role.EMBEDDING,
    ) -> "Layout":
        """A vocabulary of `rows` padded to `padded_rows`, cut by rows over `tp`; the padding belongs to no part."""
        local = _share(padded_rows, tp.size, name)
        start, stop = (min(rows, (tp.rank + i) * local) for i in (0, 1))
        box = ((start, stop), (0, columns))
        return Layout((local, columns), (Part(name, (rows, columns), box, role=role),))

    def tied(self, twins: Axis, uses: int) -> "Layout":
        """This layout for a weight that also serves as the head: counted on the first of its `twins`, used `uses` times on this rank."""
        parts = tuple(
            replace(part, primary=part.primary and twins.rank == 0) for part in self.parts
        )
        return replace(self, parts=parts, twins=twins, uses=uses)

    def pieces(self, memory: torch.Tensor, prefix: str = "", start: int = 0) -> Iterator[Piece]:
        """The pieces of contiguous `memory` that holds elements start, start + 1, ... of the local tensor, as views; nothing of the padding.

        `prefix` tells a moment from a weight. A range that begins or ends inside a row makes up to three boxes of a part.
        """
        memory = memory.view(-1)
        for part in self.parts:
            begin, end = part.range
            first, last = max(begin, start), min(end, start + memory.numel())
            for low, high, box in _boxes(first - begin, last - begin, part.box):
                held = memory[begin + low - start : begin + high - start].view(
                    [b - a for a, b in box]
                )
                yield Piece(prefix + part.name, part.shape, box, held, part.primary)


class LaidOut(Protocol):
    """A tensor that says how it is cut. torch took the name `.layout` for strides."""

    param_layout: Layout


def attach_layout(parameter: torch.Tensor, layout: Layout) -> None:
    """Make `layout` the layout of a parameter: done where the parameter is made, and nowhere else."""
    cast(LaidOut, parameter).param_layout = layout


def layout_of(parameter: torch.Tensor) -> Layout:
    """Return the layout that a parameter was made with."""
    return cast(LaidOut, parameter).param_layout


def _boxes(start: int, stop: int, box: Box) -> Iterator[tuple[int, int, Box]]:
    """Elements start to stop of a box in memory order, as ranges that are boxes themselves: the end of a row, whole rows, the start of a row."""
    if not box:
        yield from [(start, stop, box)] if stop > start else []
        return
    (top, _), *inner = box
    columns = prod(b - a for a, b in inner)
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            end = start + (stop - start) // columns * columns
            yield start, end, ((top + row, top + end // columns), *inner)
        else:
            end, (left, _) = min(stop, (row + 1) * columns), inner[0]
            yield (
                start,
                end,
                ((top + row, top + row + 1), (left + column, left + column + end - start)),
            )
        start = end


def _share(size: int, ranks: int, name: str) -> int:
    if size % ranks:
        raise ValueError(f"{name}: {size} cannot be cut over {ranks} tensor-parallel ranks")
    return size // ranks
