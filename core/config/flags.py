"""From a command line and YAML files to a Config: Megatron's flag names, generated from the fields of config.py.

Later wins: defaults, then --preset or --hf-config, then each --config file from left to right, then the command line.
"""

import argparse
import difflib
import json
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from .errors import ConfigError
from .fields import Config
from .megatron_flags import ALIASES, REFUSED, WITHOUT_EFFECT
from .presets import PRESETS


@dataclass(frozen=True)
class Request:
    """What the command line asked for: the configuration, and the flags it named that have no effect here."""

    config: Config
    without_effect: tuple[str, ...] = ()
    list_presets: bool = False


class _Parser(argparse.ArgumentParser):
    """argparse whose complaint is a ConfigError instead of an exit."""

    def error(self, message: str):
        raise ConfigError(
            [message.removeprefix("argument ").replace("expected one argument", "needs a value")]
        )


def parse(
    argv: list[str], read_hf_config: Callable[[str], dict[str, Any]] | None = None
) -> Request:
    """The request behind `argv` (without the program's name). read_hf_config: what --hf-config says, as fields of ours; its ValueError is a problem.

    Raises ConfigError with every unknown flag or key (each with the nearest one that exists), refused flag and bad value.
    """
    argv, ignored, problems = _sort_out(argv)
    try:
        given = vars(_parser().parse_args(argv))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    files, list_presets = given.pop("config", []), given.pop("list_presets", False)
    layers = [_read_layer(Path(path), problems) for path in files]
    layers.append(_convert_all({_flag(name): value for name, value in given.items()}, "", problems))
    values: dict[str, Any] = {}
    for layer in layers:
        values |= layer
    base = _base(
        values.pop("preset", None), values.pop("hf_config", None), read_hf_config, problems
    )
    if problems:
        raise ConfigError(problems)
    if "vocab_size" in base and values.get("tokenizer_type") == "NullTokenizer":
        base["vocab_size"] -= 1  # the last id is its end of document
    return Request(Config.of(base | values), tuple(ignored), list_presets)


def _base(
    preset: Any,
    hf_config: Any,
    read_hf_config: Callable[[str], dict[str, Any]] | None,
    problems: list[str],
) -> dict[str, Any]:
    """The values of a named model, which everything else overrides."""
    if preset is not None and hf_config is not None:
        problems.append(
            f"--preset {preset} and --hf-config {hf_config} exclude each other; give one"
        )
    elif preset is not None and str(preset) not in PRESETS:
        problems.append(
            f"--preset {preset} is unknown{_nearest(str(preset), PRESETS)}; --list-presets shows all"
        )
    elif preset is not None:
        return dict(PRESETS[preset])
    elif hf_config is not None and read_hf_config is None:
        problems.append("--hf-config is not read here; give the shape by flags or --preset")
    elif hf_config is not None:
        try:
            return dict(read_hf_config(str(hf_config)))
        except ValueError as error:
            problems.append(f"--hf-config {str(hf_config)[:80]}: {error}")
    return {}


def read_config(text: str) -> Config:
    """A configuration from the YAML text that was saved beside a checkpoint."""
    problems: list[str] = []
    values = _flatten(yaml.safe_load(text), "config.yaml", problems)
    if problems:
        raise ConfigError(problems)
    return Config.of(values)


def write_config(config: Config) -> str:
    """The resolved configuration as YAML; `--config` reads it back."""
    return yaml.safe_dump(config.sections(), sort_keys=False, default_flow_style=None)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pretrain_gpt.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Pretrain a GPT. Flags have Megatron-LM's names, meanings and defaults.",
        epilog="example: python pretrain_gpt.py --preset tiny --data-path DATA_text_document --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model TOKENIZER --seq-length 256 --micro-batch-size 8 --train-iters 100 --lr 1e-3 --save RUN",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="YAML or JSON files, layered left to right; the command line wins (new).",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="A named model shape; see --list-presets (new)."
    )
    parser.add_argument(
        "--hf-config",
        metavar="PATH_OR_JSON",
        help="A model of Hugging Face's: its folder, config.json, or the text of one (new).",
    )
    parser.add_argument(
        "--list-presets",
        action="store_true",
        help="Print every preset with its parameter count, and exit (new).",
    )
    for section in fields(Config):
        group = parser.add_argument_group(section.name, section.type.__doc__)
        for option in fields(section.type):
            _add_flag(group, option)
    return parser


