"""The families of Hugging Face models that can be read and written, one row each.

To add a family:
 1. Give it a row in _ROWS below: its model_type, the class that transformers loads it with, what
    all its members have in common (`fixed`), and what transformers takes where config.json leaves
    a key out (`defaults`, from the family's configuration class there).
 2. Keys that mean one field of ours are in _KEYS; a family with other names says so in `keys`.
 3. Everything else its config.json says is read by `read` and written by `write`. Most of it is
    said in words that several families share: hf_values.py has those.
 4. If its tensors are named differently from Llama's, give it a row in hf_names.py.
 5. Add a small model of it to tests/interop/families.py. The tests compare it with transformers.

`read` raises ValueError, in config.json's words, for a member of the family that is not built here.
`write` may write anything: what it cannot say is found by reading it back (families.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..config import ROPE_SCALINGS, ModelConfig
from .hf_values import (
    GATED,
    SINGLE,
    Values,
    activation,
    activation_name,
    read_rope,
    read_windows,
    rope_of,
    sliding_layers,
    write_rope,
    write_window_everywhere,
    write_windows,
)

# Key of config.json -> field of ModelConfig, in most families.
_KEYS: dict[str, str | None] = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_method_std",
    "rms_norm_eps": "norm_epsilon",
    "attention_dropout": "attention_dropout",
}


def _nothing(said: object) -> Values:
    return {}


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face's.

    architecture: the class of transformers that loads it
    fixed: fields of ModelConfig that all its members have in common
    read: gives more fields of ModelConfig for a config.json
    write: gives more keys of config.json for a ModelConfig
    keys: key -> field where not as in _KEYS; None for a key that the family does not have
    defaults: what transformers takes where config.json leaves a key out
    """

    model_type: str
    architecture: str
    fixed: Values
    read: Callable[[Values], Values] = _nothing
    write: Callable[[ModelConfig], Values] = _nothing
    keys: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Values = field(default_factory=dict)

    @property
    def key_map(self) -> dict[str, str]:
        """Return key of config.json -> field of ModelConfig."""
        both = {**_KEYS, **self.keys}
        return {theirs: ours for theirs, ours in both.items() if ours is not None}


# What several families have in common.

_RMS = {"normalization": "RMSNorm", "disable_bias_linear": True}
_EPS_1E5 = {"rms_norm_eps": 1e-5}


def _gated_activation(hf: Values) -> Values:
    return activation(GATED, hf.get("hidden_act", "silu"))


def _attention_bias(hf: Values) -> Values:
    bias = hf.get("attention_bias", False)
    return {"add_qkv_bias": bias, "add_attn_out_bias": bias}


# Llama.

_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def _read_llama(hf: Values) -> Values:
    values = read_rope(hf) | _gated_activation(hf)
    mlp_bias = hf.get("mlp_bias", False)
    if mlp_bias and not hf.get("attention_bias", False):
        raise ValueError("mlp_bias without attention_bias")
    return values | {"disable_bias_linear": not mlp_bias} | _attention_bias(hf)


def _write_llama(config: ModelConfig) -> Values:
    return write_rope(config) | {
        "attention_bias": config.attention_out_bias,
        "mlp_bias": config.linear_bias,
        "hidden_act": activation_name(config),
    }


# GPT-2.

_GPT2_KEYS = {
    **dict.fromkeys(_KEYS),
    "n_embd": "hidden_size",
    "n_inner": "ffn_hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "norm_epsilon",
    "initializer_range": "init_method_std",
    "resid_pdrop": "hidden_dropout",
    "attn_pdrop": "attention_dropout",
}
_GPT2_DEFAULTS = {"layer_norm_epsilon": 1e-5, "n_positions": 1024}
# Switches of attention that are built here in one position alone.
_GPT2_ONLY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def _read_gpt2(hf: Values) -> Values:
    for key, only in _GPT2_ONLY.items():
        if hf.get(key, only) != only:
            raise ValueError(f"{key} {hf[key]}: only {only} can be read")
    ffn = hf.get("n_inner") or 4 * hf["n_embd"]
    return {"ffn_hidden_size": ffn} | activation(SINGLE, hf.get("activation_function", "gelu_new"))


def _write_gpt2(config: ModelConfig) -> Values:
    return {
        "activation_function": activation_name(config, "gelu_new"),
        "embd_pdrop": config.hidden_dropout,
    }


# Mistral.

_MISTRAL_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "num_key_value_heads": 8,
}


def _read_mistral(hf: Values) -> Values:
    window = read_windows(hf.get("sliding_window"), [True])
    return read_rope(hf) | _gated_activation(hf) | window


