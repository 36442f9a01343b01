"""The families of Hugging Face models that can be read and written, each a row of a table: what its config.json says in our terms, both ways.

A family has a model exactly where writing the model's configuration and reading it back gives the same model again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..config import ROPE_SCALINGS, FlagError, ModelConfig, wrong_types
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
    windows_of,
    write_rope,
    write_window_everywhere,
    write_windows,
)

_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Family:
    """One model_type. fixed: what all its members are. read: more fields of ours from config.json. write: more keys of config.json from ours."""

    model_type: str
    architecture: str
    fixed: Values
    read: Callable[[Values], Values] = lambda hf: {}
    write: Callable[[ModelConfig], Values] = lambda config: {}
    keys: Values = field(
        default_factory=dict
    )  # theirs -> ours, where not as in _KEYS; ours None: it has no such key
    defaults: Values = field(
        default_factory=dict
    )  # what transformers takes where config.json leaves a key out

    @property
    def key_map(self) -> dict[str, str]:
        return {theirs: ours for theirs, ours in (_KEYS | self.keys).items() if ours is not None}


_KEYS = {
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


def read_config(hf: Values) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary of a config.json. Raises ValueError for a family, or a member of one, that cannot be read."""
    family = FAMILIES.get(hf.get("model_type"))
    if family is None:
        if hf.get("model_type") in _MIXTURES:
            raise ValueError(
                f"model_type {hf['model_type']!r} is a mixture of experts, which is not available in this version"
            )
        raise ValueError(f"model_type {hf.get('model_type')!r} is none of {', '.join(FAMILIES)}")
    hf = family.defaults | hf
    try:
        values = {
            ours: hf[theirs]
            for theirs, ours in family.key_map.items()
            if hf.get(theirs) is not None
        }
        heads = values["num_attention_heads"]
        values |= {
            "num_query_groups": values.get("num_query_groups", heads),
            "group_query_attention": True,
        }
        values.setdefault("kv_channels", values["hidden_size"] // heads)
        values |= {"hidden_dropout": 0.0, "attention_dropout": 0.0} | {
            k: v for k, v in values.items() if k.endswith("_dropout")
        }
        tied = hf.get(
            "tie_word_embeddings", family.fixed.get("untie_embeddings_and_output_weights") is False
        )
        values["untie_embeddings_and_output_weights"] = not tied
        values |= {
            name: value
            for name, value in family.fixed.items()
            if name != "untie_embeddings_and_output_weights"
        }
        values |= family.read(hf)
        config, vocab_size = (
            ModelConfig(**values, hf_model_type=family.model_type),
            hf["vocab_size"],
        )
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


def read_flags(path_or_json: str) -> Values:
    """--hf-config: every field of ModelConfig, and the vocabulary, from a folder, a config.json, or its text. Raises ValueError, one line."""
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
    return {item.name: getattr(config, item.name) for item in fields(config)} | {
        "vocab_size": vocab_size
    }


def write_config(config: ModelConfig, vocab_size: int, special_ids: Values) -> Values:
    """config.json for a model that `family_of` has found a family for, in the keys that transformers 4 and 5 both read.

    special_ids: bos_token_id, eos_token_id and the like.
    """
    family = family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        **_written(family, config),
        **special_ids,
    }


def family_of(config: ModelConfig) -> Family:
    """The family that --hf-model-type names, or the first that has such a model. Raises ValueError, naming flags, where there is none."""
    if config.hf_model_type is not None and config.hf_model_type not in FAMILIES:
        raise FlagError(f"--hf-model-type {config.hf_model_type} is none of {', '.join(FAMILIES)}")
    asked = (
        list(FAMILIES.values())
        if config.hf_model_type is None
        else [FAMILIES[config.hf_model_type]]
    )
    differ = {family.model_type: _differences(family, config) for family in asked}
    fitting = [FAMILIES[name] for name, problems in differ.items() if not problems]
    if fitting:
        return fitting[0]
    # A family that cannot even say it is further away than any that says it otherwise.
    nearest = min(
        differ, key=lambda name: (not differ[name][0].startswith("--"), len(differ[name]))
    )
    raise ValueError(
        f"no such model in {'any' if len(asked) > 1 else 'this'} family of Hugging Face's; nearest {nearest}: {'; '.join(differ[nearest])}"
    )


def differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """In what two models differ, other than in dropout and initialisation: each flag with both values."""
    theirs, ours = _meaning(there), _meaning(here)
    return [
        f"{flag} {theirs[flag]} there, {ours[flag]} here"
        for flag in ours
        if theirs[flag] != ours[flag]
    ]


def export_problems(config: ModelConfig) -> list[str]:
    """Why --save-hf cannot export a model; empty where it can."""
    try:
        family_of(config)
    except ValueError as error:
        return [f"--save-hf: {error}"]
    return []


def _differences(family: Family, config: ModelConfig) -> list[str]:
    """What the family cannot say of this model: flag, what it is there, what it is here."""
    try:
        there, _ = read_config(
            {"model_type": family.model_type, "vocab_size": 1, **_written(family, config)}
        )
    except ValueError as error:
        return [str(error)]
    return differences(there, config)


def _written(family: Family, config: ModelConfig) -> Values:
    values = {theirs: getattr(config, ours) for theirs, ours in family.key_map.items()}
    if "num_key_value_heads" in values:
        values["num_key_value_heads"] = config.num_kv_heads
    return values | {"tie_word_embeddings": config.tied} | family.write(config)


def _meaning(config: ModelConfig) -> Values:
    """What decides the numbers a model computes, by flag, however the flags say it. Dropout and initialisation are no part of a model."""
    rotates, windows = config.position_embedding_type == "rope", windows_of(config)
    rule = config.rope_rule if rotates else None
    return {
        **{_flag(name): getattr(config, name) for name in _PLAIN},
        "--group-query-attention, --num-query-groups": config.num_kv_heads,
        "--rotary-base": config.rotary_base if rotates else None,
        "--rotary-percent": int(config.rotary_percent * config.head_size) if rotates else None,
        "--rotary-interleaved": config.rotary_interleaved and rotates,
        "--use-rope-scaling, --rope-scaling": None
        if rule is None
        else {key: value for key, value in rule.items() if value is not None},
        "--rotary-base-local": (
            config.rotary_base if config.rotary_base_local is None else config.rotary_base_local
        )
        if rotates and any(windows)
        else None,
        "--swiglu, --geglu, --squared-relu, --exact-gelu": (
            config.swiglu,
            config.geglu,
            config.squared_relu,
            config.exact_gelu and not config.swiglu,
        ),
        "--add-qkv-bias": config.qkv_bias,
        "--add-attn-out-bias": config.attention_out_bias,
        "--qk-layernorm": config.qk_layernorm and config.qk_layernorm_width,
        "--softmax-scale": config.softmax_scale or config.head_size**-0.5,
        "--window-size, --window-attn-skip-freq": windows if any(windows) else None,
        "--untie-embeddings-and-output-weights": not config.tied,
    }


_PLAIN = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "position_embedding_type",
    "normalization",
    "norm_epsilon",
    "apply_layernorm_1p",
    "norm_placement",
    "parallel_residual",
    "disable_bias_linear",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "scale_embeddings",
)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# The table.

_RMS = {"normalization": "RMSNorm", "disable_bias_linear": True}


def _read_llama(hf: Values) -> Values:
    values = read_rope(hf) | activation(GATED, hf.get("hidden_act", "silu"))
    attention, mlp = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    if mlp and not attention:
        raise ValueError("mlp_bias without attention_bias")
    return values | {
        "disable_bias_linear": not mlp,
        "add_qkv_bias": attention,
        "add_attn_out_bias": attention,
    }


def _write_llama(config: ModelConfig) -> Values:
    biases = {"attention_bias": config.attention_out_bias, "mlp_bias": config.linear_bias}
    return write_rope(config) | biases | {"hidden_act": activation_name(config)}


def _read_mistral(hf: Values) -> Values:
    return (
        read_rope(hf)
        | activation(GATED, hf.get("hidden_act", "silu"))
        | read_windows(hf.get("sliding_window"), [True])
    )


def _write_mistral(config: ModelConfig) -> Values:
    return (
        write_rope(config)
        | {"hidden_act": activation_name(config)}
        | write_window_everywhere(config)
    )


def _read_qwen(hf: Values) -> Values:
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    layers = sliding_layers(hf, lambda layer: layer >= hf.get("max_window_layers", 28))
    biases = {"add_qkv_bias": True} if hf["model_type"] == "qwen2" else _attention_bias(hf)
    return (
        read_rope(hf)
        | activation(GATED, hf.get("hidden_act", "silu"))
        | read_windows(window, layers)
        | biases
    )