def _add_flag(group: argparse._ArgumentGroup, option) -> None:
    name, kind, meta = "--" + option.name.replace("_", "-"), _kind(option.type), option.metadata
    text = meta["help"].replace("%", "%%") + (
        "" if option.default in (None, (), False) else f" Default: {option.default}."
    )
    if kind is bool and option.name.startswith("no_"):
        group.add_argument(name, action="store_true", help=text)
    elif kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    else:
        # Values stay text here: `_convert` checks those of the command line and of YAML alike, and all of them at once.
        metavar = (
            "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else kind.__name__.upper()
        )
        group.add_argument(name, help=text, metavar=metavar, nargs="+" if meta["many"] else None)


def _kind(annotation: Any) -> type:
    """int for `int | None`, str for `tuple[str, ...]`."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return get_args(annotation)[0] if get_args(annotation) else annotation


def _sort_out(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Dashes for underscores, aliases resolved; flags without effect taken out with their values, and named; the unknown and refused are problems."""
    known = {
        flag.removeprefix("--") for action in _parser()._actions for flag in action.option_strings
    }
    kept, ignored, problems = [], [], []
    values_to_drop = 0.0  # of the flag before
    for word in argv:
        if not word.startswith("--"):
            if values_to_drop <= 0:
                kept.append(word)
            values_to_drop -= 1
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-")
        values_to_drop = 0
        if name in known:
            kept.append(f"--{name}{equals}{value}")
        elif name in ALIASES:
            flag, value = ALIASES[name]
            kept += [f"--{flag}", value]
        elif (arity := _look_up(name, WITHOUT_EFFECT)) is not None:
            ignored.append(f"--{name}")
            values_to_drop = 0 if equals else arity
        else:
            values_to_drop = math.inf
            problems.append(
                f"--{name} {_look_up(name, REFUSED) or 'is unknown' + _nearest(name, known, '--')}"
            )
    return kept, ignored, problems


def _look_up(name: str, table: dict[str, Any]) -> Any:
    """The entry of a flag, or of the pattern it falls under; None without one."""
    if name in table:
        return table[name]
    return next(
        (value for key, value in table.items() if key.endswith("*") and name.startswith(key[:-1])),
        None,
    )


def _nearest(name: str, known: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_layer(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        problems.append(f"--config {path}: {error.strerror}")
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"--config {path}: {' '.join(str(error).split())}")
    else:
        return _flatten({} if content is None else content, f"{path}: ", problems)
    return {}


def _flatten(content: Any, source: str, problems: list[str]) -> dict[str, Any]:
    """Keys are flag names, alone or under the name of their section."""
    if not isinstance(content, dict):
        problems.append(f"{source}expected keys and values, found {type(content).__name__}")
        return {}
    sections = {section.name for section in fields(Config)}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= (
            (value or {}) if key in sections and isinstance(value, dict | None) else {key: value}
        )
    return _convert_all(flat, source, problems)


def _convert_all(given: dict[str, Any], source: str, problems: list[str]) -> dict[str, Any]:
    """Field names and checked values for keys from a file or a command line; what cannot be is added to `problems`."""
    options = {option.name: option for section in fields(Config) for option in fields(section.type)}
    values = {}
    for key, value in given.items():
        flag = str(key).removeprefix("--").replace("_", "-")
        name = flag.replace("-", "_")
        if name in ("preset", "hf_config"):
            values[name] = value
        elif name in options:
            try:
                values[name] = _convert(options[name], value)
            except (TypeError, ValueError, OverflowError):
                choices, kind = options[name].metadata["choices"], _kind(options[name].type)
                words = {
                    int: "a whole number",
                    float: "a finite number",
                    bool: "true or false",
                    str: "text",
                }
                expected = (
                    f"one of {', '.join(choices)}{_nearest(str(value), choices)}"
                    if choices
                    else words[kind]
                )
                problems.append(f"{source}{key} {value!r} is not {expected}")
        elif flag in ALIASES:
            target, implied = ALIASES[flag]
            values |= {target.replace("-", "_"): implied} if value else {}
        elif _look_up(flag, WITHOUT_EFFECT) is None and value not in (None, False):
            problems.append(
                f"{source}{key} {_look_up(flag, REFUSED) or 'is unknown' + _nearest(name, options)}"
            )
    return values


def _convert(option, value: Any) -> Any:
    kind, meta = _kind(option.type), option.metadata
    if value is None:
        return option.default
    if meta["many"]:
        return tuple(
            str(item) for item in (value if isinstance(value, list) else str(value).split())
        )
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, (bool, list, dict)):
        raise TypeError
    if kind is int and float(value) != int(float(value)):
        raise ValueError
    value = int(float(value)) if kind is int else kind(value)
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError
    if kind is float and not math.isfinite(value):
        raise ValueError
    return value
