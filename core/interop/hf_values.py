"""What the config.json of most Hugging Face families says in the same words, in our terms, both ways: activations, rotary positions, windows."""

import json
from collections.abc import Callable
from typing import Any

from ..config import LLAMA3_ROPE, ROPE_OPTIONS, ROPE_SCALINGS, ModelConfig

Values = dict[str, Any]

# Activations.

_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
GATED = {
    "silu": {"swiglu": True},
    "swish": {"swiglu": True},
    "gelu": {"geglu": True, "exact_gelu": True},
}
GATED |= {name: {"geglu": True} for name in _TANH}
SINGLE = {"gelu": {"exact_gelu": True}, "relu2": {"squared_relu": True}} | {
    name: {} for name in _TANH
}


def activation(table: dict[str, Values], name: str) -> Values:
    if name not in table:
        raise ValueError(f"activation {name!r} is none of {', '.join(table)}")
    return table[name]


def activation_name(config: ModelConfig, tanh: str = "gelu_pytorch_tanh") -> str:
    if config.swiglu:
        return "silu"
    return "relu2" if config.squared_relu else "gelu" if config.exact_gelu else tanh


# Rotary positions. Release 5 writes rope_parameters, release 4 wrote rope_theta and rope_scaling; both read the latter.


def rope_of(hf: Values, outside: Values) -> Values:
    """What config.json says of rotation in one dict. outside: what it says beside that dict. An old rope_scaling wins over rope_parameters."""
    return outside | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})


def read_rope(
    hf: Values, rope: Values | None = None, kinds: tuple[str, ...] = tuple(ROPE_SCALINGS)
) -> Values:
    """Base, partial rotation and scaling. rope: what a family says under names of its own. kinds: the scalings it has."""
    if rope is None:
        rope = rope_of(hf, {"rope_theta": hf.get("rope_theta", 10000.0)})
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor {rope['partial_rotary_factor']} in a family that rotates whole heads"
            )
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), {}
    if kind not in kinds:
        raise ValueError(f"rope_type {kind!r} is none of {', '.join(kinds)}")
    original = (
        hf.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or hf["max_position_embeddings"]
    )
    if kind != "default":
        known = rope | {"original_max_position_embeddings": original}
        if kind in ("yarn", "longrope") and rope.get("factor") is None:
            known["factor"] = hf["max_position_embeddings"] / original
        missing = [key for key in ROPE_SCALINGS[kind] if key not in known]
        if missing:
            raise ValueError(f"rope_type {kind!r} without {', '.join(missing)}")
        scaling = {"rope_type": kind} | {key: known[key] for key in ROPE_SCALINGS[kind]}
        scaling |= {
            key: rope[key]
            for key in ROPE_OPTIONS
            if kind in ("yarn", "longrope") and rope.get(key) is not None
        }
    values = {
        "position_embedding_type": "rope",
        "rotary_base": float(rope["rope_theta"]),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
    }
    return values | _scaling_flags(scaling)


def _scaling_flags(scaling: Values) -> Values:
    """Megatron's two flags where they say it, else --rope-scaling."""
    if not scaling:
        return {}
    if scaling == {"rope_type": "llama3", "factor": scaling["factor"]} | LLAMA3_ROPE:
        return {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}
    return {"rope_scaling": json.dumps(scaling)}


def write_rope(config: ModelConfig) -> Values:
    return {"rope_theta": config.rotary_base, "rope_scaling": config.rope_rule}


# Windows. W there counts the token itself, Megatron's W,0 does not.


def windows_of(config: ModelConfig) -> list[int | None]:
    return [config.window(layer) for layer in range(config.num_layers)]


def read_windows(window: int | None, layers: list[bool]) -> Values:
    """The flags for `window` in the layers that are True."""
    if window is None or not any(layers):
        return {}
    size = {"window_size": f"{window - 1},0"}
    if all(layers):
        return size
    period = layers.index(False) + 1
    regular = all(windowed == bool((layer + 1) % period) for layer, windowed in enumerate(layers))
    return size | {
        "window_attn_skip_freq": str(period)
        if regular
        else str([int(windowed) for windowed in layers]).replace(" ", "")
    }


def sliding_layers(hf: Values, otherwise: Callable[[int], bool]) -> list[bool]:
    """Which layers have the window: by layer_types, or by the family's rule for a layer's number."""
    types = hf.get("layer_types")
    if types is None:
        return [otherwise(layer) for layer in range(hf["num_hidden_layers"])]
    return [kind == "sliding_attention" for kind in types]


def write_windows(config: ModelConfig) -> Values:
    windows = windows_of(config)
    return {
        "sliding_window": next((window for window in windows if window), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def write_window_everywhere(config: ModelConfig) -> Values:
    windows = windows_of(config)
    return {"sliding_window": windows[0] if all(windows) else None}
