"""Read a command line and YAML files into a Config.

Flags have Megatron's names and are made from the fields of fields.py: a new field is a flag, a key
of YAML files and a line of --help without an edit here.

The later of these wins:  defaults  <  --preset or --hf-config  <  each --config file, left to right
<  the command line. Every layer is first turned into field names and checked values, and all that
is wrong in any of them is reported at once.
"""

import argparse
import difflib
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml

from .errors import ConfigError
from .fields import SECTIONS, Config, flag_of
from .megatron_flags import ALIASES, REFUSED, WITHOUT_EFFECT
from .presets import PRESETS

_BASES = ("preset", "hf_config")  # keys that name a whole model instead of a field
_EXAMPLE = (
    "example: python pretrain_gpt.py --preset tiny --data-path DATA_text_document "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER --seq-length 256 "
    "--micro-batch-size 8 --train-iters 100 --lr 1e-3 --save RUN"
)

ReadHFConfig = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """The request that a command line makes.

    without_effect: flags of Megatron's that it names and that change nothing here
    list_presets: it asks for the list of presets instead of a run
    """

    config: Config
    without_effect: tuple[str, ...] = ()
    list_presets: bool = False


class _Parser(argparse.ArgumentParser):
    """argparse whose complaint is a ConfigError instead of an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint."""
        problem = message.removeprefix("argument ")
        raise ConfigError([problem.replace("expected one argument", "needs a value")])


def parse(argv: list[str], read_hf_config: ReadHFConfig | None = None) -> Request:
    """Return what a command line, without the program's name, asks for.

    read_hf_config: gives the fields of ours for a value of --hf-config; its ValueError is a problem
    Raises ConfigError with every unknown flag or key (each with the nearest one that exists),
    refused flag and bad value.
    """
    words = _sort_out(argv)
    problems = words.problems
    try:
        given = vars(_parser().parse_args(words.kept))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    files = given.pop("config", [])
    list_presets = given.pop("list_presets", False)
    values: dict[str, Any] = {}
    for path in files:
        values |= _read_layer(Path(path), problems)
    by_flag = {flag_of(name): value for name, value in given.items()}
    values |= _convert_all(by_flag, "", problems)
    named_model = {key: values.pop(key, None) for key in _BASES}
    base = _base(**named_model, read_hf_config=read_hf_config, problems=problems)
    if problems:
        raise ConfigError(problems)
    if "vocab_size" in base and values.get("tokenizer_type") == "NullTokenizer":
        base["vocab_size"] -= 1  # the last id is its end of document
    return Request(Config.of(base | values), tuple(words.ignored), list_presets)


def _base(
    preset: Any, hf_config: Any, read_hf_config: ReadHFConfig | None, problems: list[str]
) -> dict[str, Any]:
    """Return the values of a named model, which everything else overrides."""
    if preset is not None and hf_config is not None:
        given = f"--preset {preset} and --hf-config {hf_config}"
        problems.append(f"{given} exclude each other; give one")
    elif preset is not None:
        if str(preset) in PRESETS:
            return dict(PRESETS[preset])
        nearest = _nearest(str(preset), PRESETS)
        problems.append(f"--preset {preset} is unknown{nearest}; --list-presets shows all")
    elif hf_config is not None:
        if read_hf_config is None:
            problems.append("--hf-config is not read here; give the shape by flags or --preset")
            return {}
        try:
            return dict(read_hf_config(str(hf_config)))
        except ValueError as error:
            problems.append(f"--hf-config {str(hf_config)[:80]}: {error}")
    return {}


def read_config(text: str) -> Config:
    """Return a configuration from the YAML text that was saved beside a checkpoint."""
    problems: list[str] = []
    values = _flatten(yaml.safe_load(text), "config.yaml", problems)
    if problems:
        raise ConfigError(problems)
    return Config.of(values)


def write_config(config: Config) -> str:
    """Return a resolved configuration as YAML; `--config` reads it back."""
    return yaml.safe_dump(config.sections(), sort_keys=False, default_flow_style=None)


# The parser, made from the fields.


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pretrain_gpt.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Pretrain a GPT. Flags have Megatron-LM's names, meanings and defaults.",
        epilog=_EXAMPLE,
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
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name, section.__doc__)
        for option in fields(section):
            _add_flag(group, option)
    return parser


def _add_flag(group: argparse._ArgumentGroup, option: Field) -> None:
    flag, kind = flag_of(option.name), _kind(option)
    choices, many = option.metadata["choices"], option.metadata["many"]
    text = option.metadata["help"].replace("%", "%%")
    if option.default not in (None, (), False):
        text += f" Default: {option.default}."
    if kind is bool and option.name.startswith("no_"):
        group.add_argument(flag, action="store_true", help=text)
    elif kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        # Values stay text here: `_convert` checks those of the command line and those of YAML
        # alike, and all of them at once.
        metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        group.add_argument(flag, help=text, metavar=metavar, nargs="+" if many else None)


