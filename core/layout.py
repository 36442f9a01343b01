"""The one fact per parameter: its layout, from which everything else about it follows.

Problem. A parameter on a rank is seldom a tensor that a checkpoint knows. It may be a slice of one,
several of them stacked, padded, or a copy of what other ranks hold too. Initial values, the sum and
the norm of gradients, the optimizer's shards, checkpoints and exports must all agree on which
element is which, and count each once.

Idea. Whoever makes a parameter says once what it is: a `Layout`, made of `Part`s. A part is a
tensor by its global name and shape, and the box of it that lies here. Everything else loops over
parts.

Example. The fused weight of q [8, 4] and k [2, 4] on rank 1 of 2 tensor-parallel ranks:

    q  rows 0-3   on rank 0            local tensor of rank 1, [5, 4]
       rows 4-7   on rank 1   ---->    rows 0-3: part q, box (4, 8) x (0, 4)
    k  row 0      on rank 0
       row 1      on rank 1   ---->    row 4:    part k, box (1, 2) x (0, 4)

    Layout.rows_cut({"q": 8, "k": 2}, columns=(4,), tp)

An optimizer's shard of it may be elements 6 to 18, which begin inside a row of q and end inside k:

    row 1, columns 2-3 of the local tensor    piece q, box (5, 6) x (2, 4)
    rows 2-3                                  piece q, box (6, 8) x (0, 4)
    row 4, columns 0-1                        piece k, box (1, 2) x (0, 2)

Each `Piece` is a box with its memory: checkpoints write and read pieces, so any layout can resume
what any other has written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from typing import Protocol, cast

import torch

from .mesh import Axis
from .role import Role

Box = tuple[tuple[int, int], ...]  # (start, stop) along every dim

_ALONE = Axis("alone")


class ReductionGroup(StrEnum):
    """The ranks that hold the same parameter, and so sum its gradient."""

    DENSE = "dense"  # those of dp x cp
    EXPERT = "expert"  # those of expert_dp: ranks of ep hold other experts


@dataclass(frozen=True)
class Part:
    """A tensor as a checkpoint knows it, and the box of it that this rank holds.

    shape: of the whole tensor, without padding.
    box: what lies here, in the whole tensor's coordinates.
    first_row: row of the local tensor where the box begins; it fills whole rows.
    primary: True on exactly one of the model-parallel ranks that hold the same box; that one counts
        it in the gradient norm and writes it.
    partial: the axis over which each rank computes only a share of the gradient; over an axis of
        size 1 the gradient is complete.
    role: what the tensor does in the model; weight decay and optimizers go by it.
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
        """Return the number of elements of one row of the box."""
        return prod(stop - start for start, stop in self.box[1:])

    @property
    def range(self) -> tuple[int, int]:
        """Return the elements of the local tensor that the box fills: it has whole rows."""
        first = self.first_row * self.columns
        return first, first + prod(stop - start for start, stop in self.box)

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of a contiguous local `tensor` that holds this part."""
        first, last = self.range
        return tensor.view(-1)[first:last].view(_lengths(self.box))


@dataclass(frozen=True)
class Piece:
    """A box of a named tensor together with its memory: what a checkpoint writes and reads."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    primary: bool = True


@dataclass(frozen=True)
class Rows:
    """The rows of one of several fused projections.

    count: of the whole projection.
    copies: the ranks that hold the same rows, if there are fewer heads than ranks.
    """

    count: int
    copies: Axis = _ALONE


