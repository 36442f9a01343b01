"""Tensors of torch and safetensors files: host copies to write, and files opened with one-line errors, read box by box."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..layout import Box
from . import serialize
from .manifest import DTYPES, CheckpointError

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
STORED_DTYPES = {dtype.stored_as: TORCH_DTYPES[name] for name, dtype in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """The manifest's name of a tensor's dtype. Raises CheckpointError for one that a checkpoint cannot hold."""
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} is {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}")
    return DTYPE_NAMES[tensor.dtype]


def host_copy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous copy on the CPU with storage of its own."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor.detach())


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in C order; a contiguous one on the CPU is not copied."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def checksum(tensor: torch.Tensor) -> str:
    """As serialize sums what it writes."""
    return serialize.checksum(host_bytes(tensor))


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
