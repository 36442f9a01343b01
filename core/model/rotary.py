"""Rotary position embedding: the table of angles. Su et al. 2021; scaling as Llama 3.1 ships it."""

import math

import torch

from ..config import ModelConfig

# Llama 3.1's rule; the factor is --rope-scaling-factor.
LOW_FREQUENCY, HIGH_FREQUENCY, ORIGINAL_LENGTH = 1.0, 4.0, 8192


def frequencies(config: ModelConfig) -> torch.Tensor:
    """Inverse frequencies, fp32 [R/2], for the R rotated dims of a head."""
    rotated = int(config.head_size * config.rotary_percent)
    inverse = 1.0 / config.rotary_base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return _scaled(inverse, config.rope_scaling_factor) if config.use_rope_scaling else inverse


def _scaled(inverse: torch.Tensor, factor: float) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inverse
    smooth = (ORIGINAL_LENGTH / wavelength - LOW_FREQUENCY) / (HIGH_FREQUENCY - LOW_FREQUENCY)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    stretched = torch.where(wavelength > ORIGINAL_LENGTH / LOW_FREQUENCY, inverse / factor, blended)
    return torch.where(wavelength < ORIGINAL_LENGTH / HIGH_FREQUENCY, inverse, stretched)


def angles(inverse: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [T, R/2] of positions [T], or [B, T, R/2] of [B, T]."""
    table = positions.to(torch.float32).unsqueeze(-1) * inverse
    return table.cos(), table.sin()
