"""Rotary position embedding: the frequencies of a head's dims, and the angles of positions.

Dim pair i of a head turns by the angle position * f_i with f_i = base^(-2 i / R), R the dims that
are rotated (Su et al. 2021, section 3.4). A model trained on short sequences reads longer ones
better with other frequencies; five ways to scale them are known here:

    default    as they are
    linear     positions closer together
    llama3     long wavelengths stretched, short ones kept, a ramp between
    yarn       the same by turns within the original length, and cos and sin a little larger
    longrope   factors that were searched for each dim, two lists of them

They are named and parameterized as in Hugging Face's rope_scaling, so that a configuration from
there means the same. Two models whose frequencies differ in the last bit generate other text, so
the order of the operations below is that of transformers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ModelConfig

Angles = tuple[Tensor, Tensor]  # cos and sin
Rule = dict[str, Any]  # a rope_scaling, in Hugging Face's words


class Frequencies(NamedTuple):
    """The inverse frequencies of a kind of layer.

    Fields:
        short: fp32 [R/2]
        long: those of longer sequences, fp32 [R/2]; None where they are the same
        magnitude: what cos and sin are multiplied by
        original_length: tokens up to which `short` holds, where there is a `long`
    """

    short: Tensor
    long: Tensor | None = None
    magnitude: float = 1.0
    original_length: int = 0


class Rotary(nn.Module):
    """The angles of one kind of layer.

    `local` is the kind with a window, where --rotary-base-local gives it a base of its own; its
    frequencies are not scaled.
    """

    frequencies: Tensor
    long_frequencies: Tensor | None

    def __init__(self, config: ModelConfig, *, local: bool = False):
        super().__init__()
        base = config.rotary_base
        rule = config.rope_rule
        if local and config.rotary_base_local is not None:
            base = config.rotary_base_local
            rule = None
        rotated = int(config.head_size * config.rotary_percent)
        even_dims = torch.arange(0, rotated, 2, dtype=torch.float32)
        powers = base ** (even_dims / rotated)
        found = scaled_frequencies(powers, base, rule)

        self.magnitude = found.magnitude
        self.original_length = found.original_length
        self.register_buffer("frequencies", found.short, persistent=False)
        self.register_buffer("long_frequencies", found.long, persistent=False)

    def is_long(self, length: int) -> bool:
        """Return whether a sequence of `length` tokens takes the frequencies of long ones."""
        return self.long_frequencies is not None and length > self.original_length

    def forward(self, positions: Tensor, length: int) -> Angles:
        """Compute cos and sin of the angles of positions, fp32.

        Arguments:
            positions: [T] or [B, T]
            length: tokens of the whole sequence, on all ranks together

        Returns: [T, R/2] or [B, T, R/2] each.
        """
        frequencies = self.frequencies
        if self.long_frequencies is not None and length > self.original_length:
            frequencies = self.long_frequencies
        # In fp32, in which positions up to 2^24 are exact; 16 bits would blur them after 256.
        table = positions.to(torch.float32).unsqueeze(-1) * frequencies
        cos = table.cos()
        sin = table.sin()
        if self.magnitude == 1.0:
            return cos, sin
        return cos * self.magnitude, sin * self.magnitude


def scaled_frequencies(powers: Tensor, base: float, rule: Rule | None) -> Frequencies:
    """Return the frequencies of a base, scaled as `rule` says.

    Arguments:
        powers: base^(2 i / R), fp32 [R/2]
        base: what they are powers of
        rule: how they are scaled; None where they are not
    """
    if rule is None or rule["rope_type"] == "default":
        return Frequencies(1.0 / powers)
    scale = _RULES[rule["rope_type"]]
    return scale(powers, base, rule)


def _linear(powers: Tensor, base: float, rule: Rule) -> Frequencies:
    """Bring positions closer together by `factor` (Chen et al. 2023)."""
    inverse = 1.0 / powers
    return Frequencies(inverse / rule["factor"])


def _llama3(powers: Tensor, base: float, rule: Rule) -> Frequencies:
    """Stretch long wavelengths by `factor`, keep short ones, and blend those between.

    As Llama 3.1 ships it.
    """
    factor = rule["factor"]
    low = rule["low_freq_factor"]
    high = rule["high_freq_factor"]
    original = rule["original_max_position_embeddings"]
    inverse = 1.0 / powers
    wavelength = 2 * math.pi / inverse
    # From 0, where a wave fits `low` times into the original length, to 1, where it fits `high`.
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    is_long = wavelength > original / low
    stretched = torch.where(is_long, inverse / factor, blended)
    is_short = wavelength < original / high
    found = torch.where(is_short, inverse, stretched)
    return Frequencies(found)


def _yarn(powers: Tensor, base: float, rule: Rule) -> Frequencies:
    """Keep dims that turn more than beta_fast times, stretch those that turn less than beta_slow.

    Turns are counted within the original length; between the two is a ramp. Peng et al. 2023,
    section 3.2; cos and sin grow by 0.1 ln(factor) + 1, section 3.4.
    """
    dims = 2 * len(powers)
    original = rule["original_max_position_embeddings"]
    fast = rule.get("beta_fast") or 32
    slow = rule.get("beta_slow") or 1
    first = _pair_that_turns(fast, dims, base, original)
    last = _pair_that_turns(slow, dims, base, original)
    if rule.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, dims - 1)
    width = last - first
    if width == 0:
        width = 0.001  # a step instead of a ramp
    pairs = torch.arange(dims // 2, dtype=torch.float32)
    # The share of the stretched frequency in each pair: 0 up to `first`, 1 from `last` on.
    stretch = (pairs - first) / width
    stretch = stretch.clamp(0, 1)
    stretched = 1.0 / (rule["factor"] * powers)
    kept = 1.0 / powers
    inverse = stretched * stretch + kept * (1 - stretch)
    return Frequencies(inverse, magnitude=_yarn_magnitude(rule))


def _pair_that_turns(times: float, dims: int, base: float, original: int) -> float:
    """Return the pair of dims, as a fraction, that turns this many times within `original` tokens.

    Pair i turns original / (2 pi base^(2 i / dims)) times; this is that, solved for i.
    """
    wavelength = times * 2 * math.pi
    return dims * math.log(original / wavelength) / (2 * math.log(base))


def _yarn_magnitude(rule: Rule) -> float:
    """Return what cos and sin are multiplied by: as given, or by the logarithm of the factor."""
    if rule.get("attention_factor") is not None:
        return float(rule["attention_factor"])
    scale = rule.get("mscale")
    of_all = rule.get("mscale_all_dim")
    logarithm = 0.1 * math.log(max(rule["factor"], 1.0))
    if scale and of_all:
        above = scale * logarithm + 1
        below = of_all * logarithm + 1
        return float(above / below)
    return logarithm + 1


def _longrope(powers: Tensor, base: float, rule: Rule) -> Frequencies:
    """Divide by factors that were searched for each dim, others beyond the original length.

    Ding et al. 2024.
    """
    short = torch.tensor(rule["short_factor"], dtype=torch.float32)
    long = torch.tensor(rule["long_factor"], dtype=torch.float32)
    original = rule["original_max_position_embeddings"]
    factor = rule["factor"]
    magnitude = rule.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0
        if factor > 1:
            # The longer the sequence, the flatter attention gets; larger cos and sin sharpen it.
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original))
    return Frequencies(
        short=1.0 / (short * powers),
        long=1.0 / (long * powers),
        magnitude=magnitude,
        original_length=original,
    )


_RULES: dict[str, Callable[[Tensor, float, Rule], Frequencies]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
