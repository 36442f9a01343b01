"""Pickles read without running anything in them: every object becomes a holder of its plain attributes, whatever class it names."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoint.manifest import CheckpointError


class Inert:
    """An object of a class that is not imported: `args` it was made with, and attributes as the pickle sets them (or `state`).

    Making one does nothing.
    """

    path = ""

    def __new__(cls, *args: Any, **kwargs: Any):
        made = super().__new__(cls)
        made.__dict__["args"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Unpickler(pickle.Unpickler):
    """A pickle is a program that calls what it names. Here every name is an Inert class, but for containers."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        known = {
            "collections.OrderedDict": dict,
            "torch.Size": tuple,
            "builtins.set": set,
            "builtins.dict": dict,
            "builtins.list": list,
        }
        return known.get(path) or type(name, (Inert,), {"path": path})

    def persistent_load(self, pid: Any) -> None:
        """Tensors, which lie outside the pickle."""
        return None


def read_plain(path: Path) -> Any:
    """The object in a pickle, or in a file that torch.save wrote. Raises CheckpointError where it is neither."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(name) as file:
                    return _load(file)
        with path.open("rb") as file:
            return _load(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (
        Exception
    ) as error:  # a pickle that is damaged on purpose can make its reader fail in any way
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None


def _load(file: BinaryIO) -> Any:
    return _Unpickler(file).load()
