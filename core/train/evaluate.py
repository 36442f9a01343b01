"""The loss of a split: the same samples every time, in evaluation mode, over all ranks."""

from collections.abc import Iterator

from .. import comm
from ..data.loader import Batch
from .inputs import PrepareBatch
from .losses import LossPass
from .stages import Stages


def mean_loss(
    stages: Stages, prepare: PrepareBatch, batches: Iterator[Batch], num_passes: int
) -> float:
    """Sum of masked token losses over the sum of the mask, over `num_passes` global batches; NaN if all is masked."""
    totals = 0
    for _ in range(num_passes):
        losses = LossPass(stages, prepare, batches, iteration=None)
        stages.evaluate(losses)
        totals = totals + losses.totals
    loss, count = comm.all_reduce(totals, stages.mesh.world).tolist()
    return loss / count if count else float("nan")
