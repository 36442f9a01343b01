"""Saving: every rank writes the slices it owns and its part of the manifest, rank 0 joins the parts and publishes."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from ..layout import Piece
from ..mesh import Axis
from . import publish
from .agree import together
from .manifest import FILE_NAME, CheckpointError, Entry, Manifest, Slice
from .shards import checksum, dtype_name, host_copy, write_shard

CONFIG_FILE, STATE_FILE = "config.yaml", "state.json"
MAX_SHARD_BYTES = 4 << 30  # what a rank holds on the host at a time


def save(
    save_dir: Path,
    iteration: int,
    pieces: Iterable[Piece],
    *,
    state: dict,
    config_yaml: str,
    world: Axis,
    device: torch.device,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write and publish iteration `iteration`. Every rank of `world` calls it with the pieces that it alone owns, perhaps none.

    `state` must be JSON; `device` is where the ranks agree. Returns once the tracker names the iteration. If any rank fails,
    every rank raises the same CheckpointError, nothing is published and nothing is left behind.
    """
    save_dir = Path(save_dir)
    folder = save_dir / f"{publish.folder_name(iteration)}.tmp"
    lead = world.rank == 0
    try:
        together(lambda: publish.begin(save_dir, iteration) if lead else None, world, device)
        together(lambda: write_part(folder, world.rank, pieces, max_shard_bytes), world, device)
        together(lambda: finish(folder, world.size, state, config_yaml) if lead else None, world, device)
        together(lambda: publish.publish(save_dir, iteration) if lead else None, world, device)
    except CheckpointError:
        if lead:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def write_part(folder: Path, rank: int, pieces: Iterable[Piece], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write one rank's shards and, last, its part of the manifest. A new file begins where one would exceed `max_shard_bytes`."""
    entries: dict[str, Entry] = {}
    held: dict[str, torch.Tensor] = {}
    num_bytes = num_files = 0
    for piece in pieces:
        if piece.tensor.numel() == 0:
            continue
        if held and num_bytes + piece.tensor.nbytes > max_shard_bytes:
            write_shard(folder / _shard_name(rank, num_files), held)
            held, num_bytes, num_files = {}, 0, num_files + 1
        key, host = _key(piece), host_copy(piece.tensor)
        held[key] = host
        num_bytes += host.nbytes
        _add(entries, piece, Slice(_shard_name(rank, num_files), key, tuple(a for a, _ in piece.box), tuple(host.shape), checksum(host)))
    if held:
        write_shard(folder / _shard_name(rank, num_files), held)
    part = folder / _part_name(rank)
    Manifest(entries).write(part)
    publish.sync(part)


def finish(folder: Path, world_size: int, state: dict, config_yaml: str) -> None:
    """Join the parts of all ranks and add what describes the run: after this the folder is complete.

    Raises CheckpointError for a part that is not there, and where the slices do not cover each tensor exactly once.
    """
    parts = [folder / _part_name(rank) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        if not part.exists():
            raise CheckpointError(f"{folder} has nothing from rank {rank}: all ranks must see one file system")
    manifest = Manifest.merge(Manifest.read(part) for part in parts)
    manifest.check_cover(folder)
    manifest.write(folder / FILE_NAME)
    (folder / CONFIG_FILE).write_text(config_yaml)
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
    for name in (FILE_NAME, CONFIG_FILE, STATE_FILE):
        publish.sync(folder / name)
    for part in parts:
        part.unlink()


def _add(entries: dict[str, Entry], piece: Piece, stored: Slice) -> None:
    if stored.shape != tuple(stop - start for start, stop in piece.box):
        raise CheckpointError(f"{piece.name}: a tensor of shape {list(stored.shape)} is given for box {piece.box}")
    mine = Manifest({piece.name: Entry(tuple(piece.shape), dtype_name(piece.tensor, piece.name), (stored,))})
    known = Manifest({piece.name: entries[piece.name]} if piece.name in entries else {})
    entries.update(Manifest.merge((known, mine)).tensors)


def _key(piece: Piece) -> str:
    """The name in the file: unique, and readable with any safetensors tool."""
    return f"{piece.name}@{','.join(str(start) for start, _ in piece.box)}"


def _shard_name(rank: int, index: int) -> str:
    return f"shard_{rank:05d}.safetensors" if index == 0 else f"shard_{rank:05d}_{index:04d}.safetensors"


def _part_name(rank: int) -> str:
    return f"manifest_{rank:05d}.json"
