"""Translate the values that most families write alike in config.json, both ways.

Three subjects: the activation, the rotation of queries and keys, the windows of attention. Each has
a function that reads Hugging Face's words into fields of ModelConfig and one that writes them.
"""

import json
from collections.abc import Callable
from typing import Any

from ..config import LLAMA3_ROPE, ROPE_OPTIONS, ROPE_SCALINGS, ModelConfig

Values = dict[str, Any]

# Activations: Hugging Face's name -> our fields.

_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three names of one approximation
GATED: dict[str, Values] = {
    "silu": {"swiglu": True},
    "swish": {"swiglu": True},
    "gelu": {"geglu": True, "exact_gelu": True},
    **{name: {"geglu": True} for name in _TANH},
}
SINGLE: dict[str, Values] = {
    "gelu": {"exact_gelu": True},
    "relu2": {"squared_relu": True},
    **{name: {} for name in _TANH},
}
# The name in ops -> Hugging Face's. An activation without a row is written under its own name,
# which no family reads back: a model with it is not exported.
_NAMES = {"silu": "silu", "squared_relu": "relu2", "gelu_erf": "gelu"}


def activation(table: dict[str, Values], name: str) -> Values:
    """Return the fields for an activation of Hugging Face's. table: GATED or SINGLE."""
    if name not in table:
        raise ValueError(f"activation {name!r} is none of {', '.join(table)}")
    return table[name]


def activation_name(config: ModelConfig, tanh: str = "gelu_pytorch_tanh") -> str:
    """Return Hugging Face's name of a model's activation. tanh: the family's name of that GELU."""
    ours = config.activation
    return tanh if ours == "gelu_tanh" else _NAMES.get(ours, ours)


# Rotation. Release 5 of transformers writes rope_parameters, release 4 wrote rope_theta and
# rope_scaling. Both read the latter.


def rope_of(hf: Values, outside: Values) -> Values:
    """Return what config.json says of rotation in one dict. An old rope_scaling wins.

    outside: what it says beside that dict
    """
    return outside | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})


def read_rope(
    hf: Values, rope: Values | None = None, kinds: tuple[str, ...] = tuple(ROPE_SCALINGS)
) -> Values:
    """Return our fields for base, partial rotation and scaling.

    rope: what the family says under names of its own, as rope_of gives it
    kinds: the scalings that the family has
    """
    if rope is None:
        # Families that say it in the common words rotate whole heads.
        rope = rope_of(hf, {"rope_theta": hf.get("rope_theta", 10000.0)})
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            share = rope["partial_rotary_factor"]
            raise ValueError(f"partial_rotary_factor {share} in a family that rotates whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        raise ValueError(f"rope_type {kind!r} is none of {', '.join(kinds)}")
    values = {
        "position_embedding_type": "rope",
        "rotary_base": float(rope["rope_theta"]),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
    }
    return values | _scaling_flags(_scaling(hf, rope, kind))


def _scaling(hf: Values, rope: Values, kind: str) -> Values:
    """Return the scaling of the frequencies as --rope-scaling says it; {} for none."""
    longest = hf["max_position_embeddings"]
    key = "original_max_position_embeddings"
    original = hf.get(key) or rope.get(key) or longest
    if kind == "default":
        return {}
    # These two stretch a model trained to one length to a greater one: the factor is the ratio of
    # the two lengths unless config.json says another.
    by_length = kind in ("yarn", "longrope")
    known = rope | {key: original}
    if by_length and rope.get("factor") is None:
        known["factor"] = longest / original
    missing = [key for key in ROPE_SCALINGS[kind] if key not in known]
    if missing:
        raise ValueError(f"rope_type {kind!r} without {', '.join(missing)}")
    scaling = {"rope_type": kind} | {key: known[key] for key in ROPE_SCALINGS[kind]}
    if by_length:
        scaling |= {key: rope[key] for key in ROPE_OPTIONS if rope.get(key) is not None}
    return scaling


def _scaling_flags(scaling: Values) -> Values:
    """Return Megatron's two flags for the scaling that they can say, else --rope-scaling."""
    if not scaling:
        return {}
    # Llama 3.1's rule with its published numbers is what --use-rope-scaling means.
    if scaling == {"rope_type": "llama3", "factor": scaling["factor"]} | LLAMA3_ROPE:
        return {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}
    return {"rope_scaling": json.dumps(scaling)}


def write_rope(config: ModelConfig) -> Values:
    """Return base and scaling in the keys that both releases read."""
    return {"rope_theta": config.rotary_base, "rope_scaling": config.rope_rule}


# Windows. A window of W counts the token itself there. Megatron's W,0 does not: it is one smaller.


def windows_of(config: ModelConfig) -> list[int | None]:
    """Return the window of every layer, the token itself included; None for a layer without."""
    return [config.window(layer) for layer in range(config.num_layers)]


def read_windows(window: int | None, layers: list[bool]) -> Values:
    """Return the flags for `window` in the layers that are True."""
    if window is None or not any(layers):
        return {}
    size = {"window_size": f"{window - 1},0"}
    if all(layers):
        return size
    # Megatron's N: every N-th layer is without. Any other pattern is a list.
    period = layers.index(False) + 1
    every = [bool((layer + 1) % period) for layer in range(len(layers))]
    if layers == every:
        return size | {"window_attn_skip_freq": str(period)}
    pattern = ",".join(str(int(windowed)) for windowed in layers)
    return size | {"window_attn_skip_freq": f"[{pattern}]"}


def sliding_layers(hf: Values, otherwise: Callable[[int], bool]) -> list[bool]:
    """Return which layers have the window: by layer_types, or by a rule for a layer's number."""
    types = hf.get("layer_types")
    if types is None:
        return [otherwise(layer) for layer in range(hf["num_hidden_layers"])]
    return [kind == "sliding_attention" for kind in types]


def write_windows(config: ModelConfig) -> Values:
    """Return the window, and for each layer whether it has it."""
    windows = windows_of(config)
    return {
        "sliding_window": next((window for window in windows if window), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def write_window_everywhere(config: ModelConfig) -> Values:
    """Return the window, for families that have it in all layers or in none."""
    windows = windows_of(config)
    return {"sliding_window": windows[0] if all(windows) else None}
