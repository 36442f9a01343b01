"""Folders of safetensors as Hugging Face has them: written tensor by tensor, read slice by slice.

The names of tensors are the caller's: nothing here knows a family.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint import publish
from ..checkpoint.manifest import CheckpointError, is_plain_name, read_json
from ..checkpoint.serialize import Stored, write_shard
from ..checkpoint.shards import DTYPE_NAMES, STORED_DTYPES, host_bytes, open_shard, read_box
from ..layout import Box

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000  # as transformers writes them
# Marks our own exports: the next export may replace them. Anyone else's weights it may not.
_PRODUCER = "trivium"
# What an export may hold.
_EXPORTED = (
    "config.json",
    "generation_config.json",
    SINGLE_FILE,
    INDEX_FILE,
    "model-[0-9]*-of-[0-9]*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written.

    dtype: what it is written in
    make: gives it, in any dtype and on any device, when its turn comes
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Return its size in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def stored(self) -> Stored:
        """Return it as the writer of safetensors takes it."""
        return Stored(self.name, DTYPE_NAMES[self.dtype], self.shape, self._bytes)

    def _bytes(self) -> memoryview:
        return host_bytes(self.make().to(self.dtype))


def write_folder(
    folder: Path,
    tensors: Sequence[Outgoing],
    config: dict,
    *,
    tokenizer_files: Iterable[Path] = (),
    generation_config: dict | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers loads, and give it its name when it is complete.

    One tensor is held at a time. A former export of that name is replaced.
    Raises CheckpointError for a folder that holds anything else, and if a file cannot be written.
    """
    # Refuse before anything is written: also what is left of an export that was killed is replaced
    # only if it is one of ours.
    folder = Path(folder).resolve()
    tokenizer_files = [Path(path) for path in tokenizer_files]
    tokenizer_names = {path.name for path in tokenizer_files}
    _refuse_foreign(folder, tokenizer_names)
    temporary = folder.with_name(folder.name + ".tmp")
    _refuse_foreign(temporary, tokenizer_names, complete=False)
    try:
        if temporary.exists():
            publish.remove(temporary)
        temporary.mkdir(parents=True)
        _write_weights(temporary, tensors, max_shard_bytes)
        _write_json(temporary / "config.json", config)
        if generation_config is not None:
            _write_json(temporary / "generation_config.json", generation_config)
        for path in tokenizer_files:
            shutil.copyfile(path, temporary / path.name)
            publish.sync(temporary / path.name)
        publish.swap_in(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Held(NamedTuple):
    """A tensor in a file. dtype: None for one that is not among ours."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


class HFFolder:
    """A Hugging Face folder open for reading. Only safetensors: a pickle is code.

    config: its config.json
    Raises CheckpointError, here and in every method, for a file that is missing or broken.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self._held: dict[str, _Held] = {}
        listed = self._weight_map()
        files = [SINGLE_FILE] if listed is None else sorted(set(listed.values()))
        for file in files:
            self._read_headers(self.path / file)
        for name, file in (listed or {}).items():
            held = self._held.get(name)
            if held is None or held.file != self.path / file:
                raise CheckpointError(
                    f"{self.path / INDEX_FILE} names {name} in {file}, which does not hold it"
                )

    def _read_headers(self, path: Path) -> None:
        with open_shard(path) as shard:
            for key in shard.keys():  # noqa: SIM118
                header = shard.get_slice(key)
                dtype = STORED_DTYPES.get(header.get_dtype())
                self._held[key] = _Held(path, tuple(header.get_shape()), dtype)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return sorted(self._held)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype | None:
        """Return what a tensor is stored in; None for a dtype that is not one of ours."""
        return self._find(name).dtype

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """Return a copy of one tensor, or of a box of it, in the dtype it is stored in."""
        if box is None:
            box = tuple((0, size) for size in self.shape(name))
        shape = [max(0, stop - start) for start, stop in box]
        tensor = torch.empty(shape, dtype=self.dtype(name))
        self.read_into(name, box, tensor)
        return tensor

    def read_into(self, name: str, box: Box, tensor: torch.Tensor) -> None:
        """Copy a box of one tensor into `tensor`, of its shape, straight from the file."""
        held = self._find(name)
        if not _is_inside(box, held.shape):
            raise CheckpointError(
                f"{held.file}: box {box} is not inside {name}, which is {list(held.shape)}"
            )
        with open_shard(held.file) as shard:
            tensor.copy_(read_box(shard, name, box))

    def _find(self, name: str) -> _Held:
        if name not in self._held:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._held[name]

    def _weight_map(self) -> dict[str, str] | None:
        """Return tensor name -> file, as the index says; None for a folder with a single file.

        The single file is preferred, as in transformers: an index beside it may be left over.
        """
        if (self.path / SINGLE_FILE).is_file():
            return None
        index = self.path / INDEX_FILE
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(map(is_plain_name, listed.values())):
                raise CheckpointError(f"{index} has no weight_map of plain file names")
            return listed
        pickles = sorted(path.name for path in self.path.glob("*.bin"))
        hint = ""
        if pickles:
            hint = (
                f"; {pickles[0]} is a pickle, which is never loaded: "
                "save it again with safe_serialization=True"
            )
        raise CheckpointError(f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _is_inside(box: Box, shape: tuple[int, ...]) -> bool:
    if len(box) != len(shape):
        return False
    dims = zip(box, shape, strict=True)
    return all(0 <= start <= stop <= size for (start, stop), size in dims)


def _write_weights(folder: Path, tensors: Sequence[Outgoing], max_shard_bytes: int) -> None:
    """Write one file, or several and an index, with the names that transformers gives them."""
    shards = _shards(tensors, max_shard_bytes)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [SINGLE_FILE]
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        stored = [tensor.stored() for tensor in shard]
        write_shard(folder / file, stored, metadata={"format": "pt", "producer": _PRODUCER})
        weight_map |= {tensor.name: file for tensor in shard}
    if count > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _shards(tensors: Sequence[Outgoing], max_shard_bytes: int) -> list[list[Outgoing]]:
    """Cut tensors, in their order, into files of at most `max_shard_bytes`, one tensor at least."""
    shards: list[list[Outgoing]] = [[]]
    num_bytes = 0  # in the last shard
    for tensor in tensors:
        if shards[-1] and num_bytes + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += tensor.num_bytes
    return shards


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
    publish.sync(path)


def _refuse_foreign(folder: Path, tokenizer_names: set[str], *, complete: bool = True) -> None:
    """Raise CheckpointError unless a folder may be replaced.

    It may if it is absent or empty, or if it holds what an export of ours holds and nothing else.
    complete: a former export is expected, rather than what is left of one that was killed
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder to export into")
    found = sorted(folder.iterdir())
    for path in found:
        if not _is_exported(path, tokenizer_names):
            raise CheckpointError(
                f"{folder} holds {path.name}, which no export wrote; give another folder"
            )
    if not found or not complete:
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a former export: it has no config.json; give another folder"
        )
    for path in found:
        if path.suffix == ".safetensors" and not _is_ours(path):
            raise CheckpointError(
                f"{folder} holds {path.name}, which no export of ours wrote; give another folder"
            )


def _is_exported(path: Path, tokenizer_names: set[str]) -> bool:
    """Return whether a file has a name that an export gives."""
    patterns = any(fnmatch(path.name, pattern) for pattern in _EXPORTED)
    return path.is_file() and (patterns or path.name in tokenizer_names)


def _is_ours(path: Path) -> bool:
    """Return whether an export of ours wrote a file of weights."""
    with open_shard(path) as shard:
        return (shard.metadata() or {}).get("producer") == _PRODUCER
