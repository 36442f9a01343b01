"""Saving while training waits: every rank writes the slices it owns and its part of the manifest, rank 0 joins the parts and publishes."""

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
from .part import MAX_SHARD_BYTES, Block, complete, reported, write_part
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
    """Write and publish iteration `iteration`. Every rank of `world` calls it with the pieces that it alone owns, perhaps none.

    `state` must be JSON; `device` is where the ranks agree. Returns once the tracker names the iteration and old ones are retired. If
    any rank fails, every rank raises the same CheckpointError, nothing is published and nothing is left behind.
    """
    save_dir = Path(save_dir)
    folder = begin(save_dir, iteration, world, device)
    try:
        together(
            lambda: _write(save_dir, iteration, world.rank, pieces, max_shard_bytes), world, device
        )
        finish = partial(complete, save_dir, iteration, world.size, state, config_yaml, retention)
        together(lambda: finish() if world.rank == 0 else None, world, device)
    except CheckpointError:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def begin(save_dir: Path, iteration: int, world: Axis, device: torch.device) -> Path:
    """The folder that all ranks may now write into. Raises CheckpointError on all of them where it cannot be made."""

    def make() -> None:
        if world.rank == 0:
            with reported(save_dir, iteration):
                publish.begin(save_dir, iteration)

    together(make, world, device)
    return publish.begun(save_dir, iteration)


def blocks_of(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Block]]:
    """Pieces as blocks, each with its own bytes. Raises CheckpointError for one whose tensor is not its box, or has a dtype we do not store."""
    for piece in pieces:
        shape = tuple(piece.tensor.shape)
        if shape != tuple(stop - start for start, stop in piece.box):
            raise CheckpointError(
                f"{piece.name}: a tensor of shape {list(shape)} is given for box {piece.box}"
            )
        offsets = tuple(start for start, _ in piece.box)
        data = partial(host_bytes, piece.tensor)
        yield (
            piece,
            Block(
                piece.name,
                tuple(piece.shape),
                offsets,
                dtype_name(piece.tensor, piece.name),
                shape,
                data,
            ),
        )


def _write(
    save_dir: Path, iteration: int, rank: int, pieces: Iterable[Piece], max_shard_bytes: int
) -> None:
    with reported(save_dir, iteration):
        write_part(
            publish.begun(save_dir, iteration),
            rank,
            (block for _, block in blocks_of(pieces)),
            max_shard_bytes,
        )
