"""Save a checkpoint while training waits.

Every rank writes the slices that it owns and its manifest of them; rank 0 joins the manifests and
publishes.
"""

import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..layout import Piece
from ..mesh import Axis
from . import publish
from .agree import together
from .manifest import CheckpointError
from .rank_files import MAX_SHARD_BYTES, TensorBox, complete, reported, write_rank_files
from .retention import KEEP_ALL, Retention
from .shards import dtype_name, host_bytes


def save(
    save_dir: Path,
    iteration: int,
    pieces: Iterable[Piece],
    *,
    state: dict,
    config_yaml: str,
    world: Axis,
    device: torch.device,
    retention: Retention = KEEP_ALL,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write and publish iteration `iteration`.

    Every rank of `world` calls this with the pieces that it alone owns, perhaps none. It returns
    once the tracker names the iteration and old ones are retired. If any rank fails, every rank
    raises the same CheckpointError, nothing is published and nothing is left behind.

    state: must be JSON.
    device: where the ranks agree.
    """
    save_dir = Path(save_dir)
    folder = begin(save_dir, iteration, world, device)

    def write() -> None:
        with reported(save_dir, iteration):
            boxes = (box for _, box in boxes_of(pieces))
            write_rank_files(folder, world.rank, boxes, max_shard_bytes)

    def finish() -> None:
        if world.rank == 0:
            complete(save_dir, iteration, world.size, state, config_yaml, retention)

    try:
        together(write, world, device)
        together(finish, world, device)
    except CheckpointError:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def begin(save_dir: Path, iteration: int, world: Axis, device: torch.device) -> Path:
    """Return the folder that all ranks may now write into.

    Raises CheckpointError on all of them where it cannot be made.
    """

    def make() -> None:
        if world.rank == 0:
            with reported(save_dir, iteration):
                publish.begin(save_dir, iteration)

    together(make, world, device)
    return publish.begun(save_dir, iteration)


def boxes_of(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, TensorBox]]:
    """Yield each piece with the box to write, which has its own bytes.

    Raises CheckpointError for a piece whose tensor is not its box, or has a dtype we do not store.
    """
    for piece in pieces:
        shape = tuple(piece.tensor.shape)
        if shape != tuple(stop - start for start, stop in piece.box):
            raise CheckpointError(
                f"{piece.name}: a tensor of shape {list(shape)} is given for box {piece.box}"
            )
        box = TensorBox(
            name=piece.name,
            whole=tuple(piece.shape),
            offsets=tuple(start for start, _ in piece.box),
            dtype=dtype_name(piece.tensor, piece.name),
            shape=shape,
            data=partial(host_bytes, piece.tensor),
        )
        yield piece, box
