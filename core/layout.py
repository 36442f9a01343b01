"""The one fact per parameter: which named parts it holds, and which box of each part lies in this rank's tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .mesh import Axis

Box = tuple[tuple[int, int], ...]  # (start, stop) along every dim


@dataclass(frozen=True)
class Part:
    """A tensor as a checkpoint knows it, and the box of it that this rank holds.

    `shape` is the global shape without padding; `box` is in its coordinates; `origin` is where the box begins in the local
    tensor. `primary` is True on exactly one of the model-parallel ranks that hold the same box: that one counts it in the
    grad norm and writes it.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    origin: tuple[int, ...]
    primary: bool = True

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a local `tensor` that holds this part."""
        for dim, ((start, stop), origin) in enumerate(zip(self.box, self.origin, strict=True)):
            tensor = tensor.narrow(dim, origin, stop - start)
        return tensor


@dataclass(frozen=True)
class Piece:
    """A box of a named global tensor together with the memory that holds it: what a checkpoint writes and reads."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    primary: bool = True


@dataclass(frozen=True)
class Layout:
    """What one parameter is: its local shape (padding included) and its parts. Elements outside all parts are padding: zero, without gradient."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @staticmethod
    def whole(name: str, shape: tuple[int, ...], tp: Axis) -> "Layout":
        """The same full tensor on every rank of `tp`."""
        box = tuple((0, size) for size in shape)
        return Layout(shape, (Part(name, shape, box, (0,) * len(shape), tp.rank == 0),))

    @staticmethod
    def rows_cut(parts: dict[str, int], columns: tuple[int, ...], tp: Axis) -> "Layout":
        """Named parts stacked by rows, each cut over `tp` by itself: {q: 4096, k: 1024, v: 1024} of one fused weight.

        columns: (H,) for a weight, () for a bias.
        """
        placed, row = [], 0
        for name, rows in parts.items():
            local = _share(rows, tp, name)
            box = ((tp.rank * local, (tp.rank + 1) * local), *((0, c) for c in columns))
            placed.append(Part(name, (rows, *columns), box, (row, *(0 for _ in columns))))
            row += local
        return Layout((row, *columns), tuple(placed))

    @staticmethod
    def columns_cut(name: str, rows: int, columns: int, tp: Axis) -> "Layout":
        """One part [rows, columns], its columns cut over `tp`."""
        local = _share(columns, tp, name)
        box = ((0, rows), (tp.rank * local, (tp.rank + 1) * local))
        return Layout((rows, local), (Part(name, (rows, columns), box, (0, 0)),))

    @staticmethod
    def vocabulary_cut(name: str, rows: int, padded_rows: int, columns: int, tp: Axis) -> "Layout":
        """A vocabulary of `rows` padded to `padded_rows`, cut by rows over `tp`; the padding belongs to no part."""
        local = _share(padded_rows, tp, name)
        start, stop = (min(rows, (tp.rank + i) * local) for i in (0, 1))
        return Layout((local, columns), (Part(name, (rows, columns), ((start, stop), (0, columns)), (0, 0)),))

    def pieces(self, tensor: torch.Tensor, prefix: str = "") -> Iterator[Piece]:
        """The pieces of a local tensor of this layout, as views; `prefix` tells a moment from a weight. Empty boxes are left out."""
        for part in self.parts:
            if all(stop > start for start, stop in part.box):
                yield Piece(prefix + part.name, part.shape, part.box, part.within(tensor), part.primary)


def _share(size: int, tp: Axis, name: str) -> int:
    if size % tp.size:
        raise ValueError(f"{name}: {size} cannot be cut over {tp.size} tensor-parallel ranks")
    return size // tp.size
