"""Hugging Face's config.json as our ModelConfig, and back.

The families are rows of a table (family_table.py). No row says which models its family has. That
follows from one rule: a family has a model if writing the model's configuration and reading it back
gives the same model again. So a new field of ModelConfig needs no edit here. A family that does not
write the field reads back its default, and refuses to export a model where it is another.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ACTIVATIONS, FlagError, ModelConfig, wrong_types
from .family_table import FAMILIES, Family
from .hf_values import Values, windows_of

_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
_UNTIE = "untie_embeddings_and_output_weights"


def read_config(hf: Values) -> tuple[ModelConfig, int]:
    """Return our configuration and the size of the vocabulary that a config.json says.

    Raises ValueError for a family, or a member of one, that cannot be read.
    """
    model_type = hf.get("model_type")
    if model_type in _MIXTURES:
        raise ValueError(
            f"model_type {model_type!r} is a mixture of experts, "
            "which is not available in this version"
        )
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    hf = family.defaults | hf
    # A config.json is anybody's: a key that is missing, or of another type than transformers
    # writes, shows as one of these errors somewhere in the reading.
    try:
        values = _fields(family, hf)
        config = ModelConfig(**values, hf_model_type=family.model_type)
        vocab_size = hf["vocab_size"]
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"a value of the wrong kind: {error}") from None
    problems = wrong_types(config)
    if type(vocab_size) is not int or vocab_size < 1:
        problems.append(f"vocab_size is {vocab_size!r}")
    if problems:
        raise ValueError(f"a value of the wrong kind: {'; '.join(problems)}")
    return config, vocab_size


def _fields(family: Family, hf: Values) -> Values:
    """Return the fields of ModelConfig that a config.json says. Later ones win."""
    said = {ours: hf[key] for key, ours in family.key_map.items() if hf.get(key) is not None}
    heads = said["num_attention_heads"]
    usual = {
        "num_query_groups": heads,
        "kv_channels": said["hidden_size"] // heads,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    # A family may be tied by default; config.json has the last word.
    tied_by_default = family.fixed.get(_UNTIE) is False
    tied = hf.get("tie_word_embeddings", tied_by_default)
    always = {"group_query_attention": True, _UNTIE: not tied}
    return usual | said | family.fixed | always | family.read(hf)


def read_flags(path_or_json: str) -> Values:
    """Return every field of ModelConfig, and vocab_size, for the value of --hf-config.

    path_or_json: a folder, a config.json, or the text of one
    Raises ValueError of one line.
    """
    text = path_or_json
    if not text.lstrip().startswith("{"):
        path = Path(path_or_json)
        path = path / "config.json" if path.is_dir() else path
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        hf = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(hf, dict):
        raise ValueError("not a JSON object")
    config, vocab_size = read_config(hf)
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    return values | {"vocab_size": vocab_size}


def write_config(config: ModelConfig, vocab_size: int, special_ids: Values) -> Values:
    """Return the config.json of a model, in keys that transformers 4 and 5 both read.

    config: of a model that `family_of` finds a family for
    special_ids: bos_token_id, eos_token_id and the like
    """
    family = family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        **_written(family, config),
        **special_ids,
    }


def _written(family: Family, config: ModelConfig) -> Values:
    """Return what a family's config.json says of a model, as far as the family can say it."""
    values = {key: getattr(config, ours) for key, ours in family.key_map.items()}
    # Our field counts groups only with --group-query-attention; theirs always counts heads.
    if "num_key_value_heads" in values:
        values["num_key_value_heads"] = config.num_kv_heads
    return values | {"tie_word_embeddings": config.tied} | family.write(config)


# Which family has a model.


@dataclass(frozen=True)
class _Obstacles:
    """The reasons that keep a model out of a family.

    problems: one line each
    unreadable: what the family would write about the model cannot even be read back
    """

    problems: list[str]
    unreadable: bool = False

    @property
    def distance(self) -> tuple[bool, int]:
        """Return how far away the family is. One that cannot be read is the furthest."""
        return self.unreadable, len(self.problems)


def family_of(config: ModelConfig) -> Family:
    """Return the family that --hf-model-type names, or the first that has such a model.

    Raises ValueError, naming the nearest family and the flags that differ, where there is none.
    """
    asked = config.hf_model_type
    if asked is not None and asked not in FAMILIES:
        raise FlagError(f"--hf-model-type {asked} is none of {', '.join(FAMILIES)}")
    candidates = list(FAMILIES.values()) if asked is None else [FAMILIES[asked]]
    obstacles = {family.model_type: _obstacles(family, config) for family in candidates}
    for family in candidates:
        if not obstacles[family.model_type].problems:
            return family
    nearest = min(obstacles, key=lambda name: obstacles[name].distance)
    any_family = "any family" if len(candidates) > 1 else "this family"
    problems = "; ".join(obstacles[nearest].problems)
    raise ValueError(
        f"no such model in {any_family} of Hugging Face's; nearest {nearest}: {problems}"
    )


