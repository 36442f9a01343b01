"""One update: forward and backward over the micro-batches, reduction, norm, clip, skip, weights. The host waits for nothing in here."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import comm, rng
from ..config import Config
from ..data.loader import Batch
from ..mesh import Mesh
from ..model.gpt import GPT
from ..optim.adamw import AdamW
from ..optim.clip import clip_factor, grad_norm
from ..optim.schedule import learning_rate
from ..precision import LossScaler
from .progress import Progress


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
    model: GPT
    optimizer: AdamW
    scaler: LossScaler

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank per update."""
        batch = self.config.batch
        return batch.global_batch_size // (batch.micro_batch_size * self.mesh.dp.size)

    def step(self, progress: Progress, batches: Iterator[Batch], stop: bool) -> StepResult:
        """The update after `progress` on the next micro-batches; `stop` is this rank's wish to end the run.

        The loss that is differentiated is the sum over the global batch divided by the sum of its mask. The mask's sum N is
        known only after the last micro-batch, so backward divides by the constant GBS x T, and GBS x T / N joins the clip factor.
        """
        config, optimizer = self.config, self.optimizer
        progress = progress.after_step(config.batch)
        tokens = config.batch.global_batch_size * config.batch.seq_length
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        optimizer.zero_gradients()
        self.model.train()
        for index in range(self.micro_batches):
            losses, mask = self._forward(progress.iteration, index, next(batches))
            total = masked_sum(losses, mask)
            (total * (self.scaler.scale / tokens)).backward()
            totals[0] += total.detach()
            totals[1] += mask.sum()
        totals[2] += float(stop)
        comm.all_reduce(totals, self.mesh.dp)
        optimizer.reduce_gradients(self.mesh.dp)

        to_true = (tokens / (totals[1] * self.scaler.scale)).float()
        norm = grad_norm(optimizer.buckets, self.mesh.model) * to_true
        finite = torch.isfinite(norm) & torch.isfinite(totals[0]) & (totals[1] > 0)
        lr = learning_rate(config.optimizer, progress.iteration - 1)
        optimizer.update(lr, to_true * clip_factor(norm, config.optimizer.clip_grad), ~finite)
        result = StepResult(progress, lr, totals[0], totals[1], norm, ~finite, self.scaler.scale.clone(), totals[2])
        self.scaler.update(~finite, totals[1] == 0)
        return result

    def _forward(self, iteration: int, index: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        model, seed = self.config.model, self.config.batch.seed
        stream = None
        if model.hidden_dropout > 0:
            stream = rng.DropoutStream.of(seed, iteration, batch.samples, self.device)
        if model.attention_dropout > 0:
            torch.manual_seed(rng.attention_dropout_seed(seed, iteration, index, self.mesh.dp.rank))
        tokens, labels, mask = to_device(batch, self.device)
        return self.model.token_losses(tokens, labels, stream), mask


def masked_sum(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the losses [B, T] that count. Selected, not multiplied: a loss that does not count may be NaN."""
    return torch.where(mask > 0, losses, 0.0).sum()


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, labels and loss mask [B, T] on the device; the copies do not wait."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in (batch.tokens, batch.labels, batch.loss_mask))
