"""What each Hugging Face family is in our terms: its configuration and the names of its tensors, both ways."""

from typing import Any

from ..config import ModelConfig
from . import rotary


def export_problems(config: ModelConfig) -> list[str]:
    """Why a model of this shape is no member of a family that can be exported; empty for the llama family."""
    needed = {
        "--position-embedding-type rope": config.position_embedding_type == "rope",
        "--normalization RMSNorm": config.normalization == "RMSNorm",
        "--swiglu": config.swiglu,
        "--rotary-percent 1.0": config.rotary_percent == 1.0,
        "no --rotary-interleaved": not config.rotary_interleaved,
        "no --qk-layernorm": not config.qk_layernorm,
        "--add-qkv-bias only together with the other biases": config.qkv_bias == config.linear_bias,
    }
    return [f"--save-hf exports the llama family, which has {feature}" for feature, there in needed.items() if not there]


def llama_names(config: ModelConfig) -> dict[str, str]:
    """Our part name -> the name in a Hugging Face llama folder, in the order of the model."""
    inside = {
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    names = {"embedding.word.weight": "model.embed_tokens.weight"}
    for layer in range(config.num_layers):
        for ours, theirs in inside.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
            if config.linear_bias and "norm" not in ours:
                names[f"layers.{layer}.{ours}.bias"] = f"model.layers.{layer}.{theirs}.bias"
    names["final_norm.weight"] = "model.norm.weight"
    if not config.tied:
        names["head.weight"] = "lm_head.weight"
    return names


def llama_config(config: ModelConfig, vocab_size: int, eod: int | None) -> dict[str, Any]:
    """config.json of a llama model, in the keys that transformers 4 and 5 both read."""
    scaling = None
    if config.use_rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": rotary.LOW_FREQUENCY,
            "high_freq_factor": rotary.HIGH_FREQUENCY,
            "original_max_position_embeddings": rotary.ORIGINAL_LENGTH,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_method_std,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.linear_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "bos_token_id": eod,
        "eos_token_id": eod,
    }


def from_llama_config(hf: dict[str, Any]) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary of a Hugging Face config.json; dropout is off.

    Raises ValueError for another family and for features of llama that are not built here.
    """
    if hf.get("model_type") != "llama":
        raise ValueError(f"model_type {hf.get('model_type')!r}: only llama folders can be read")
    rope = {"rope_theta": hf.get("rope_theta", 10000.0)} | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r}: only default and llama3 can be read")
    if hf.get("attention_bias", False) != hf.get("mlp_bias", False):
        raise ValueError("attention_bias and mlp_bias differ: only both or neither can be read")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r}: only silu can be read")
    heads = hf["num_attention_heads"]
    config = ModelConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=heads,
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        group_query_attention=True,
        num_query_groups=hf.get("num_key_value_heads") or heads,
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        position_embedding_type="rope",
        rotary_base=float(rope["rope_theta"]),
        use_rope_scaling=kind == "llama3",
        rope_scaling_factor=float(rope.get("factor", 8.0)),
        normalization="RMSNorm",
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        swiglu=True,
        disable_bias_linear=not hf.get("mlp_bias", False),
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        init_method_std=hf.get("initializer_range", 0.02),
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    _check_llama3_scaling(kind, rope)
    return config, hf["vocab_size"]


def _check_llama3_scaling(kind: str, rope: dict[str, Any]) -> None:
    ours = {
        "low_freq_factor": rotary.LOW_FREQUENCY,
        "high_freq_factor": rotary.HIGH_FREQUENCY,
        "original_max_position_embeddings": rotary.ORIGINAL_LENGTH,
    }
    for key, value in ours.items() if kind == "llama3" else ():
        if rope.get(key, value) != value:
            raise ValueError(f"rope_scaling {key} {rope[key]}: only {value} can be read")
