"""Compute a digest of a file's content at a cost that does not grow with its size.

Small files are read whole, large ones in evenly spread blocks.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

NUM_BLOCKS = 16
BLOCK_BYTES = 64 * 1024


def content_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's size and content.

    Of a file above 1 MiB it covers 16 blocks of 64 KiB, from the first byte to the last. A corpus
    of terabytes then opens in milliseconds. Another tokenization changes lengths and ids
    throughout, so the blocks differ.
    """
    with open(path, "rb") as file:
        return sampled_digest(file, os.fstat(file.fileno()).st_size)


def sampled_digest(file: BinaryIO, size: int) -> str:
    """Return the `content_digest` of the first `size` bytes of an open file."""
    digest = hashlib.sha256(str(size).encode())
    if size <= NUM_BLOCKS * BLOCK_BYTES:
        file.seek(0)
        digest.update(file.read(size))
        return digest.hexdigest()
    for block in range(NUM_BLOCKS):
        file.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
        digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
