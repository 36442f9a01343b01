"""Write a safetensors file as a stream: tensor by tensor, with checksums, synced to the disk.

Why not safetensors' own save_file? It needs torch, and all tensors of the file in memory at once,
each with a storage of its own. Here a tensor is asked for when its bytes are due and let go of when
they are written, and its checksum costs no second pass over memory. No torch in here, so that the
process that writes in the background starts quickly.

The format of the file:

    8 bytes    length of the header, little-endian
    header     JSON, padded with spaces to a multiple of 8 bytes
    the rest   the bytes of the tensors, without gaps

Readers view a tensor where it lies, so each must begin at a multiple of its element's size: tensors
of larger elements come first.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from .manifest import DTYPES, CheckpointError

_CHUNK = 1 << 20  # bytes summed and then written, while they are still in the processor's cache


@dataclass(frozen=True)
class Stored:
    """A tensor as it goes into a file.

    key: its name in the file.
    dtype: the manifest's name of its dtype.
    data: called once, when the bytes are due. It gives a contiguous buffer (bytes, memoryview, an
        array of numpy) of exactly `num_bytes`, in C order and little-endian.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes | memoryview]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the tensor in the file."""
        return prod(self.shape) * DTYPES[self.dtype].item_size


def write_shard(
    path: Path, tensors: Sequence[Stored], metadata: dict[str, str] | None = None
) -> list[str]:
    """Write a file and sync it to the disk; return the checksums of the tensors.

    A checksum is "crc32:%08x" of a tensor's bytes; they come in the order of `tensors`. The tensors
    lie in the file in that order too, but those of larger elements first.

    Raises CheckpointError that names the file where it cannot be written (a full disk, a read-only
    one, a limit) or a tensor does not give the bytes it announced.
    """
    places = sorted(range(len(tensors)), key=lambda i: -DTYPES[tensors[i].dtype].item_size)
    ordered = [tensors[i] for i in places]
    checksums = [""] * len(tensors)
    try:
        with open(path, "wb") as file:
            file.write(_header(ordered, metadata))
            for i, tensor in zip(places, ordered, strict=True):
                checksums[i] = _write_tensor(file, path, tensor)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    return checksums


def checksum(data: bytes | memoryview) -> str:
    """Return the crc32 of a buffer's bytes: against bit rot and torn writes, not against malice."""
    return _named(zlib.crc32(data))


def _header(tensors: Sequence[Stored], metadata: dict[str, str] | None) -> bytes:
    """Return the length of the header and the header, for tensors in the order of the file."""
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for tensor in tensors:
        if tensor.key in header:
            raise CheckpointError(f"two tensors are named {tensor.key}")
        end = begin + tensor.num_bytes
        header[tensor.key] = {
            "dtype": DTYPES[tensor.dtype].stored_as,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, path: Path, tensor: Stored) -> str:
    """Write one tensor's bytes and return their checksum."""
    data = memoryview(tensor.data())
    if data.nbytes != tensor.num_bytes:
        raise CheckpointError(
            f"{path}: {tensor.key} gave {data.nbytes} bytes, its shape {list(tensor.shape)} has "
            f"{tensor.num_bytes}"
        )
    value = 0
    if data.nbytes:  # a view with a zero in its shape cannot be cast
        data = data.cast("B")
        for start in range(0, data.nbytes, _CHUNK):
            chunk = data[start : start + _CHUNK]
            value = zlib.crc32(chunk, value)
            file.write(chunk)
    return _named(value)


def _named(crc32: int) -> str:
    return f"crc32:{crc32:08x}"