def _write_mistral(config: ModelConfig) -> Values:
    values = write_rope(config) | {"hidden_act": activation_name(config)}
    return values | write_window_everywhere(config)


# Qwen 2 and 3.

_QWEN_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
}


def _read_qwen(hf: Values) -> Values:
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    layers = sliding_layers(hf, lambda layer: layer >= hf.get("max_window_layers", 28))
    biases = {"add_qkv_bias": True} if hf["model_type"] == "qwen2" else _attention_bias(hf)
    return read_rope(hf) | _gated_activation(hf) | read_windows(window, layers) | biases


def _write_qwen(config: ModelConfig) -> Values:
    windows = write_windows(config)
    layers = windows["layer_types"]
    uses = "sliding_attention" in layers
    return (
        write_rope(config)
        | {"hidden_act": activation_name(config), "attention_bias": config.attention_out_bias}
        | windows
        | {
            "use_sliding_window": uses,
            "max_window_layers": layers.index("sliding_attention") if uses else config.num_layers,
        }
    )


# OLMo 2.


def _read_olmo2(hf: Values) -> Values:
    return read_rope(hf) | _gated_activation(hf) | _attention_bias(hf)


def _write_olmo2(config: ModelConfig) -> Values:
    return write_rope(config) | {
        "hidden_act": activation_name(config),
        "attention_bias": config.attention_out_bias,
    }


# Phi 3. Its longrope has two lists of factors; which one is used depends on two lengths.


def _read_phi3(hf: Values) -> Values:
    outside = {
        "rope_theta": hf.get("rope_theta", 10000.0),
        "partial_rotary_factor": hf.get("partial_rotary_factor", 1.0),
    }
    rope = rope_of(hf, outside)
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # older names of longrope
        rope["rope_type"] = "longrope"
    rotation = read_rope(hf, rope, ("default", "longrope"))
    return rotation | _gated_activation(hf) | read_windows(hf.get("sliding_window"), [True])


def _write_phi3(config: ModelConfig) -> Values:
    rule, longest = config.rope_rule, config.max_position_embeddings
    original = (rule or {}).get("original_max_position_embeddings") or longest
    is_plain = rule is not None and rule.keys() == {"rope_type", *ROPE_SCALINGS["longrope"]}
    if rule and is_plain and rule["factor"] == longest / original:
        # As release 4 wants it: three keys and no others. The rest follows from the two lengths.
        factors = {key: rule[key] for key in ("short_factor", "long_factor")}
        rule = {"type": "longrope"} | factors
    values = write_rope(config) | {
        "rope_scaling": rule,
        "partial_rotary_factor": config.rotary_percent,
        "original_max_position_embeddings": original,
        "hidden_act": activation_name(config),
    }
    return values | write_window_everywhere(config)


# GPT-NeoX.

_NEOX_KEYS = {
    "rms_norm_eps": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "layer_norm_eps": "norm_epsilon",
    "hidden_dropout": "hidden_dropout",
}
_NEOX_DEFAULTS = {"layer_norm_eps": 1e-5, "max_position_embeddings": 2048}


def _read_neox(hf: Values) -> Values:
    if not hf.get("attention_bias", True):
        raise ValueError("attention_bias False: only True can be read")
    outside = {
        "rope_theta": hf.get("rotary_emb_base", 10000),
        "partial_rotary_factor": hf.get("rotary_pct", 0.25),
    }
    rotation = read_rope(hf, rope_of(hf, outside))
    residual = {"parallel_residual": hf.get("use_parallel_residual", True)}
    return rotation | residual | activation(SINGLE, hf.get("hidden_act", "gelu"))


def _write_neox(config: ModelConfig) -> Values:
    return {
        "rotary_emb_base": config.rotary_base,
        "rotary_pct": config.rotary_percent,
        "rope_scaling": config.rope_rule,
        "use_parallel_residual": config.parallel_residual,
        "hidden_act": activation_name(config, "gelu_new"),
    }


# Gemma 2 and 3.

