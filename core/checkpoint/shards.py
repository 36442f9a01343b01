"""Bring torch tensors to safetensors files and back: bytes to write, boxes to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open

from ..layout import Box
from . import serialize
from .manifest import DTYPES, CheckpointError

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
STORED_DTYPES = {dtype.stored_as: TORCH_DTYPES[name] for name, dtype in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """Return the manifest's name of a tensor's dtype.

    Raises CheckpointError for one that a checkpoint cannot hold.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} is {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}")
    return DTYPE_NAMES[tensor.dtype]


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, in C order; a contiguous one on the CPU is not copied."""
    on_host = tensor.detach().cpu().contiguous()
    as_bytes = on_host.reshape(-1).view(torch.uint8).numpy()
    return memoryview(cast(bytes, as_bytes))


def checksum(tensor: torch.Tensor) -> str:
    """Return the checksum of a tensor's bytes, as serialize sums what it writes."""
    return serialize.checksum(host_bytes(tensor))


@contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file with its header checked; truncation is seen here.

    What is read is a view of the mapped file: copy it out. Raises CheckpointError, for reads inside
    the block too.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_box(shard: safe_open, key: str, box: Box) -> torch.Tensor:
    """Return the box of one stored tensor.

    The caller has checked that it lies inside: safetensors cuts a longer one without a word.
    """
    if not box:
        return shard.get_tensor(key)
    inside = tuple(slice(start, stop) for start, stop in box)
    return shard.get_slice(key)[inside]
