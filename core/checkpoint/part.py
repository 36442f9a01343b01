"""What one rank writes of a checkpoint, and how the parts of all ranks become a published one. No torch in here: a writer does not need it."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import publish
from .manifest import FILE_NAME, CheckpointError, Entry, Manifest, Slice, one_line
from .retention import Retention, retain
from .serialize import Stored, write_shard
from .state import STATE_FILE

CONFIG_FILE = "config.yaml"
MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Block:
    """A box of the named global tensor of shape `whole`: where it begins, its dtype and shape, and where its bytes come from (see Stored)."""

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes | memoryview]

    @property
    def stored(self) -> Stored:
        """The block in a file, under a key that is unique, and readable with any safetensors tool."""
        return Stored(
            f"{self.name}@{','.join(map(str, self.offsets))}", self.dtype, self.shape, self.data
        )


def write_part(
    folder: Path, rank: int, blocks: Iterable[Block], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write one rank's shards and, last, its part of the manifest, which appears whole. A new file begins where one would exceed `max_shard_bytes`.

    One tensor is held at a time. Raises CheckpointError where a file cannot be written or two blocks contradict each other.
    """
    entries: dict[str, Entry] = {}
    for index, shard in enumerate(_shards(blocks, max_shard_bytes)):
        file = (
            f"shard_{rank:05d}.safetensors"
            if index == 0
            else f"shard_{rank:05d}_{index:04d}.safetensors"
        )
        tensors = [block.stored for block in shard]
        for block, tensor, checksum in zip(
            shard, tensors, write_shard(folder / file, tensors), strict=True
        ):
            mine = Entry(
                block.whole,
                block.dtype,
                (Slice(file, tensor.key, block.offsets, block.shape, checksum),),
            )
            known = {block.name: entries[block.name]} if block.name in entries else {}
            entries |= Manifest.merge((Manifest(known), Manifest({block.name: mine}))).tensors
    publish.write_text(part_path(folder, rank), Manifest(entries).text())


def part_path(folder: Path, rank: int) -> Path:
    """A rank's part of the manifest: when it is there, so is everything that the rank writes."""
    return folder / f"manifest_{rank:05d}.json"


def complete(
    save_dir: Path,
    iteration: int,
    world_size: int,
    state: dict,
    config_yaml: str,
    retention: Retention,
) -> None:
    """Join the parts of all ranks, publish the iteration and retire old ones. The first rank does this, when all parts are there.

    Raises CheckpointError for a part that is not there, and where the slices do not cover each tensor exactly once.
    """
    with reported(save_dir, iteration):
        _join(publish.begun(save_dir, iteration), world_size, state, config_yaml)
        publish.publish(save_dir, iteration)
    retain(save_dir, retention)


@contextmanager
def reported(save_dir: Path, iteration: int) -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError that says which checkpoint is lost and which one there is."""
    try:
        yield
    except Exception as error:
        raise not_saved(save_dir, iteration, one_line(error)) from error


def not_saved(save_dir: Path, iteration: int, reason: str) -> CheckpointError:
    """The error of a checkpoint that is lost."""
    published = publish.published_iterations(save_dir)
    newest = f"the newest published is {published[-1]}" if published else "none is published there"
    return CheckpointError(f"checkpoint of iteration {iteration} was not saved: {reason}; {newest}")


def _shards(blocks: Iterable[Block], max_shard_bytes: int) -> Iterator[list[Block]]:
    """Blocks in runs of at most `max_shard_bytes`, one block at least; empty ones are left out."""
    held: list[Block] = []
    num_bytes = 0
    for block in blocks:
        size = block.stored.num_bytes
        if size == 0:
            continue
        if held and num_bytes + size > max_shard_bytes:
            yield held
            held, num_bytes = [], 0
        held.append(block)
        num_bytes += size
    if held:
        yield held


def _join(folder: Path, world_size: int, state: dict, config_yaml: str) -> None:
    """Make one manifest of the parts and add what describes the run: after this the folder is complete."""
    parts = [part_path(folder, rank) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        if not part.exists():
            raise CheckpointError(
                f"{folder} has nothing from rank {rank}: all ranks must see one file system"
            )
    manifest = Manifest.merge(Manifest.read(part) for part in parts)
    manifest.check_cover(folder)
    for name, text in (
        (FILE_NAME, manifest.text()),
        (CONFIG_FILE, config_yaml),
        (STATE_FILE, json.dumps(state, indent=1) + "\n"),
    ):
        (folder / name).write_text(text)
        publish.sync(folder / name)
    for part in parts:
        part.unlink()
