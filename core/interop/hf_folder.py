"""Hugging Face folders of safetensors, over names that the caller gives: written tensor by tensor, read slice by slice."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path

import torch

from ..checkpoint import publish
from ..checkpoint.manifest import CheckpointError, is_plain_name, read_json
from ..checkpoint.serialize import Stored, write_shard
from ..checkpoint.shards import DTYPE_NAMES, STORED_DTYPES, host_bytes, open_shard, read_box
from ..layout import Box

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000  # as transformers writes them
_PRODUCER = "trivium"  # marks a folder that may be replaced by the next export; anyone else's weights may not
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
    """A tensor to be written: `make` is called when its turn comes, and gives it in any dtype and on any device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def stored(self) -> Stored:
        return Stored(
            self.name,
            DTYPE_NAMES[self.dtype],
            self.shape,
            lambda: host_bytes(self.make().to(self.dtype)),
        )


def write_folder(
    folder: Path,
    tensors: Sequence[Outgoing],
    config: dict,
    *,
    tokenizer_files: Iterable[Path] = (),
    generation_config: dict | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` loads, and give it its name when it is complete. One tensor is held at a time. A former export
    of that name is replaced.
    Raises CheckpointError for a folder that holds anything else, and where a file cannot be written.
    """
    folder, tokenizer_files = Path(folder).resolve(), [Path(path) for path in tokenizer_files]
    _refuse_foreign(folder, {path.name for path in tokenizer_files})
    temporary = folder.with_name(folder.name + ".tmp")
    _refuse_foreign(temporary, {path.name for path in tokenizer_files}, complete=False)
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


class HFFolder:
    """A Hugging Face folder open for reading. Only safetensors: a pickle is code, and is never loaded.

    Raises CheckpointError, here and in every method, for a file that is missing or broken.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self._where: dict[str, tuple[Path, tuple[int, ...], torch.dtype | None]] = {}
        listed = self._weight_map()
        for file in [SINGLE_FILE] if listed is None else sorted(set(listed.values())):
            with open_shard(self.path / file) as shard:
                for key in shard.keys():  # noqa: SIM118
                    header = shard.get_slice(key)
                    self._where[key] = (
                        self.path / file,
                        tuple(header.get_shape()),
                        STORED_DTYPES.get(header.get_dtype()),
                    )
        for name, file in (listed or {}).items():
            if self._where.get(name, (None,))[0] != self.path / file:
                raise CheckpointError(
                    f"{self.path / INDEX_FILE} names {name} in {file}, which does not hold it"
                )

    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1]

    def dtype(self, name: str) -> torch.dtype | None:
        """None for a dtype that is not one of ours."""
        return self._find(name)[2]

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A copy of one tensor, or of a box of it, in the dtype it is stored in."""
        box = box if box is not None else tuple((0, size) for size in self.shape(name))
        tensor = torch.empty([max(0, stop - start) for start, stop in box], dtype=self.dtype(name))
        self.read_into(name, box, tensor)
        return tensor

    def read_into(self, name: str, box: Box, tensor: torch.Tensor) -> None:
        """Copy a box of one tensor into `tensor`, of its shape, straight from the file."""
        file, shape, _ = self._find(name)
        if len(box) != len(shape) or not all(
            0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True)
        ):
            raise CheckpointError(f"{file}: box {box} is not inside {name}, which is {list(shape)}")
        with open_shard(file) as shard:
            tensor.copy_(read_box(shard, name, box))

    def _find(self, name: str) -> tuple[Path, tuple[int, ...], torch.dtype | None]:
        if name not in self._where:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._where[name]

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor name -> file, by the index; None for the single file, which is preferred, as transformers does: an index may be left over."""
        if (self.path / SINGLE_FILE).is_file():
            return None
        if (self.path / INDEX_FILE).is_file():
            listed = read_json(self.path / INDEX_FILE).get("weight_map")
            if not isinstance(listed, dict) or not all(
                is_plain_name(file) for file in listed.values()
            ):
                raise CheckpointError(
                    f"{self.path / INDEX_FILE} has no weight_map of plain file names"
                )
            return listed
        pickles = sorted(path.name for path in self.path.glob("*.bin"))
        hint = (
            f"; {pickles[0]} is a pickle, which is never loaded: save it again with safe_serialization=True"
            if pickles
            else ""
        )
        raise CheckpointError(f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _write_weights(folder: Path, tensors: Sequence[Outgoing], max_shard_bytes: int) -> None:
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if (
            shards[-1]
            and sum(other.num_bytes for other in shards[-1]) + tensor.num_bytes > max_shard_bytes
        ):
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    files = (
        [SINGLE_FILE]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        write_shard(
            folder / file,
            [tensor.stored() for tensor in shard],
            metadata={"format": "pt", "producer": _PRODUCER},
        )
    if count > 1:
        weight_map = {
            tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard
        }
        _write_json(
            folder / INDEX_FILE,
            {
                "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
                "weight_map": weight_map,
            },
        )


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
    publish.sync(path)


def _refuse_foreign(folder: Path, tokenizer_names: set[str], *, complete: bool = True) -> None:
    """Raises CheckpointError unless `folder` is absent, empty, or holds what an export of ours holds and nothing else.

    complete: a former export rather than what is left of one that was killed.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder to export into")
    found = sorted(folder.iterdir())
    for path in found:
        known = path.name in tokenizer_names or any(
            fnmatch(path.name, pattern) for pattern in _EXPORTED
        )
        if not known or not path.is_file():
            raise CheckpointError(
                f"{folder} holds {path.name}, which no export wrote; give another folder"
            )
    if not found or not complete:
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a former export: it has no config.json; give another folder"
        )
    for path in (path for path in found if path.suffix == ".safetensors"):
        with open_shard(path) as shard:
            if (shard.metadata() or {}).get("producer") != _PRODUCER:
                raise CheckpointError(
                    f"{folder} holds {path.name}, which no export of ours wrote; give another folder"
                )
