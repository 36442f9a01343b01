"""Loading: find the checkpoint to resume from, verify it across the ranks, fill any layout from its slices."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch

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
from .part import CONFIG_FILE
from .shards import STORED_DTYPES, TORCH_DTYPES, checksum, open_shard, read_box
from .state import STATE_FILE, read_state


class NothingPublished(CheckpointError):
    """No checkpoint was ever published in the folder: a first launch, or a wrong path."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, open for reading."""

    folder: Path
    iteration: int
    state: dict
    config_yaml: str
    manifest: Manifest

    def names(self) -> list[str]:
        return sorted(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self._entry(name).dtype]

    def read_into(self, pieces: Iterable[Piece]) -> None:
        """Fill each piece's tensor, converted to its dtype and on its device, whatever cut wrote the checkpoint.

        Raises CheckpointError, before anything is filled, for a tensor that is missing or has another shape.
        """
        by_file: dict[str, list[tuple[Slice, Box, Piece]]] = defaultdict(list)
        for piece in pieces:
            for stored, common in self._sources(piece):
                by_file[stored.file].append((stored, common, piece))
        # One file at a time: a large run has more shards than a process may hold open.
        for file, reads in sorted(by_file.items(), key=lambda item: item[0]):
            with _open_own(self.folder / file) as shard, torch.no_grad():
                for stored, common, piece in reads:
                    source = read_box(shard, stored.key, _relative(common, stored.box))
                    _within(piece.tensor, _relative(common, piece.box)).copy_(source)

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """One tensor, or a box of it, on the CPU in the dtype it is stored in."""
        shape = self.shape(name)
        box = box if box is not None else tuple((0, size) for size in shape)
        tensor = torch.empty([stop - start for start, stop in box], dtype=self.dtype(name))
        self.read_into([Piece(name, shape, box, tensor)])
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self.manifest.tensors[name]

    def _sources(self, piece: Piece) -> list[tuple[Slice, Box]]:
        """The slices that meet a piece, with the common boxes: together every element of the piece, once."""
        entry = self._entry(piece.name)
        if entry.shape != tuple(piece.shape):
            raise CheckpointError(
                f"{piece.name} is {list(entry.shape)} in {self.folder}, {list(piece.shape)} in this run"
            )
        if tuple(piece.tensor.shape) != tuple(stop - start for start, stop in piece.box):
            raise CheckpointError(
                f"{piece.name}: a tensor of shape {list(piece.tensor.shape)} is given for box {piece.box}"
            )
        met = [(stored, intersect(stored.box, piece.box)) for stored in entry.slices]
        sources = [(stored, common) for stored, common in met if common is not None]
        found, wanted = sum(_volume(common) for _, common in sources), piece.tensor.numel()
        if found != wanted:
            raise CheckpointError(
                f"{piece.name}: {self.folder} holds {found} of the {wanted} elements of box {piece.box}"
            )
        return sources


def open_checkpoint(
    load_dir: Path, *, ckpt_step: int | None = None, world: Axis, device: torch.device
) -> Checkpoint:
    """The checkpoint to resume from, verified; every rank of `world` calls it and gets the same one. `device` is where the ranks agree.

    `load_dir` is SAVE or SAVE/iter_N. One that does not verify is named with the reason and the next older is tried, except
    where `ckpt_step` or SAVE/iter_N asks for one alone. Raises NothingPublished where none was ever published, CheckpointError
    where none verifies.
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
                    f"checkpoint {iteration} does not verify: {error}; falling back to iteration {older}"
                )
    return _open_one(publish.locate(load_dir, tries[-1]), tries[-1], world, device)


def _tries(load_dir: Path, ckpt_step: int | None, world: Axis, device: torch.device) -> list[int]:
    """The first rank's candidates, on every rank: on a shared file system two ranks may see two states of a folder."""
    mine: list[int] = []
    together(
        lambda: mine.extend(publish.candidates(load_dir, ckpt_step)) if world.rank == 0 else None,
        world,
        device,
    )
    count = from_first(len(mine), world, device)
    return [from_first(mine[i] if world.rank == 0 else -1, world, device) for i in range(count)]


def _open_one(folder: Path, iteration: int, world: Axis, device: torch.device) -> Checkpoint:
    """Read the JSON files on every rank and verify this rank's share of the slices. Raises CheckpointError on all ranks or on none."""
    opened: list[Checkpoint] = []

    def open_and_verify() -> None:
        for name in (FILE_NAME, STATE_FILE, CONFIG_FILE):
            check_file(folder / name)
        manifest = Manifest.read(folder / FILE_NAME)
        manifest.check_cover(folder / FILE_NAME)
        opened.append(
            Checkpoint(
                folder,
                iteration,
                read_state(folder / STATE_FILE, iteration),
                read_text(folder / CONFIG_FILE),
                manifest,
            )
        )
        verify(folder, manifest, world.rank, world.size)

    together(open_and_verify, world, device)
    return opened[0]


def verify(folder: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
    """Check this rank's share of the slices: there, of the shape and dtype the manifest says, with the bytes that were written.

    Over all ranks each slice is read once. A rank's share is a run of slices in file order, equal in elements: few files,
    read in sequence. Raises CheckpointError that names file and slice.
    """
    slices = [
        (stored, entry.dtype) for entry in manifest.tensors.values() for stored in entry.slices
    ]
    slices.sort(key=lambda item: (item[0].file, item[0].key))
    total, before = sum(prod(stored.shape) for stored, _ in slices), 0
    by_file: dict[str, list[tuple[Slice, str]]] = defaultdict(list)
    for stored, dtype in slices:
        if before * size // max(1, total) == rank:
            by_file[stored.file].append((stored, dtype))
        before += prod(stored.shape)
    for file, items in by_file.items():
        with _open_own(folder / file) as shard:
            for stored, dtype in items:
                _verify_slice(shard, folder / file, stored, dtype)


def _open_own(path: Path) -> AbstractContextManager:
    check_file(path)
    return open_shard(path)


def _verify_slice(shard, path: Path, stored: Slice, dtype: str) -> None:
    header = shard.get_slice(stored.key)
    shape, kind = tuple(header.get_shape()), STORED_DTYPES.get(header.get_dtype())
    if shape != stored.shape or kind != TORCH_DTYPES[dtype]:
        raise CheckpointError(
            f"{path}: {stored.key} is {kind} {list(shape)}, the manifest says {dtype} {list(stored.shape)}"
        )
    found = checksum(shard.get_tensor(stored.key))
    if found != stored.checksum:
        raise CheckpointError(
            f"{path}: {stored.key} is damaged: {found}, written as {stored.checksum}"
        )


def _within(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, stop) in enumerate(box):
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _relative(box: Box, frame: Box) -> Box:
    return tuple(
        (start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, frame, strict=True)
    )


def _volume(box: Box) -> int:
    return prod(stop - start for start, stop in box)
