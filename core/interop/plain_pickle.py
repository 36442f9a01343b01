"""Pickles read as plain values: nothing in them is imported or run.

A pickle is a small program. Its usual reader does what the program says, and the program may say
"import os, call os.system": loading a pickle from elsewhere means running code from elsewhere. Yet
some checkpoints keep their metadata in pickles: Megatron-LM's .metadata and common.pt.

The reader here is the ordinary one with the one door closed through which such a program reaches
code: `find_class`, which it asks for every class and function by name. Here the answer is a few
containers (dict, list, set, tuple) or an empty class made on the spot, an Inert. Whatever the
program calls, it calls an Inert: that stores its arguments and does nothing. The result is a tree
of containers, numbers, text and Inerts, whose attributes are read by name:

    argparse.Namespace(num_layers=4)  ->  Inert with __dict__ == {"args": (), "num_layers": 4}

Tensors lie outside the pickle (torch.save stores their bytes beside it): they become None.
"""

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

from ..checkpoint.manifest import CheckpointError

_CONTAINERS = {
    "collections.OrderedDict": dict,
    "torch.Size": tuple,
    "builtins.set": set,
    "builtins.dict": dict,
    "builtins.list": list,
}


class Inert:
    """An object of a class that is not imported.

    args: what it was made with
    Its other attributes are as the pickle sets them, or `state` where that is no dict. Making one
    does nothing.
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
    """The standard reader, for which every name but a container's is an Inert class."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        return _CONTAINERS.get(path) or type(name, (Inert,), {"path": path})

    def persistent_load(self, pid: Any) -> None:
        """Leave out a tensor, which lies outside the pickle."""
        return None


def read_plain(path: Path) -> Any:
    """Return the object in a pickle, or in a file that torch.save wrote.

    Raises CheckpointError where it is neither.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_archive(path)
        with path.open("rb") as file:
            return _load(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # one that is damaged on purpose can fail its reader in any way
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {reason}") from None


def _read_archive(path: Path) -> Any:
    """Read the pickle in a zip file of torch.save's."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as file:
            return _load(file)


def _load(file: IO[bytes]) -> Any:
    return _Unpickler(file).load()
