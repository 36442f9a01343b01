"""Built indices on disk, to be mapped instead of built again.

Keyed on content, published by renaming: any number of processes may race.
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
    """Arrays by key.

    Each process, so each node, looks for itself and builds for itself: nobody waits, no shared file
    system is needed.

    A file is an .npy followed by a digest of it: one that is truncated, zeroed or damaged is built
    anew.
    `path`: --data-cache-path, or None for a folder `cache` beside the data and, where that cannot
        be written, the user's cache folder. Raises DataFlagError if `path` is given and cannot be
        made.
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
        """The arrays behind `key`, memory-mapped where a cache folder of `prefix` holds or takes
        them; else as `build` returns them."""
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
    return folder / f"{key}-{name}-v{VERSION}.npy"


def _load(
    folder: Path, key: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray] | None:
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
    """Publish every array under `folder`; False if that cannot be written or is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            _publish(_file(folder, key, name), array)
    except OSError:
        return False
    return True


def _publish(path: Path, array: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp")
    try:
        with open(handle, "w+b") as file:
            np.save(file, array)
            size = file.tell()
            digest = sampled_digest(file, size)
            file.seek(size)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes it private to this user; a cache beside shared data serves all who read the
        # data.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