def _write_qwen(config: ModelConfig) -> Values:
    windows = write_windows(config)
    uses = "sliding_attention" in windows["layer_types"]
    first = windows["layer_types"].index("sliding_attention") if uses else config.num_layers
    windows |= {"use_sliding_window": uses, "max_window_layers": first}
    return (
        write_rope(config)
        | {"hidden_act": activation_name(config), "attention_bias": config.attention_out_bias}
        | windows
    )


def _attention_bias(hf: Values) -> Values:
    return dict.fromkeys(("add_qkv_bias", "add_attn_out_bias"), hf.get("attention_bias", False))


def _read_olmo2(hf: Values) -> Values:
    return read_rope(hf) | activation(GATED, hf.get("hidden_act", "silu")) | _attention_bias(hf)


def _write_olmo2(config: ModelConfig) -> Values:
    return write_rope(config) | {
        "hidden_act": activation_name(config),
        "attention_bias": config.attention_out_bias,
    }


def _read_gemma(hf: Values) -> Values:
    if hf.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: attention is causal here")
    values = activation(
        GATED, hf.get("hidden_activation") or "gelu_pytorch_tanh"
    ) | _attention_bias(hf)
    if type(hf["query_pre_attn_scalar"]) is not int:
        raise ValueError(
            f"query_pre_attn_scalar {hf['query_pre_attn_scalar']}: --softmax-scale is 1 / sqrt of a whole number there"
        )
    values["softmax_scale"] = hf["query_pre_attn_scalar"] ** -0.5
    values["final_logit_softcapping"] = hf["final_logit_softcapping"]
    is_gemma2 = hf["model_type"] == "gemma2"
    if is_gemma2:
        values["attn_logit_softcapping"] = hf["attn_logit_softcapping"]
    elif hf.get("attn_logit_softcapping") is not None:
        raise ValueError(
            "attn_logit_softcapping: transformers' gemma3_text leaves it out of attention, so it cannot be meant"
        )
    period = 2 if is_gemma2 else hf.get("sliding_window_pattern") or 6
    values |= read_windows(
        hf["sliding_window"], sliding_layers(hf, lambda layer: bool((layer + 1) % period))
    )
    return values | (read_rope(hf) if is_gemma2 else _read_two_ropes(hf))


def _read_two_ropes(hf: Values) -> Values:
    """Gemma 3: layers without a window have a base, and perhaps a scaling, of their own."""
    given = hf.get("rope_parameters") or {}
    everywhere = (
        {"rope_theta": hf.get("rope_theta", 1e6)}
        | (given.get("full_attention") or {})
        | (hf.get("rope_scaling") or {})
    )
    local = {"rope_theta": hf.get("rope_local_base_freq", 1e4)} | (
        given.get("sliding_attention") or {}
    )
    if local.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_type {local['rope_type']!r} in layers with a window: only default can be read"
        )
    return read_rope(hf, everywhere) | {"rotary_base_local": float(local["rope_theta"])}


def _write_gemma(config: ModelConfig) -> Values:
    scale, windows = config.softmax_scale or config.head_size**-0.5, write_windows(config)
    scalar = scale**-2
    return {
        "hidden_activation": activation_name(config),
        "attention_bias": config.attention_out_bias,
        "query_pre_attn_scalar": round(scalar) if round(scalar) ** -0.5 == scale else scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        **write_rope(config),
        **windows,
        "sliding_window": windows["sliding_window"]
        or _GEMMA2["sliding_window"],  # a number even where no layer has a window
    }


def _write_gemma3(config: ModelConfig) -> Values:
    local = config.rotary_base if config.rotary_base_local is None else config.rotary_base_local
    return _write_gemma(config) | {"rope_local_base_freq": local}


def _read_phi3(hf: Values) -> Values:
    outside = {
        "rope_theta": hf.get("rope_theta", 10000.0),
        "partial_rotary_factor": hf.get("partial_rotary_factor", 1.0),
    }
    rope = rope_of(hf, outside)
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
        rope["rope_type"] = "longrope"
    windows = read_windows(hf.get("sliding_window"), [True])
    return (
        read_rope(hf, rope, ("default", "longrope"))
        | activation(GATED, hf.get("hidden_act", "silu"))
        | windows
    )


