"""Floating-point operations per token, parameters, and the peak they are held against."""

from ..config import ModelConfig

# Dense bf16 peak by datasheet, FLOP/s. A device that is not here has no MFU rather than a wrong one.
PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of a device by name; None where it is unknown."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)


def matrix_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters in matrix products: the head included, the embedding look-up not, a tied matrix once. Padding is not counted."""
    h, f = config.hidden_size, config.ffn_hidden_size
    q, kv = config.num_attention_heads * config.head_size, config.num_kv_heads * config.head_size
    layer = h * (q + 2 * kv) + q * h + (3 if config.gated else 2) * h * f
    return config.num_layers * layer + vocab_size * h


def total_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Every trained number of the model, padding left out."""
    h, f, d = config.hidden_size, config.ffn_hidden_size, config.head_size
    q, kv = config.num_attention_heads * d, config.num_kv_heads * d
    norm = 2 if config.normalization == "LayerNorm" else 1
    biases = (
        (q + 2 * kv) * config.qkv_bias
        + h * config.attention_out_bias
        + (h + (2 if config.gated else 1) * f) * config.linear_bias
    )
    qk_norms = (
        2 * d * norm if config.qk_layernorm_width == "head" else q + kv
    ) * config.qk_layernorm
    per_layer = biases + qk_norms + config.norms_per_layer * h * norm
    embeddings = 0 if config.tied else vocab_size * h
    positions = (
        config.max_position_embeddings * h
        if config.position_embedding_type == "learned_absolute"
        else 0
    )
    return (
        matrix_parameters(config, vocab_size)
        + config.num_layers * per_layer
        + h * norm
        + embeddings
        + positions
    )


def flops_per_token(
    config: ModelConfig, vocab_size: int, seq_length: int, *, causal: bool
) -> float:
    """Training FLOP of one token, forward and backward: 6N + 12LhT with full attention, 6N + 6LhT counting the causal half alone."""
    attention = config.num_layers * config.num_attention_heads * config.head_size * seq_length
    return 6 * matrix_parameters(config, vocab_size) + (6 if causal else 12) * attention
