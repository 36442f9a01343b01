"""Keep built indices on disk, so that a later run maps them instead of building them again.

The indices of a large corpus take minutes to build. A file's name holds a key made from the content
that it was built from, so a changed dataset finds no old index. Any number of processes may build
the same file at once: each writes its own under a temporary name and renames it, and the content is
the same whoever comes last.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import logs
from .digest import sampled_digest
from .errors import DataFlagError

DIGEST_BYTES = 64
VERSION = 1  # part of every key; raise it when what is cached changes


class IndexCache:
    """A folder of arrays that are found by key.

    Each process looks for a file and builds it by itself: nobody waits for another rank, and no
    shared file system is needed.

    A file is an .npy followed by a digest of it. One that is truncated, zeroed or damaged is built
    again.

    path: --data-cache-path. None: a folder `cache` beside the data or, where that cannot be
        written, the user's cache folder.
    Raises DataFlagError if `path` is given and cannot be made.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        if self.path is not None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataFlagError(
                    f"--data-cache-path {path}: {str(error.strerror).lower()}; "
                    "name a folder that can be written"
                ) from None

    def arrays(
        self,
        prefix: str,
        key: str,
        shapes: dict[str, tuple[int, ...]],
        build: Callable[[], dict[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Return the arrays behind `key`, built only if no cache folder has them.

        They are memory-mapped from a file, so that processes of a node share the memory. Where no
        folder can be written they are what `build` returned.

        prefix: the dataset, whose folder may hold the cache.
        shapes: of each array, by name; a file of another shape is built again.
        """
        folders = self._folders(prefix)
        for folder in folders:
            if (found := _load(folder, key, shapes)) is not None:
                return found
        built = build()
        for folder in folders:
            if _store(folder, key, built) and (found := _load(folder, key, shapes)) is not None:
                return found
        logs.get_logger().warning(
            f"no folder for the index cache can be written ({', '.join(map(str, folders))}); "
            "give --data-cache-path"
        )
        return built

    def _folders(self, prefix: str) -> list[Path]:
        if self.path is not None:
            return [self.path]
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return [Path(prefix).resolve().parent / "cache", Path(home) / "trivium" / "index"]


def _file(folder: Path, key: str, name: str) -> Path:
    """Return the path of one array."""
    return folder / f"{key}-{name}-v{VERSION}.npy"


def _load(
    folder: Path, key: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray] | None:
    """Return the arrays of a folder; None if one is missing, damaged or of another shape."""
    found = {}
    for name, shape in shapes.items():
        path = _file(folder, key, name)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size - DIGEST_BYTES
                if size <= 0 or not _intact(file, size):
                    raise ValueError("damaged")
            found[name] = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            logs.get_logger().warning(f"{path}: the cached index is damaged; it is built anew")
            return None
        if found[name].shape != shape:
            return None
    return found


def _intact(file: BinaryIO, size: int) -> bool:
    digest = sampled_digest(file, size)
    file.seek(size)
    return file.read(DIGEST_BYTES) == digest.encode()


def _store(folder: Path, key: str, arrays: dict[str, np.ndarray]) -> bool:
    """Publish every array in a folder. Return False if it cannot be written or is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            _publish(_file(folder, key, name), array)
    except OSError:
        return False
    return True


def _publish(path: Path, array: np.ndarray) -> None:
    """Write an array and its digest under a temporary name, then rename the file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp")
    try:
        with open(handle, "w+b") as file:
            np.save(file, array)
            size = file.tell()
            digest = sampled_digest(file, size)
            file.seek(size)
            file.write(digest.encode())
            file.flush()
            # A rename may reach the disk before the content does; a power cut then leaves zeros.
            os.fsync(file.fileno())
        # mkstemp makes it private to this user; a cache beside shared data serves all who read the
        # data.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
