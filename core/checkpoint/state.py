"""Read state.json, with distrust: it tells a run where it stands beside its tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .manifest import CheckpointError, read_json

STATE_FILE = "state.json"
_LARGEST = 2**53  # the largest whole number that every JSON reader gives back as it is


@dataclass(frozen=True)
class Marks:
    """The facts about a checkpoint that retention goes by."""

    validation_loss: float | None
    persistent: bool


def read_state(path: Path, iteration: int) -> dict:
    """Return the state of `iteration`, every field of the type and range that its use needs.

    Raises CheckpointError that names the field.
    """
    state = read_json(path)
    _check(state, _FIELDS, f"{path}:")
    if state["iteration"] != iteration:
        raise CheckpointError(
            f"{path} is of iteration {state['iteration']}, in the folder of iteration {iteration}"
        )
    return state


def read_marks(folder: Path) -> Marks:
    """Return the marks of a published checkpoint.

    One whose state cannot be read is persistent and has no loss.
    """
    try:
        state = read_json(folder / STATE_FILE)
    except CheckpointError:
        state = {}
    loss = state.get("validation_loss")
    return Marks(loss if _is_number(loss) else None, state.get("persistent") is not False)


def _is_count(value: Any) -> bool:
    # type() rather than isinstance: True is an int.
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_scale(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


# Field -> what it must be, in words and as a test, or the fields of an object.
_Rule = tuple[str, Callable[[Any], bool]]
_COUNT: _Rule = ("a whole number from 0 to 2^53", _is_count)
_FIELDS: dict[str, "_Rule | dict[str, _Rule]"] = {
    "iteration": _COUNT,
    "consumed_samples": _COUNT,
    "consumed_tokens": _COUNT,
    "optimizer_steps": _COUNT,
    "vocab_size": ("a whole number from 1 to 2^53", lambda value: _is_count(value) and value > 0),
    "loss_scale": {
        "dynamic": ("true or false", _is_flag),
        "scale": ("a finite number above 0", _is_scale),
        "good_updates": _COUNT,
        "bad_updates_left": (
            "a whole number",
            lambda value: type(value) is int and abs(value) <= _LARGEST,
        ),
    },
    "random": {"seed": _COUNT},
    "fingerprints": {"tokenizer": ("text", _is_text), "data": ("text", _is_text)},
    # Not in checkpoints of earlier versions.
    "data_samples": (
        "absent, or a whole number from 0 to 2^53",
        lambda value: value is None or _is_count(value),
    ),
    "validation_loss": (
        "absent, null or a finite number",
        lambda value: value is None or _is_number(value),
    ),
    "persistent": ("absent, or true or false", lambda value: value is None or _is_flag(value)),
}


def _check(values: object, wanted: dict, where: str) -> None:
    """Raise CheckpointError for the first field that breaks its rule."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is {_short(values)}, not an object")
    for name, rule in wanted.items():
        value = values.get(name)
        if isinstance(rule, dict):
            _check(value, rule, f"{where} {name}")
        elif not rule[1](value):
            raise CheckpointError(f"{where} {name} is {_short(value)}, not {rule[0]}")


def _short(value: object) -> str:
    return "missing" if value is None else repr(value)[:40]
