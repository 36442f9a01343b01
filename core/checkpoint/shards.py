"""One safetensors file: written and synced, opened with one-line errors, read box by box, summed."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..layout import Box
from .manifest import DTYPES, CheckpointError
from .publish import sync

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """The manifest's name of a tensor's dtype. Raises CheckpointError for one that a checkpoint cannot hold."""
    if tensor.dtype not in _NAMES:
        raise CheckpointError(f"{name} is {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}")
    return _NAMES[tensor.dtype]


def host_copy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous copy on the CPU with storage of its own: safetensors refuses views, and two tensors in one storage."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor.detach())


def checksum(tensor: torch.Tensor) -> str:
    """crc32 of a contiguous host tensor's bytes. Against bit rot and torn writes, not against malice."""
    return f"crc32:{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()):08x}"


def write_shard(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous host tensors and sync them to the disk. Raises CheckpointError that names the file."""
    try:
        save_file(tensors, path, metadata=metadata)
        sync(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


@contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """A safetensors file with its header checked; truncation is seen here. Raises CheckpointError, for reads inside the block too.

    What is read is a view of the mapped file: copy it out.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_box(shard: safe_open, key: str, box: Box) -> torch.Tensor:
    """The box of one stored tensor. The caller has checked that it lies inside: safetensors cuts a longer one without a word."""
    if not box:
        return shard.get_tensor(key)
    return shard.get_slice(key)[tuple(slice(start, stop) for start, stop in box)]
