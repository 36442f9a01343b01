"""Hugging Face folders of safetensors, over names that the caller gives: written a shard at a time, read slice by slice."""

import json
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch

from ..layout import Box
from . import publish
from .manifest import CheckpointError, is_plain_name, read_json
from .shards import host_copy, open_shard, read_box, write_shard

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000  # as transformers writes them
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


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Callable[[], torch.Tensor]]],
    config: dict,
    *,
    dtype: torch.dtype,
    tokenizer_files: Iterable[Path] = (),
    generation_config: dict | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` loads, floating-point tensors as `dtype`, and give it its name when it is complete.

    Each tensor is asked for when its turn comes; one shard is held at a time. A former export of that name is replaced.
    Raises CheckpointError for a folder that holds anything else, and where a file cannot be written.
    """
    folder, tokenizer_files = Path(folder).resolve(), [Path(path) for path in tokenizer_files]
    _refuse_foreign(folder, {path.name for path in tokenizer_files})
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        if temporary.exists():
            publish.remove(temporary)
        temporary.mkdir(parents=True)
        _write_weights(temporary, tensors, dtype, max_shard_bytes)
        _write_json(temporary / "config.json", config | {"torch_dtype": str(dtype).removeprefix("torch.")})
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
        self._where: dict[str, tuple[Path, tuple[int, ...]]] = {}
        listed = self._weight_map()
        for file in [SINGLE_FILE] if listed is None else sorted(set(listed.values())):
            with open_shard(self.path / file) as shard:
                self._where.update((key, (self.path / file, tuple(shard.get_slice(key).get_shape()))) for key in shard.keys())  # noqa: SIM118
        for name, file in (listed or {}).items():
            if self._where.get(name, (None,))[0] != self.path / file:
                raise CheckpointError(f"{self.path / INDEX_FILE} names {name} in {file}, which does not hold it")

    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1]

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A copy of one tensor, or of a box of it, in the dtype it is stored in."""
        file, shape = self._find(name)
        box = box if box is not None else tuple((0, size) for size in shape)
        if len(box) != len(shape) or not all(0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True)):
            raise CheckpointError(f"{file}: box {box} is not inside {name}, which is {list(shape)}")
        with open_shard(file) as shard:
            return host_copy(read_box(shard, name, box))

    def _find(self, name: str) -> tuple[Path, tuple[int, ...]]:
        if name not in self._where:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._where[name]

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor name -> file, by the index; None where there is none, but the single file."""
        if (self.path / INDEX_FILE).is_file():
            listed = read_json(self.path / INDEX_FILE).get("weight_map")
            if not isinstance(listed, dict) or not all(is_plain_name(file) for file in listed.values()):
                raise CheckpointError(f"{self.path / INDEX_FILE} has no weight_map of plain file names")
            return listed
        if (self.path / SINGLE_FILE).is_file():
            return None
        pickles = sorted(path.name for path in self.path.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never loaded: save it again with safe_serialization=True" if pickles else ""
        raise CheckpointError(f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Callable[[], torch.Tensor]]], dtype: torch.dtype, max_shard_bytes: int) -> None:
    """The shards under their final names. How many there are shows at the end, so they are numbered first and named then."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    num_bytes = total_bytes = 0
    for name, make in tensors:
        tensor = make()
        host = host_copy(tensor, dtype if tensor.is_floating_point() else None)
        if held and num_bytes + host.nbytes > max_shard_bytes:
            shards.append(_write_numbered(folder, len(shards), held))
            held, num_bytes = {}, 0
        held[name] = host
        num_bytes += host.nbytes
        total_bytes += host.nbytes
    shards.append(_write_numbered(folder, len(shards), held))
    files = [SINGLE_FILE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        _numbered(folder, i).rename(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_numbered(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    write_shard(_numbered(folder, index), tensors, metadata={"format": "pt"})
    return list(tensors)


def _numbered(folder: Path, index: int) -> Path:
    return folder / f"model-{index + 1:05d}.safetensors"


def _write_json(path: Path, tree: dict) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
    publish.sync(path)


def _refuse_foreign(folder: Path, tokenizer_names: set[str]) -> None:
    """Raises CheckpointError unless `folder` is absent, empty, or holds what an export holds and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder to export into")
    found = sorted(folder.iterdir())
    for path in found:
        known = path.name in tokenizer_names or any(fnmatch(path.name, pattern) for pattern in _EXPORTED)
        if not known or not path.is_file():
            raise CheckpointError(f"{folder} holds {path.name}, which no export wrote; give another folder")
    if found and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a former export: it has no config.json; give another folder")
