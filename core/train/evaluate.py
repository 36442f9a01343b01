"""The loss of a split: the same samples every time, in evaluation mode, over all data-parallel ranks."""

from collections.abc import Iterable

import torch

from .. import comm
from ..data.loader import Batch
from ..mesh import Axis
from ..model.gpt import GPT
from .step import masked_sum, to_device


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch], dp: Axis, device: torch.device) -> float:
    """Sum of masked token losses over the sum of the mask, over the batches of every rank of `dp`; NaN if all is masked."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        tokens, labels, mask = to_device(batch, device)
        totals[0] += masked_sum(model.token_losses(tokens, labels), mask)
        totals[1] += mask.sum()
    loss, count = comm.all_reduce(totals, dp).tolist()
    return loss / count if count else float("nan")
