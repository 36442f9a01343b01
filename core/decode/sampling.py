"""Drawing the next token from logits."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Fields:
        temperature: what logits are divided by; 0 takes the likeliest token
        top_k: draw from this many of the likeliest tokens; 0 from all
        top_p: draw from the likeliest tokens that together have this probability; 1 from all
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Draw one token, int64 [B], per row of logits [B, V]; the generator lives on the CPU."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        count = min(sampling.top_k, logits.shape[-1])
        lowest = logits.topk(count).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    noise = torch.rand(logits.shape, generator=generator).to(logits.device)
    # The argmax of logits plus Gumbel noise, -log(-log(u)), is a draw from their softmax.
    gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
    return (logits + gumbel).argmax(dim=-1)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the likeliest tokens that together reach `top_p`, always the first.

    Holtzman et al. 2020.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ordered)