_GEMMA = _RMS | {
    "apply_layernorm_1p": True,
    "norm_placement": "both",
    "scale_embeddings": True,
    "untie_embeddings_and_output_weights": False,
}
_GEMMA_WINDOW = 4096
_GEMMA2_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "sliding_window": _GEMMA_WINDOW,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = _GEMMA2_DEFAULTS | {
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def _read_gemma(hf: Values) -> Values:
    if hf.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: attention is causal here")
    name = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    return activation(GATED, name) | _attention_bias(hf) | _gemma_scores(hf)


def _gemma_scores(hf: Values) -> Values:
    """Return the scale and the caps of scores and logits."""
    scalar = hf["query_pre_attn_scalar"]
    if type(scalar) is not int:
        said = f"query_pre_attn_scalar {scalar}"
        raise ValueError(f"{said}: --softmax-scale is 1 / sqrt of a whole number there")
    return {
        "softmax_scale": scalar**-0.5,
        "final_logit_softcapping": hf["final_logit_softcapping"],
    }


def _read_gemma2(hf: Values) -> Values:
    values = _read_gemma(hf)
    values["attn_logit_softcapping"] = hf["attn_logit_softcapping"]
    layers = sliding_layers(hf, lambda layer: layer % 2 == 0)
    return values | read_windows(hf["sliding_window"], layers) | read_rope(hf)


def _read_gemma3(hf: Values) -> Values:
    values = _read_gemma(hf)
    if hf.get("attn_logit_softcapping") is not None:
        raise ValueError(
            "attn_logit_softcapping: transformers' gemma3_text leaves it out of attention, "
            "so it cannot be meant"
        )
    period = hf.get("sliding_window_pattern") or 6
    layers = sliding_layers(hf, lambda layer: bool((layer + 1) % period))
    return values | read_windows(hf["sliding_window"], layers) | _read_two_ropes(hf)


def _read_two_ropes(hf: Values) -> Values:
    """Return Gemma 3's rotation: layers with a window have a base of their own, and no scaling."""
    given = hf.get("rope_parameters") or {}
    everywhere = {"rope_theta": hf.get("rope_theta", 1e6)}
    everywhere |= given.get("full_attention") or {}
    everywhere |= hf.get("rope_scaling") or {}
    local = {"rope_theta": hf.get("rope_local_base_freq", 1e4)}
    local |= given.get("sliding_attention") or {}
    kind = local.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} in layers with a window: only default can be read")
    return read_rope(hf, everywhere) | {"rotary_base_local": float(local["rope_theta"])}


def _write_gemma2(config: ModelConfig) -> Values:
    scale = config.softmax_scale or config.head_size**-0.5
    scalar = scale**-2
    is_whole = round(scalar) ** -0.5 == scale
    windows = write_windows(config)
    # A number even where no layer has a window.
    windows["sliding_window"] = windows["sliding_window"] or _GEMMA_WINDOW
    return {
        "hidden_activation": activation_name(config),
        "attention_bias": config.attention_out_bias,
        "query_pre_attn_scalar": round(scalar) if is_whole else scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        **write_rope(config),
        **windows,
    }


def _write_gemma3(config: ModelConfig) -> Values:
    local = config.rotary_base_local
    base = config.rotary_base if local is None else local
    return _write_gemma2(config) | {"rope_local_base_freq": base}


# The table. A model that fits several families is exported as the first.

_ROWS = (
    Family(
        "llama",
        "LlamaForCausalLM",
        fixed=_RMS,
        read=_read_llama,
        write=_write_llama,
        defaults=_LLAMA_DEFAULTS,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        fixed={"untie_embeddings_and_output_weights": False},
        read=_read_gpt2,
        write=_write_gpt2,
        keys=_GPT2_KEYS,
        defaults=_GPT2_DEFAULTS,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        fixed=_RMS,
        read=_read_mistral,
        write=_write_mistral,
        defaults=_MISTRAL_DEFAULTS,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        fixed=_RMS,
        read=_read_qwen,
        write=_write_qwen,
        defaults=_QWEN_DEFAULTS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        fixed=_RMS | {"qk_layernorm": True},
        read=_read_qwen,
        write=_write_qwen,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        fixed=_RMS
        | {"norm_placement": "post", "qk_layernorm": True, "qk_layernorm_width": "projection"},
        read=_read_olmo2,
        write=_write_olmo2,
        defaults=_EPS_1E5 | {"max_position_embeddings": 2048},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        fixed=_RMS,
        read=_read_phi3,
        write=_write_phi3,
        keys={"head_dim": None},
        defaults=_EPS_1E5 | {"max_position_embeddings": 4096},
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        fixed={},
        read=_read_neox,
        write=_write_neox,
        keys=_NEOX_KEYS,
        defaults=_NEOX_DEFAULTS,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        fixed=_GEMMA,
        read=_read_gemma2,
        write=_write_gemma2,
        defaults=_GEMMA2_DEFAULTS,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        fixed=_GEMMA | {"qk_layernorm": True},
        read=_read_gemma3,
        write=_write_gemma3,
        defaults=_GEMMA3_DEFAULTS,
    ),
)
FAMILIES = {family.model_type: family for family in _ROWS}