@dataclass(frozen=True)
class Layout:
    """The description of one parameter on this rank.

    shape: of the local tensor, padding included.
    parts: what it holds; elements outside all parts are padding: zero, without gradient.
    twins: the pipeline ranks that hold a copy of it (a tied embedding); their gradients add up.
    uses: how often one micro-batch uses it on this rank, and so how many gradients it gets.
    reduction: which ranks hold the same parameter for other samples.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    twins: Axis = _ALONE
    uses: int = 1
    reduction: ReductionGroup = ReductionGroup.DENSE

    @staticmethod
    def whole(
        name: str,
        shape: tuple[int, ...],
        tp: Axis,
        *,
        partial: bool = False,
        role: Role = Role.MATRIX,
    ) -> "Layout":
        """Return the layout of one full tensor that every rank of `tp` holds.

        partial: each rank sees only some of the tokens or heads.
        """
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
        """Return the layout of parts stacked by rows, each cut over `tp` by itself.

        parts: the rows of each by name, such as those of q, k and v.
        columns: (H,) for a weight, () for a bias.
        """
        placed = []
        row = 0
        for name, rows in parts.items():
            if not isinstance(rows, Rows):
                rows = Rows(rows)
            count = rows.count
            copies = rows.copies
            # With fewer key-value heads than ranks, `copies.size` neighbours hold the same rows:
            # the rows are cut among the groups of neighbours, and one of each group counts them.
            local = _divided(count, tp.size // copies.size, name)
            first = tp.rank // copies.size * local
            box = ((first, first + local), *((0, size) for size in columns))
            shape = (count, *columns)
            placed.append(Part(name, shape, box, row, copies.rank == 0, copies, role))
            row += local
        return Layout((row, *columns), tuple(placed))

    @staticmethod
    def columns_cut(
        name: str, rows: int, columns: int, tp: Axis, *, role: Role = Role.MATRIX
    ) -> "Layout":
        """Return the layout of one part [rows, columns], its columns cut over `tp`."""
        local = _divided(columns, tp.size, name)
        first = tp.rank * local
        box = ((0, rows), (first, first + local))
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
        """Return the layout of a vocabulary cut by rows over `tp`.

        rows: the real vocabulary.
        padded_rows: a multiple of tp; what is past `rows` belongs to no part.
        """
        local = _divided(padded_rows, tp.size, name)
        # A rank that holds padding alone has an empty box: start == stop == rows.
        start = min(rows, tp.rank * local)
        stop = min(rows, (tp.rank + 1) * local)
        box = ((start, stop), (0, columns))
        return Layout((local, columns), (Part(name, (rows, columns), box, role=role),))

    def tied(self, twins: Axis, uses: int) -> "Layout":
        """Return this layout for an embedding that also serves as the head.

        twins: the ranks that hold a copy; the first of them counts it.
        uses: how often a micro-batch uses it on this rank.
        """
        # Both ends hold the weight; counted by both it would weigh twice in the gradient norm.
        first = twins.rank == 0
        parts = tuple(replace(part, primary=part.primary and first) for part in self.parts)
        return replace(self, parts=parts, twins=twins, uses=uses)

    def of_expert(self) -> "Layout":
        """Return this layout for a parameter of an expert: its copies are those of expert_dp.

        It is to be made over etp, the tensor axis of experts, and named by its global number.
        """
        return replace(self, reduction=ReductionGroup.EXPERT)

    def pieces(self, memory: torch.Tensor, prefix: str = "", start: int = 0) -> Iterator[Piece]:
        """Return the pieces of contiguous `memory`, as views; nothing of the padding.

        prefix: of their names; it tells a moment from a weight.
        start: element of the local tensor where memory begins. If memory begins or ends inside a
            row, a part has up to three pieces.
        """
        memory = memory.view(-1)
        for part in self.parts:
            # The elements of the part that lie in memory [start, start + numel).
            begin, end = part.range
            first = max(begin, start) - begin
            last = min(end, start + memory.numel()) - begin
            for low, high, box in _boxes(first, last, part.box):
                held = memory[begin + low - start : begin + high - start].view(_lengths(box))
                yield Piece(prefix + part.name, part.shape, box, held, part.primary)


class LaidOut(Protocol):
    """A tensor that says how it is cut. torch took the name `.layout` for strides."""

    param_layout: Layout


def attach_layout(parameter: torch.Tensor, layout: Layout) -> None:
    """Make `layout` the layout of a parameter: done where the parameter is made, nowhere else."""
    cast(LaidOut, parameter).param_layout = layout


def layout_of(parameter: torch.Tensor) -> Layout:
    """Return the layout that a parameter was made with."""
    return cast(LaidOut, parameter).param_layout


def _boxes(start: int, stop: int, box: Box) -> Iterator[tuple[int, int, Box]]:
    """Cut elements start to stop of a box, in memory order, into ranges that are boxes themselves.

    Each is (start, stop, box): the end of a row, whole rows, the start of a row.
    """
    if not box:  # a number: all or nothing
        if stop > start:
            yield start, stop, box
        return
    (top, _), *inner = box
    columns = prod(_lengths(inner))
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            rows = (stop - start) // columns
            end = start + rows * columns
            yield start, end, ((top + row, top + row + rows), *inner)
        else:
            end = min(stop, (row + 1) * columns)
            left = inner[0][0] + column
            yield start, end, ((top + row, top + row + 1), (left, left + end - start))
        start = end


def _lengths(box: Box | list[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in box]


def _divided(size: int, ranks: int, name: str) -> int:
    """Return size / ranks. Raises ValueError if that is not a whole number."""
    if size % ranks:
        raise ValueError(f"{name}: {size} cannot be cut over {ranks} tensor-parallel ranks")
    return size // ranks
