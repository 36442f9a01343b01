"""One update: forward and backward, reduction, norm, clip, skip, new weights.

The host waits for nothing in here: everything that a step finds out stays on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import comm
from ..config import Config
from ..data.loader import Batch
from ..mesh import Mesh
from ..optim.optimizer import Optimizer
from ..optim.reduce import clip_factor, squared_norm
from ..optim.schedule import learning_rate
from ..precision import LossScaler
from .passes import Passes
from .schedule import BatchSchedule, GlobalBatch, Progress


@dataclass(frozen=True)
class StepResult:
    """The outcome of one update: 0-d tensors on the device, beside what the host knows.

    progress: with this update.
    batch: the global batch that it was made of.
    loss_sum: masked token losses, summed over the global batch.
    num_predictions: sum of the mask over the global batch.
    grad_norm: before clipping.
    skipped: true if the update changed nothing, because a number in it was not finite.
    stop: above 0 if any rank asked to stop.
    """

    progress: Progress
    batch: GlobalBatch
    learning_rate: float
    loss_sum: torch.Tensor
    num_predictions: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    loss_scale: torch.Tensor
    stop: torch.Tensor


@dataclass(frozen=True)
class Trainer:
    """Everything that a step needs, put together once."""

    config: Config
    mesh: Mesh
    device: torch.device
    schedule: BatchSchedule
    passes: Passes
    optimizer: Optimizer
    scaler: LossScaler

    def step(self, progress: Progress, batches: Iterator[Batch], stop: bool) -> StepResult:
        """Do the update that follows `progress`.

        batches: gives this rank's micro-batches next.
        stop: this rank asks to end the run after this update.

        The loss that is differentiated is the sum of the token losses of the global batch, divided
        by the sum N of its mask. N is known only after the last micro-batch; so backward divides
        by the number of tokens, and tokens / N joins the clip factor.
        """
        optimizer, scaler = self.optimizer, self.scaler
        batch = self.schedule.batch_at(progress)
        progress = progress.after(batch)
        tokens = batch.tokens
        optimizer.begin(batch.num_microbatches)
        totals = self.passes.train(batches, batch, progress.iteration, scaler.scale / tokens)
        optimizer.reduce()

        # Everything that all ranks must know alike goes into one reduction over all of them: so
        # they skip, clip and stop together.
        asked = torch.tensor(float(stop), dtype=torch.float64).to(self.device, non_blocking=True)
        own_square = squared_norm(optimizer.buckets, self.device, optimizer.ops)
        known = comm.all_reduce(torch.stack([*totals, asked, own_square]), self.mesh.world)
        loss_sum, num_predictions, stop_requests, squared = known.unbind()

        # Backward has given scale / tokens times the gradient of the summed losses; the true one
        # is 1 / N times that.
        to_true = tokens / (num_predictions * scaler.scale)
        norm = (squared.sqrt() * to_true).float()
        # A number that is not finite, on any rank, has made the sum of squares so on all of them.
        finite = torch.isfinite(norm) & torch.isfinite(loss_sum) & (num_predictions > 0)
        skip = ~finite
        # The schedule counts the updates done before this one.
        lr = learning_rate(self.config.optimizer, progress.iteration - 1)
        factor = to_true.float() * clip_factor(norm, self.config.optimizer.clip_grad)
        optimizer.update(lr, factor, skip)
        result = StepResult(
            progress,
            batch,
            lr,
            loss_sum,
            num_predictions,
            norm,
            skip,
            scaler.scale.clone(),  # of this update: it moves on below
            stop_requests,
        )
        if scaler.dynamic:
            scaler.update(skip, num_predictions == 0)
        return result
