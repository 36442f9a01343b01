"""Rotary position embedding: the frequencies of a head's dims, scaled for long contexts in five ways, and the angles of positions.

Su et al. 2021. The ways are named and parameterized as in Hugging Face's rope_scaling, so that a configuration from there means the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import ModelConfig

Angles = tuple[torch.Tensor, torch.Tensor]


class Rotary(nn.Module):
    """The angles of one kind of layer: `local`, those with a window where --rotary-base-local gives them a base of their own, or the others."""

    def __init__(self, config: ModelConfig, *, local: bool = False):
        super().__init__()
        base = config.rotary_base_local if local else config.rotary_base
        rule = None if local else config.rope_rule
        rotated = int(config.head_size * config.rotary_percent)
        powers = base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
        short, long, self.magnitude, self.original_length = scaled(powers, base, rule)
        self.register_buffer("frequencies", short, persistent=False)
        self.register_buffer("long_frequencies", long, persistent=False)

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens takes the frequencies of long ones."""
        return self.long_frequencies is not None and length > self.original_length

    def forward(self, positions: torch.Tensor, length: int) -> Angles:
        """cos and sin, fp32 [T, R/2] of positions [T], or [B, T, R/2] of [B, T], in a sequence of `length` tokens on all ranks together."""
        table = positions.to(torch.float32).unsqueeze(-1) * (
            self.long_frequencies if self.is_long(length) else self.frequencies
        )
        return (
            (table.cos(), table.sin())
            if self.magnitude == 1.0
            else (table.cos() * self.magnitude, table.sin() * self.magnitude)
        )


def scaled(
    powers: torch.Tensor, base: float, rule: dict[str, Any] | None
) -> tuple[torch.Tensor, torch.Tensor | None, float, int]:
    """Inverse frequencies fp32 [R/2] from the powers of the base, those of longer sequences (None: the same), what cos and sin are
    multiplied by, and up to which length the first ones hold.
    """
    if rule is None or rule["rope_type"] == "default":
        return 1.0 / powers, None, 1.0, 0
    if rule["rope_type"] == "longrope":
        return _longrope(powers, rule)
    inverse, magnitude = _RULES[rule["rope_type"]](powers, base, rule)
    return inverse, None, magnitude, 0


def _linear(powers: torch.Tensor, base: float, rule: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Positions closer together by `factor` (Chen et al. 2023)."""
    return 1.0 / powers / rule["factor"], 1.0


def _llama3(powers: torch.Tensor, base: float, rule: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated: as Llama 3.1 ships it."""
    inverse, low, high, original = (
        1.0 / powers,
        rule["low_freq_factor"],
        rule["high_freq_factor"],
        rule["original_max_position_embeddings"],
    )
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / rule["factor"] + smooth * inverse
    stretched = torch.where(wavelength > original / low, inverse / rule["factor"], blended)
    return torch.where(wavelength < original / high, inverse, stretched), 1.0


def _yarn(powers: torch.Tensor, base: float, rule: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Dims that turn more than beta_fast times within the original length are kept, fewer than beta_slow times stretched, a ramp between.

    Peng et al. 2023, section 3.2; cos and sin grow by 0.1 ln(factor) + 1, section 3.4.
    """
    dims, factor, original = (
        2 * len(powers),
        rule["factor"],
        rule["original_max_position_embeddings"],
    )
    truncate = rule.get("truncate", True)

    def dim_that_turns(times: float, rounded: Callable[[float], int]) -> float:
        dim = dims * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))
        return rounded(dim) if truncate else dim

    low = max(dim_that_turns(rule.get("beta_fast") or 32, math.floor), 0)
    high = min(dim_that_turns(rule.get("beta_slow") or 1, math.ceil), dims - 1)
    stretch = (
        (torch.arange(dims // 2, dtype=torch.float32) - low)
        / (high - low if high != low else 0.001)
    ).clamp(0, 1)
    inverse = 1.0 / (factor * powers) * stretch + 1.0 / powers * (1 - stretch)
    return inverse, _yarn_magnitude(rule)


def _yarn_magnitude(rule: dict[str, Any]) -> float:
    if rule.get("attention_factor") is not None:
        return rule["attention_factor"]
    factor, scale, of_all = rule["factor"], rule.get("mscale"), rule.get("mscale_all_dim")
    logarithm = 0.1 * math.log(max(factor, 1.0))
    return (scale * logarithm + 1) / (of_all * logarithm + 1) if scale and of_all else logarithm + 1


def _longrope(
    powers: torch.Tensor, rule: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """Searched factors for each dim, one list up to the original length and one beyond it (Ding et al. 2024)."""
    short, long = (
        1.0 / (torch.tensor(rule[f"{kind}_factor"], dtype=torch.float32) * powers)
        for kind in ("short", "long")
    )
    original, factor, magnitude = (
        rule["original_max_position_embeddings"],
        rule["factor"],
        rule.get("attention_factor"),
    )
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return short, long, magnitude, original


_RULES = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
