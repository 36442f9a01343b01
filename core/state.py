"""One named item of a run's state: how it is saved into state.json and taken up again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StateItem:
    """One entry of state.json, contributed by the object that owns the state.

    name: key in state.json.
    save: returns the state now, as a JSON value.
    load: takes up such a value.
    """

    name: str
    save: Callable[[], Any]
    load: Callable[[Any], None]
