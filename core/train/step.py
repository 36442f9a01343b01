"""One update: forward and backward over the micro-batches, reduction, norm, clip, skip, weights. The host waits for nothing in here."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import comm
from ..config import Config
from ..data.loader import Batch
from ..mesh import Mesh
from ..optim.clip import clip_factor, squared_norm
from ..optim.optimizer import Optimizer
from ..optim.schedule import learning_rate
from ..precision import LossScaler
from .inputs import PrepareBatch
from .losses import LossPass
from .progress import Progress
from .stages import Stages


@dataclass(frozen=True)
class StepResult:
    """What one update did, as tensors on the device (0-d) beside what the host knows."""

    progress: Progress  # with this update
    learning_rate: float
    loss_sum: torch.Tensor  # masked token losses, summed over the global batch
    num_predictions: torch.Tensor  # sum of the mask over the global batch
    grad_norm: torch.Tensor  # before clipping
    skipped: torch.Tensor
    loss_scale: torch.Tensor
    stop: torch.Tensor  # above 0 if any rank asked to stop


@dataclass(frozen=True)
class Trainer:
    """What a step needs, put together once."""

    config: Config
    mesh: Mesh
    device: torch.device
    stages: Stages
    prepare: PrepareBatch
    optimizer: Optimizer
    scaler: LossScaler

    def step(self, progress: Progress, batches: Iterator[Batch], stop: bool) -> StepResult:
        """The update after `progress` on the next micro-batches; `stop` is this rank's wish to end the run.

        The loss that is differentiated is the sum over the global batch divided by the sum of its mask. The mask's sum N is
        known only after the last micro-batch, so backward divides by the constant GBS x T, and GBS x T / N joins the clip factor.
        """
        config, optimizer = self.config, self.optimizer
        progress = progress.after_step(config.batch)
        tokens = config.batch.global_batch_size * config.batch.seq_length
        optimizer.begin(self.stages.training.num_microbatches)
        losses = LossPass(
            self.stages,
            self.prepare,
            batches,
            iteration=progress.iteration,
            scale=self.scaler.scale / tokens,
        )
        self.stages.train(losses)
        optimizer.reduce()

        # All that every rank must know alike, in one reduction over all of them: skip and clip are then the same everywhere.
        wish = torch.tensor(float(stop), dtype=torch.float64).to(self.device, non_blocking=True)
        known = comm.all_reduce(
            torch.stack(
                [*losses.totals, wish, squared_norm(optimizer.buckets, self.device, optimizer.ops)]
            ),
            self.mesh.world,
        )
        loss_sum, num_predictions, stop_wishes, squared = known.unbind()
        to_true = tokens / (num_predictions * self.scaler.scale)
        norm = (squared.sqrt() * to_true).float()
        finite = torch.isfinite(norm) & torch.isfinite(loss_sum) & (num_predictions > 0)
        lr = learning_rate(config.optimizer, progress.iteration - 1)
        optimizer.update(
            lr, to_true.float() * clip_factor(norm, config.optimizer.clip_grad), ~finite
        )
        result = StepResult(
            progress,
            lr,
            loss_sum,
            num_predictions,
            norm,
            ~finite,
            self.scaler.scale.clone(),
            stop_wishes,
        )
        self.scaler.update(~finite, num_predictions == 0)
        return result
