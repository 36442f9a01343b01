"""The native module, built from csrc/: see csrc/bindings.cpp for what it holds."""

from typing import Any

def __getattr__(name: str) -> Any: ...
