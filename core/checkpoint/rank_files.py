"""Write one rank's files of a checkpoint, and join those of all ranks.

A rank writes its shards, then its own manifest of them. The first rank joins the manifests when
all are there. No torch in here: the process that writes in the background does not need it.
"""

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
class TensorBox:
    """A box of a global tensor, to be written.

    name, whole: the tensor and its global shape.
    offsets, dtype, shape: where the box begins, its dtype and its own shape.
    data: gives the bytes (see Stored).
    """

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes | memoryview]

    @property
    def stored(self) -> Stored:
        """Return the box as it goes into a file.

        Its key is unique there, and readable with any safetensors tool.
        """
        place = ",".join(map(str, self.offsets))
        return Stored(f"{self.name}@{place}", self.dtype, self.shape, self.data)


def write_rank_files(
    folder: Path, rank: int, boxes: Iterable[TensorBox], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write one rank's shards and, last, its manifest, which appears whole.

    A new file begins where one would exceed `max_shard_bytes`. One tensor is held at a time. Raises
    CheckpointError where a file cannot be written or two boxes contradict each other.
    """
    entries: dict[str, Entry] = {}
    for index, shard in enumerate(_shards(boxes, max_shard_bytes)):
        more = f"_{index:04d}" if index else ""
        file = f"shard_{rank:05d}{more}.safetensors"
        tensors = [box.stored for box in shard]
        checksums = write_shard(folder / file, tensors)
        for box, tensor, checksum in zip(shard, tensors, checksums, strict=True):
            # A tensor may have several boxes on one rank, and they must agree on its shape.
            piece = Slice(file, tensor.key, box.offsets, box.shape, checksum)
            mine = Manifest({box.name: Entry(box.whole, box.dtype, (piece,))})
            known = {box.name: entries[box.name]} if box.name in entries else {}
            entries |= Manifest.merge((Manifest(known), mine)).tensors
    publish.write_text(rank_manifest(folder, rank), Manifest(entries).text())


def rank_manifest(folder: Path, rank: int) -> Path:
    """Return the path of a rank's manifest: when it is there, so is all that the rank writes."""
    return folder / f"manifest_{rank:05d}.json"


def complete(
    save_dir: Path,
    iteration: int,
    world_size: int,
    state: dict,
    config_yaml: str,
    retention: Retention,
) -> None:
    """Join the files of all ranks, publish the iteration and retire old ones.

    The first rank does this, when all manifests are there. Raises CheckpointError for one that is
    missing, and where the slices do not cover each tensor exactly once.
    """
    with reported(save_dir, iteration):
        _join(publish.begun(save_dir, iteration), world_size, state, config_yaml)
        publish.publish(save_dir, iteration)
    retain(save_dir, retention)


@contextmanager
def reported(save_dir: Path, iteration: int) -> Iterator[None]:
    """Turn whatever goes wrong inside into a CheckpointError about this checkpoint.

    It says which checkpoint is lost and which one there is.
    """
    try:
        yield
    except Exception as error:
        raise not_saved(save_dir, iteration, one_line(error)) from error


def not_saved(save_dir: Path, iteration: int, reason: str) -> CheckpointError:
    """Return the error of a checkpoint that is lost."""
    published = publish.published_iterations(save_dir)
    newest = f"the newest published is {published[-1]}" if published else "none is published there"
    return CheckpointError(f"checkpoint of iteration {iteration} was not saved: {reason}; {newest}")


def _shards(boxes: Iterable[TensorBox], max_shard_bytes: int) -> Iterator[list[TensorBox]]:
    """Cut the boxes into files of at most `max_shard_bytes`, one box at least; skip empty ones."""
    held: list[TensorBox] = []
    num_bytes = 0
    for box in boxes:
        size = box.stored.num_bytes
        if size == 0:
            continue
        if held and num_bytes + size > max_shard_bytes:
            yield held
            held = []
            num_bytes = 0
        held.append(box)
        num_bytes += size
    if held:
        yield held


def _join(folder: Path, world_size: int, state: dict, config_yaml: str) -> None:
    """Write one manifest of all ranks, the state and the configuration: the last files."""
    paths = [rank_manifest(folder, rank) for rank in range(world_size)]
    for rank, path in enumerate(paths):
        if not path.exists():
            raise CheckpointError(
                f"{folder} has nothing from rank {rank}: all ranks must see one file system"
            )
    manifest = Manifest.merge(Manifest.read(path) for path in paths)
    manifest.check_cover(folder)
    texts = {
        FILE_NAME: manifest.text(),
        CONFIG_FILE: config_yaml,
        STATE_FILE: json.dumps(state, indent=1) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        publish.sync(folder / name)
    # Last: a rank's manifest says that its shards are whole, until the common one says it for all.
    for path in paths:
        path.unlink()