def _kind(option: Field) -> type:
    """Return the type of one value: int for `int | None`, str for `tuple[str, ...]`."""
    annotation: Any = option.type
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    arguments = get_args(annotation)
    return arguments[0] if arguments else annotation


# The words of the command line, before argparse sees them.


@dataclass
class _Words:
    """A command line, sorted out.

    kept: the words that argparse reads
    ignored: flags without effect
    problems: one line for each flag that is unknown or refused
    """

    kept: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _sort_out(argv: list[str]) -> _Words:
    """Spell flags with dashes, replace aliases, and take out what has no effect or cannot be had.

    The values of a flag that is taken out go with it: as many as a flag without effect has, all of
    a flag that is a problem.
    """
    actions = _parser()._actions
    known = {flag.removeprefix("--") for action in actions for flag in action.option_strings}
    found = _Words()
    values_to_drop = 0.0
    for word in argv:
        if not word.startswith("--"):
            if values_to_drop <= 0:
                found.kept.append(word)
            values_to_drop -= 1
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-")
        arity = _look_up(name, WITHOUT_EFFECT)
        values_to_drop = 0
        if name in known:
            found.kept.append(f"--{name}{equals}{value}")
        elif name in ALIASES:
            flag, implied = ALIASES[name]
            found.kept += [f"--{flag}", implied]
        elif arity is not None:
            found.ignored.append(f"--{name}")
            values_to_drop = 0 if equals else arity
        else:
            values_to_drop = math.inf
            found.problems.append(f"--{name} {_why_not(name, known, '--')}")
    return found


def _why_not(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return why a flag cannot be had: it is refused, or unknown and near to another."""
    return _look_up(name.replace("_", "-"), REFUSED) or f"is unknown{_nearest(name, known, prefix)}"


def _look_up(name: str, table: Mapping[str, Any]) -> Any:
    """Return the entry of a flag, or of the pattern it falls under; None without one."""
    if name in table:
        return table[name]
    patterns = (key for key in table if key.endswith("*") and name.startswith(key[:-1]))
    pattern = next(patterns, None)
    return None if pattern is None else table[pattern]


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


# Values: of files and of the command line alike.


def _read_layer(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the values of one --config file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        problems.append(f"--config {path}: {error.strerror}")
        return {}
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"--config {path}: {' '.join(str(error).split())}")
        return {}
    return _flatten({} if content is None else content, f"{path}: ", problems)


def _flatten(content: Any, source: str, problems: list[str]) -> dict[str, Any]:
    """Return the values of a file whose keys are flag names, alone or under their section."""
    if not isinstance(content, dict):
        problems.append(f"{source}expected keys and values, found {type(content).__name__}")
        return {}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        is_section = key in SECTIONS and isinstance(value, dict | None)
        flat |= (value or {}) if is_section else {key: value}
    return _convert_all(flat, source, problems)


def _convert_all(given: dict[str, Any], source: str, problems: list[str]) -> dict[str, Any]:
    """Return field names and checked values. What cannot be had is added to `problems`.

    source: what each problem begins with, such as the name of a file
    """
    options = {option.name: option for section in SECTIONS.values() for option in fields(section)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        flag = str(key).removeprefix("--").replace("_", "-")
        name = flag.replace("-", "_")
        if name in _BASES:
            values[name] = value
        elif name in options:
            try:
                values[name] = _convert(options[name], value)
            except (TypeError, ValueError, OverflowError):
                expected = _expected(options[name], value)
                problems.append(f"{source}{key} {value!r} is not {expected}")
        elif flag in ALIASES:
            target, implied = ALIASES[flag]
            if value:
                values[target.replace("-", "_")] = implied
        elif _look_up(flag, WITHOUT_EFFECT) is None and value not in (None, False):
            problems.append(f"{source}{key} {_why_not(name, options)}")
    return values


_WORDS_FOR = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
}


def _expected(option: Field, value: Any) -> str:
    """Return what the value of a field should have been."""
    choices = option.metadata["choices"]
    if choices:
        return f"one of {', '.join(choices)}{_nearest(str(value), choices)}"
    return _WORDS_FOR[_kind(option)]


def _convert(option: Field, value: Any) -> Any:
    """Return a value as its field holds it. Raises TypeError, ValueError or OverflowError."""
    if value is None:
        return option.default
    if option.metadata["many"]:
        items = value if isinstance(value, list) else str(value).split()
        return tuple(str(item) for item in items)
    kind, choices = _kind(option), option.metadata["choices"]
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, (bool, list, dict)):
        raise TypeError
    if kind is int:
        number = float(value)  # YAML and people write 1e6
        if number != int(number):
            raise ValueError
        return int(number)
    converted = kind(value)
    if choices and converted not in choices:
        raise ValueError
    if kind is float and not math.isfinite(converted):
        raise ValueError
    return converted
