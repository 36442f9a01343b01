"""Small models of every Hugging Face family, as transformers makes them."""

from pathlib import Path

import torch

VOCAB, LENGTH = 97, 32
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WHOLE_HEADS = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA32 = _LLAMA31 | {"factor": 32.0, "original_max_position_embeddings": 16}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.3], "long_factor": [2.0, 5.0]}

CONFIGS = {
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.15,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _WHOLE_HEADS | {"rotary_pct": 0.5}),
    "gpt_neox-sequential": ("GPTNeoXConfig", _WHOLE_HEADS | {"use_parallel_residual": False}),
    "llama2": ("LlamaConfig", _SHAPE),
    "llama-biases": ("LlamaConfig", _SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("LlamaConfig", _SHAPE | {"attention_bias": True}),
    "llama3": ("LlamaConfig", _SHAPE | {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "llama3.1": (
        "LlamaConfig",
        _SHAPE
        | {"rope_theta": 500000.0, "max_position_embeddings": 16384, "rope_scaling": _LLAMA31},
    ),
    "llama3.2": (
        "LlamaConfig",
        _SHAPE | {"rope_theta": 500000.0, "rope_scaling": _LLAMA32, "tie_word_embeddings": True},
    ),
    "llama-linear": (
        "LlamaConfig",
        _SHAPE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "mistral": ("MistralConfig", _SHAPE | {"sliding_window": 7}),
    "mistral-full": ("MistralConfig", _SHAPE | {"sliding_window": None}),
    "qwen2": (
        "Qwen2Config",
        _SHAPE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-tied": ("Qwen2Config", _SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _SHAPE | {"head_dim": 16}),
    "qwen3-yarn": ("Qwen3Config", _SHAPE | {"head_dim": 16, "rope_scaling": _YARN}),
    "olmo2": ("Olmo2Config", _SHAPE),
    "gemma2": (
        "Gemma2Config",
        _SHAPE | {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _SHAPE
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "sliding_window_pattern": 3,
        },
    ),
    "gemma3-scaled": (
        "Gemma3TextConfig",
        _SHAPE
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("Phi3Config", _SHAPE),
    "phi3-longrope": (
        "Phi3Config",
        _SHAPE
        | {
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 48,
            "rope_scaling": _LONGROPE,
        },
    ),
    "phi3-longrope-beyond": (
        "Phi3Config",
        _SHAPE
        | {
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
            "rope_scaling": _LONGROPE,
        },
    ),
}


def write_peer(name: str, folder: Path, dtype: torch.dtype = torch.float32):
    """Write a random model of the family in a folder, and return it: fp32, eager attention.

    Norms and biases are random too: ones and zeros would hide a swap.
    """
    import transformers  # here: ranks that only need the tokens do not wait for it

    kind, values = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**values), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return model


def tokens_of(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
