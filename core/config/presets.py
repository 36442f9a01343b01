"""Named model shapes as plain data: names and values of fields.

Each says everything in which it differs from Megatron's defaults.
"""

from typing import Any

_LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "norm_epsilon": 1e-5,
    "init_method_std": 0.02,
}
_GPT2 = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "swiglu": False,
    "disable_bias_linear": False,
    "untie_embeddings_and_output_weights": False,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "norm_epsilon": 1e-5,
    "init_method_std": 0.02,
    "max_position_embeddings": 1024,
}


def _shape(
    layers: int, hidden: int, ffn: int, heads: int, groups: int | None = None
) -> dict[str, Any]:
    """Return the sizes of a model. groups: key-value heads; None for as many as heads."""
    shape: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
    }
    if groups is not None:
        shape |= {"group_query_attention": True, "num_query_groups": groups}
    return shape


_LLAMA2 = {"rotary_base": 10000.0, "max_position_embeddings": 4096}
_LLAMA3 = {"rotary_base": 500000.0, "max_position_embeddings": 8192}
_LLAMA31 = {
    "rotary_base": 500000.0,
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "max_position_embeddings": 131072,
}
_LLAMA32 = _LLAMA31 | {"rope_scaling_factor": 32.0}
_LLAMA3_TIED = _LLAMA32 | {"untie_embeddings_and_output_weights": False}

# The vocabulary each shape was published with. Only the parameter count of --list-presets reads it.
PUBLISHED_VOCABULARY = {"gpt2": 50257, "llama2": 32000, "llama3": 128256}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | _shape(4, 256, 704, 4, 2),
    "small": _LLAMA | _shape(8, 512, 1408, 8, 4),
    "medium": _LLAMA | _shape(16, 1024, 2816, 16, 8),
    "gpt2-124m": _GPT2 | _shape(12, 768, 3072, 12),
    "gpt2-355m": _GPT2 | _shape(24, 1024, 4096, 16),
    "gpt2-774m": _GPT2 | _shape(36, 1280, 5120, 20),
    "gpt2-1.5b": _GPT2 | _shape(48, 1600, 6400, 25),
    "llama2-7b": _LLAMA | _shape(32, 4096, 11008, 32) | _LLAMA2,
    "llama2-13b": _LLAMA | _shape(40, 5120, 13824, 40) | _LLAMA2,
    "llama2-70b": _LLAMA | _shape(80, 8192, 28672, 64, 8) | _LLAMA2,
    "llama3-8b": _LLAMA | _shape(32, 4096, 14336, 32, 8) | _LLAMA3,
    "llama3-70b": _LLAMA | _shape(80, 8192, 28672, 64, 8) | _LLAMA3,
    "llama3.1-8b": _LLAMA | _shape(32, 4096, 14336, 32, 8) | _LLAMA31,
    "llama3.1-70b": _LLAMA | _shape(80, 8192, 28672, 64, 8) | _LLAMA31,
    "llama3.1-405b": _LLAMA | _shape(126, 16384, 53248, 128, 8) | _LLAMA31,
    "llama3.2-1b": _LLAMA | _shape(16, 2048, 8192, 32, 8) | _LLAMA3_TIED,
    "llama3.2-3b": _LLAMA | _shape(28, 3072, 8192, 24, 8) | _LLAMA3_TIED,
}


def published_vocabulary(preset: str) -> int:
    """Return the vocabulary a shape was published with; 32,000 for the small ones of our own."""
    return PUBLISHED_VOCABULARY.get(preset.split("-")[0].split(".")[0], 32000)
