"""Find the checkpoint to resume from, verify it across the ranks, and read it for any layout.

A checkpoint holds slices of logical tensors (manifest.py), cut as the run that wrote it was cut. A
rank of another layout asks for boxes of the same tensors. The elements of a box are found in the
slices that meet it, and copied from the boxes that both have in common:

    stored by two ranks    rows 0-3 | rows 4-7
    asked for              rows 2-5            = rows 2-3 of the first, rows 4-5 of the second

Verification comes before anything of the run is changed. All ranks check the JSON files, and share
out the slices: each slice is read once by one rank and its checksum compared. If one rank finds a
fault, all ranks turn to the next older checkpoint together.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from ..layout import Box, Piece
from ..logs import get_logger
from ..mesh import Axis
from . import publish
from .agree import from_first, together
from .manifest import (
    FILE_NAME,
    CheckpointError,
    Entry,
    Manifest,
    Slice,
    check_file,
    intersect,
    read_text,
)
from .rank_files import CONFIG_FILE
from .shards import STORED_DTYPES, TORCH_DTYPES, checksum, open_shard, read_box
from .state import STATE_FILE, read_state


class NothingPublished(CheckpointError):
    """No checkpoint was ever published in the folder: a first launch, or a wrong path."""


class _Read(NamedTuple):
    """One copy to make: the elements that a stored slice and a piece have in common."""

    stored: Slice
    common: Box
    piece: Piece


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, open for reading."""

    folder: Path
    iteration: int
    state: dict
    config_yaml: str
    manifest: Manifest

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return sorted(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in."""
        return TORCH_DTYPES[self._entry(name).dtype]

    def read_into(self, pieces: Iterable[Piece]) -> None:
        """Fill each piece's tensor, converted to its dtype and on its device.

        Any layout may have written the checkpoint. Raises CheckpointError, before anything is
        filled, for a tensor that is missing or has another shape.
        """
        by_file: dict[str, list[_Read]] = defaultdict(list)
        for piece in pieces:
            for read in self._reads(piece):
                by_file[read.stored.file].append(read)
        # One file at a time: a large run has more shards than a process may hold open.
        for file in sorted(by_file):
            with _open_own(self.folder / file) as shard, torch.no_grad():
                for stored, common, piece in by_file[file]:
                    source = read_box(shard, stored.key, _relative(common, stored.box))
                    target = _within(piece.tensor, _relative(common, piece.box))
                    target.copy_(source)

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """Return one tensor, or a box of it, on the CPU in the dtype it is stored in."""
        shape = self.shape(name)
        if box is None:
            box = tuple((0, size) for size in shape)
        sizes = [stop - start for start, stop in box]
        tensor = torch.empty(sizes, dtype=self.dtype(name))
        self.read_into([Piece(name, shape, box, tensor)])
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self.manifest.tensors[name]

    def _reads(self, piece: Piece) -> list[_Read]:
        """Return the copies that fill a piece: together every element of it, once."""
        entry = self._entry(piece.name)
        if entry.shape != tuple(piece.shape):
            raise CheckpointError(
                f"{piece.name} is {list(entry.shape)} in {self.folder}, "
                f"{list(piece.shape)} in this run"
            )
        sizes = tuple(stop - start for start, stop in piece.box)
        if tuple(piece.tensor.shape) != sizes:
            raise CheckpointError(
                f"{piece.name}: a tensor of shape {list(piece.tensor.shape)} is given for box "
                f"{piece.box}"
            )
        reads = []
        for stored in entry.slices:
            common = intersect(stored.box, piece.box)
            if common is not None:
                reads.append(_Read(stored, common, piece))
        # Slices do not overlap (check_cover), so as many elements as wanted are all of them.
        found = sum(_volume(read.common) for read in reads)
        wanted = piece.tensor.numel()
        if found != wanted:
            raise CheckpointError(
                f"{piece.name}: {self.folder} holds {found} of the {wanted} elements of box "
                f"{piece.box}"
            )
        return reads


def open_checkpoint(
    load_dir: Path, *, ckpt_step: int | None = None, world: Axis, device: torch.device
) -> Checkpoint:
    """Return the checkpoint to resume from, verified.

    Every rank of `world` calls this and gets the same one. One that does not verify is named with
    the reason and the next older is tried, except where `ckpt_step` or SAVE/iter_N asks for one
    alone. Raises NothingPublished where none was ever published, CheckpointError where none
    verifies.

    load_dir: SAVE or SAVE/iter_N.
    device: where the ranks agree.
    """
    load_dir = Path(load_dir)
    tries = _tries(load_dir, ckpt_step, world, device)
    if not tries:
        raise NothingPublished(f"{load_dir} holds no published checkpoint")
    for iteration, older in pairwise(tries):
        try:
            return _open_one(publish.locate(load_dir, iteration), iteration, world, device)
        except CheckpointError as error:
            if world.rank == 0:
                get_logger().warning(
                    f"checkpoint {iteration} does not verify: {error}; "
                    f"falling back to iteration {older}"
                )
    return _open_one(publish.locate(load_dir, tries[-1]), tries[-1], world, device)


def _tries(load_dir: Path, ckpt_step: int | None, world: Axis, device: torch.device) -> list[int]:
    """Return the first rank's candidates, on every rank.

    On a shared file system two ranks may see two states of a folder.
    """
    mine: list[int] = []

    def look() -> None:
        if world.rank == 0:
            mine.extend(publish.candidates(load_dir, ckpt_step))

    together(look, world, device)
    count = from_first(len(mine), world, device)
    tries = []
    for i in range(count):
        candidate = mine[i] if world.rank == 0 else -1
        tries.append(from_first(candidate, world, device))
    return tries


def _open_one(folder: Path, iteration: int, world: Axis, device: torch.device) -> Checkpoint:
    """Read the JSON files on every rank and verify this rank's share of the slices.

    Raises CheckpointError on all ranks or on none.
    """
    opened: list[Checkpoint] = []

    def open_and_verify() -> None:
        # The cheap checks first, on every rank: they decide what the slices are compared with.
        for name in (FILE_NAME, STATE_FILE, CONFIG_FILE):
            check_file(folder / name)
        manifest = Manifest.read(folder / FILE_NAME)
        manifest.check_cover(folder / FILE_NAME)
        state = read_state(folder / STATE_FILE, iteration)
        config_yaml = read_text(folder / CONFIG_FILE)
        opened.append(Checkpoint(folder, iteration, state, config_yaml, manifest))
        verify(folder, manifest, world.rank, world.size)

    together(open_and_verify, world, device)
    return opened[0]


def verify(folder: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
    """Check this rank's share of the slices: each is there, as the manifest says, undamaged.

    Over all ranks each slice is read once. A rank's share is a run of slices in file order, equal
    in elements: few files, read in sequence. Raises CheckpointError that names file and slice.
    """
    slices = []
    for entry in manifest.tensors.values():
        slices += [(stored, entry.dtype) for stored in entry.slices]
    slices.sort(key=lambda item: (item[0].file, item[0].key))
    total = sum(prod(stored.shape) for stored, _ in slices)
    # A slice belongs to the rank that its first element falls to, when all elements in file order
    # are cut into `size` equal runs.
    before = 0  # elements of the slices before this one
    by_file: dict[str, list[tuple[Slice, str]]] = defaultdict(list)
    for stored, dtype in slices:
        if before * size // max(1, total) == rank:
            by_file[stored.file].append((stored, dtype))
        before += prod(stored.shape)
    for file, items in by_file.items():
        with _open_own(folder / file) as shard:
            for stored, dtype in items:
                _verify_slice(shard, folder / file, stored, dtype)


def _open_own(path: Path) -> AbstractContextManager[safe_open]:
    """Open a shard that is a file of the folder itself, not a link out of it."""
    check_file(path)
    return open_shard(path)


def _verify_slice(shard: safe_open, path: Path, stored: Slice, dtype: str) -> None:
    """Compare a stored slice with the manifest: shape, dtype, checksum of its bytes."""
    header = shard.get_slice(stored.key)
    shape = tuple(header.get_shape())
    kind = STORED_DTYPES.get(header.get_dtype())
    if shape != stored.shape or kind != TORCH_DTYPES[dtype]:
        raise CheckpointError(
            f"{path}: {stored.key} is {kind} {list(shape)}, "
            f"the manifest says {dtype} {list(stored.shape)}"
        )
    found = checksum(shard.get_tensor(stored.key))
    if found != stored.checksum:
        raise CheckpointError(
            f"{path}: {stored.key} is damaged: {found}, written as {stored.checksum}"
        )


def _within(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the view of `tensor` that is `box`."""
    for dim, (start, stop) in enumerate(box):
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _relative(box: Box, frame: Box) -> Box:
    """Return `box` in the coordinates of `frame`, which it lies in."""
    sides = []
    for (start, stop), (origin, _) in zip(box, frame, strict=True):
        sides.append((start - origin, stop - origin))
    return tuple(sides)


def _volume(box: Box) -> int:
    return prod(stop - start for start, stop in box)
