"""Drawing the next token from logits.

Letters: model/shape.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The rule by which the next token is drawn.

    Fields:
        temperature: what logits are divided by; 0 takes the likeliest token
        top_k: draw from this many of the likeliest tokens; 0 from all
        top_p: draw from the likeliest tokens that together have this probability; 1 from all
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample(
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
) -> Tensor:
    """Draw one token, int64 [B], per row of logits [B, V].

    The generator lives on the CPU, so that a seed means the same on every device.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = _likeliest(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    noise = torch.rand(logits.shape, generator=generator).to(logits.device)
    noise = noise.clamp(1e-20, 1 - 1e-7)  # both logarithms stay finite
    # The argmax of logits plus Gumbel noise, -log(-log(u)), is a draw from their softmax.
    gumbel = -torch.log(-torch.log(noise))
    return (logits + gumbel).argmax(dim=-1)


def _likeliest(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` likeliest tokens, or all where there are not so many."""
    count = min(top_k, logits.shape[-1])
    likeliest = logits.topk(count).values
    lowest = likeliest[:, -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens that together reach `top_p`, always the first.

    Holtzman et al. 2020.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays if those before it, which are likelier, have not reached top_p yet.
    before = probabilities.cumsum(dim=-1) - probabilities
    reached = before >= top_p
    ordered = ordered.masked_fill(reached, -torch.inf)
    kept = torch.empty_like(logits)
    return kept.scatter_(1, order, ordered)
