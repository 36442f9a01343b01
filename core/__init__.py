"""Trivium: a Megatron-style engine for pretraining language models.

The names below are the Python API. Each is imported when it is first used, so that
`import trivium` loads no torch, nor does `from trivium import Config`:

    from trivium import Config, pretrain

    pretrain(Config.of({"num_layers": 2, "hidden_size": 64, ...}))
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# name: the module that has it
_API = {
    "Config": "config",
    "ConfigError": "config",
    "FlagError": "config",
    "Process": "launch",
    "Progress": "train.schedule",
    "pretrain": "train.run",
}
__all__ = [*_API]


def __getattr__(name: str) -> Any:
    """Import the module of a name of the API when it is first asked for (PEP 562)."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_API[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
