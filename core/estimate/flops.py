"""Count floating-point operations of a token, and name the peak they are held against."""

from ..config import ModelConfig, PrecisionConfig
from .parameters import matrix_parameters

# Dense bf16 peak by datasheet, FLOP/s. The first name that is part of the device's name counts.
# A device that is not here has no MFU rather than a wrong one.
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
PEAK_FP32_H100 = 67e12  # outside the tensor cores


def peak_flops(device_name: str) -> float | None:
    """Return the bf16 peak of a device in FLOP/s by its name; None where it is unknown."""
    for name, peak in PEAK_BF16.items():
        if name in device_name:
            return peak
    return None


def h100_peak(precision: PrecisionConfig) -> float:
    """Return the peak of an H100 in FLOP/s, in the number format of a run."""
    if precision.bf16 or precision.fp16:
        return PEAK_BF16["H100"]
    return PEAK_FP32_H100


def flops_per_token(
    config: ModelConfig, vocab_size: int, seq_length: int, *, causal: bool
) -> float:
    """Return the training FLOP of one token, forward and backward.

    6 N + 12 L h T with full attention, 6 N + 6 L h T if only the causal half counts: N parameters
    in matrix products, L layers, h = A D, T tokens of a sequence.
    """
    heads_width = config.num_attention_heads * config.head_size
    attention = config.num_layers * heads_width * seq_length
    return 6 * matrix_parameters(config, vocab_size) + (6 if causal else 12) * attention