def export_problems(config: ModelConfig) -> list[str]:
    """Return why --save-hf cannot export a model; empty where it can."""
    try:
        family_of(config)
    except ValueError as error:
        return [f"--save-hf: {error}"]
    return []


def _obstacles(family: Family, config: ModelConfig) -> _Obstacles:
    """Write a model as the family does, read that back, and compare."""
    named = {"model_type": family.model_type, "vocab_size": 1}
    try:
        there, _ = read_config(named | _written(family, config))
    except ValueError as error:
        return _Obstacles([str(error)], unreadable=True)
    return _Obstacles(differences(there, config))


# When two configurations are of one model.


def differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Return in what two models differ: each flag with both values."""
    theirs, ours = _meaning(there), _meaning(here)
    return [
        f"{flag} {theirs[flag]} there, {value} here"
        for flag, value in ours.items()
        if theirs[flag] != value
    ]


class _Meaning(NamedTuple):
    """Fields that can say one thing in several ways, and what they say."""

    fields: tuple[str, ...]
    of: Callable[[ModelConfig], Any]


# Rotary flags are without meaning in a model that does not rotate: they say None there.


def _rotates(config: ModelConfig) -> bool:
    return config.position_embedding_type == "rope"


def _rotary_base(config: ModelConfig) -> float | None:
    return config.rotary_base if _rotates(config) else None


def _rotated_dims(config: ModelConfig) -> int | None:
    return int(config.rotary_percent * config.head_size) if _rotates(config) else None


def _rope_rule(config: ModelConfig) -> Values | None:
    rule = config.rope_rule if _rotates(config) else None
    return rule and {key: value for key, value in rule.items() if value is not None}


def _local_base(config: ModelConfig) -> float | None:
    """Return the base of layers with a window; None for a model without such layers."""
    if not _rotates(config) or not any(windows_of(config)):
        return None
    local = config.rotary_base_local
    return config.rotary_base if local is None else local


def _windows(config: ModelConfig) -> list[int | None] | None:
    windows = windows_of(config)
    return windows if any(windows) else None


# Every field of ModelConfig is compared as it stands, but for those of these two tables.
_MEANINGS = (
    _Meaning(("group_query_attention", "num_query_groups"), lambda c: c.num_kv_heads),
    _Meaning(("rotary_base",), _rotary_base),
    _Meaning(("rotary_percent",), _rotated_dims),
    _Meaning(("rotary_interleaved",), lambda c: c.rotary_interleaved and _rotates(c)),
    _Meaning(("use_rope_scaling", "rope_scaling_factor", "rope_scaling"), _rope_rule),
    _Meaning(("rotary_base_local",), _local_base),
    _Meaning((*ACTIVATIONS, "exact_gelu"), lambda c: (c.activation, c.gated)),
    _Meaning(("add_qkv_bias",), lambda c: c.qkv_bias),
    _Meaning(("add_attn_out_bias",), lambda c: c.attention_out_bias),
    _Meaning(
        ("qk_layernorm", "qk_layernorm_width"), lambda c: c.qk_layernorm and c.qk_layernorm_width
    ),
    _Meaning(("softmax_scale",), lambda c: c.softmax_scale or c.head_size**-0.5),
    _Meaning(("window_size", "window_attn_skip_freq"), _windows),
)
_NO_PART_OF_A_MODEL = {
    "init_method_std",  # how it began
    "attention_dropout",  # how it is trained
    "hidden_dropout",
    "make_vocab_size_divisible_by",  # how it is laid out: rows of padding are never stored
    "hf_model_type",  # what it is exported as
}


def _meaning(config: ModelConfig) -> Values:
    """Return what decides the numbers that a model computes, by flag, however the flags say it."""
    elsewhere = _NO_PART_OF_A_MODEL.union(*(meaning.fields for meaning in _MEANINGS))
    as_they_stand = [item.name for item in fields(config) if item.name not in elsewhere]
    values = {_flag(name): getattr(config, name) for name in as_they_stand}
    for meaning in _MEANINGS:
        values[", ".join(map(_flag, meaning.fields))] = meaning.of(config)
    return values


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