def _write_phi3(config: ModelConfig) -> Values:
    rule = config.rope_rule
    original = (rule or {}).get(
        "original_max_position_embeddings"
    ) or config.max_position_embeddings
    if (
        rule
        and rule.keys() == {"rope_type", *ROPE_SCALINGS["longrope"]}
        and rule["factor"] == config.max_position_embeddings / original
    ):
        # As release 4 wants it: these three keys and no others, the rest follows from the two lengths.
        rule = {
            "type": "longrope",
            "short_factor": rule["short_factor"],
            "long_factor": rule["long_factor"],
        }
    values = (
        write_rope(config)
        | {"rope_scaling": rule}
        | {
            "partial_rotary_factor": config.rotary_percent,
            "original_max_position_embeddings": original,
        }
    )
    return values | {"hidden_act": activation_name(config)} | write_window_everywhere(config)


def _read_gpt2(hf: Values) -> Values:
    for key, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if hf.get(key, only) != only:
            raise ValueError(f"{key} {hf[key]}: only {only} can be read")
    ffn = hf.get("n_inner") or 4 * hf["n_embd"]
    return {"ffn_hidden_size": ffn} | activation(SINGLE, hf.get("activation_function", "gelu_new"))


def _write_gpt2(config: ModelConfig) -> Values:
    return {
        "activation_function": activation_name(config, "gelu_new"),
        "embd_pdrop": config.hidden_dropout,
    }


def _read_neox(hf: Values) -> Values:
    if not hf.get("attention_bias", True):
        raise ValueError("attention_bias False: only True can be read")
    rope = rope_of(
        hf,
        {
            "rope_theta": hf.get("rotary_emb_base", 10000),
            "partial_rotary_factor": hf.get("rotary_pct", 0.25),
        },
    )
    return (
        read_rope(hf, rope)
        | {"parallel_residual": hf.get("use_parallel_residual", True)}
        | activation(SINGLE, hf.get("hidden_act", "gelu"))
    )


def _write_neox(config: ModelConfig) -> Values:
    values = {
        "rotary_emb_base": config.rotary_base,
        "rotary_pct": config.rotary_percent,
        "rope_scaling": config.rope_rule,
    }
    return values | {
        "use_parallel_residual": config.parallel_residual,
        "hidden_act": activation_name(config, "gelu_new"),
    }


_GEMMA = _RMS | {
    "apply_layernorm_1p": True,
    "norm_placement": "both",
    "scale_embeddings": True,
    "untie_embeddings_and_output_weights": False,
}
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
_NEOX_KEYS = {
    "rms_norm_eps": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "layer_norm_eps": "norm_epsilon",
    "hidden_dropout": "hidden_dropout",
}
_GEMMA2 = {
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_GEMMA2 |= {
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA2 | {
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_MISTRAL_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "num_key_value_heads": 8,
}
_QWEN_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
}
_EPS_1E5 = {"rms_norm_eps": 1e-5}
_ROWS = (
    Family("llama", "LlamaForCausalLM", _RMS, _read_llama, _write_llama, defaults=_LLAMA_DEFAULTS),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {"untie_embeddings_and_output_weights": False},
        _read_gpt2,
        _write_gpt2,
        _GPT2_KEYS,
        _GPT2_DEFAULTS,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        _RMS,
        _read_mistral,
        _write_mistral,
        defaults=_MISTRAL_DEFAULTS,
    ),
    Family("qwen2", "Qwen2ForCausalLM", _RMS, _read_qwen, _write_qwen, defaults=_QWEN_DEFAULTS),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _RMS | {"qk_layernorm": True},
        _read_qwen,
        _write_qwen,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        _RMS | {"norm_placement": "post", "qk_layernorm": True, "qk_layernorm_width": "projection"},
        _read_olmo2,
        _write_olmo2,
        defaults=_EPS_1E5 | {"max_position_embeddings": 2048},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        _RMS,
        _read_phi3,
        _write_phi3,
        {"head_dim": None},
        _EPS_1E5 | {"max_position_embeddings": 4096},
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {},
        _read_neox,
        _write_neox,
        _NEOX_KEYS,
        {"layer_norm_eps": 1e-5, "max_position_embeddings": 2048},
    ),
    Family("gemma2", "Gemma2ForCausalLM", _GEMMA, _read_gemma, _write_gemma, defaults=_GEMMA2),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA | {"qk_layernorm": True},
        _read_gemma,
        _write_gemma3,
        defaults=_GEMMA3,
    ),
)
FAMILIES = {family.model_type: family for family in _ROWS}
