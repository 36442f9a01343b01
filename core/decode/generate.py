"""Sampling from a model with a key-value cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """Yield the new tokens int64 [B], one position at a time, that continue prompt int64 [B, T]; the caller stops when it has enough.

    The generator lives on the CPU, so that a seed means the same on every device.
    """
    model.eval()
    capacity = prompt.shape[1] + max_new_tokens
    caches = model.caches(prompt.shape[0], capacity)
    sequence = tokens = prompt
    for _ in range(max_new_tokens):
        if caches[0].length and model.rotates_otherwise(caches[0].length, sequence.shape[1]):
            caches, tokens = (
                model.caches(prompt.shape[0], capacity),
                sequence,
            )  # the keys so far were rotated for a shorter sequence
        logits = model(tokens, caches=caches, last_only=True)[:, -1, : model.vocab_size].float()
        chosen = choose(logits, sampling, generator)
        yield chosen
        tokens = chosen.unsqueeze(1)
        sequence = torch.cat((sequence, tokens), dim=1)


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token per row of logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        lowest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    noise = torch.rand(logits.shape, generator=generator).to(logits.device)
    return (logits - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))).argmax(
        dim=-1
    )  # Gumbel: argmax of this is a draw from softmax


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the likeliest tokens that together reach `top_p`; the first is always kept (Holtzman et al. 2020)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ordered)
