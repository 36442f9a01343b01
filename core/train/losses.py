"""The stages of this rank on the micro-batches of one pass: what the pipeline calls, and the losses that add up on the way."""

from collections.abc import Iterator

import torch

from .. import rng
from ..config import Config
from ..data.loader import Batch
from .inputs import Inputs, PrepareBatch
from .stages import Stages


class LossPass:
    """Called with (chunk, micro-batch, hidden states): hidden states of the next stage, or from the last one the sum of its losses times `scale`.

    totals: fp64 [2], the masked token losses and the mask that this rank alone accounts for, summed so far: over all ranks of the
    world they are those of the global batch.
    """

    def __init__(
        self,
        stages: Stages,
        prepare: PrepareBatch,
        batches: Iterator[Batch],
        *,
        iteration: int | None,
        scale: torch.Tensor | float = 1.0,
    ):
        self.stages, self.prepare, self.batches, self.iteration, self.scale = (
            stages,
            prepare,
            batches,
            iteration,
            scale,
        )
        self.totals = torch.zeros(2, dtype=torch.float64, device=prepare.device)
        self._inputs: dict[int, Inputs] = {}  # of micro-batches that some chunk has still to see

    def __call__(self, chunk: int, index: int, x: torch.Tensor | None) -> torch.Tensor:
        model, inputs = self.stages.chunks[chunk], self._inputs_for(chunk, index)
        config: Config = self.prepare.config
        if self.iteration is not None and config.model.attention_dropout > 0:
            torch.manual_seed(
                rng.attention_dropout_seed(
                    config.batch.seed, self.iteration, index, chunk, self.stages.mesh.rank
                )
            )
        x = inputs.tokens if x is None else x
        if not model.predicts:
            return model(x, inputs.context)
        total, losses = model(x, inputs.context, targets=(inputs.labels, inputs.mask * self.scale))
        if self.stages.mesh.tp.rank == 0:  # the others hold the same losses
            self.totals[0] += masked_sum(losses, inputs.mask)
            self.totals[1] += inputs.mask.sum()
        return total

    def _inputs_for(self, chunk: int, index: int) -> Inputs:
        """A micro-batch is read when the first chunk needs it and dropped when the last one has had it."""
        if chunk == 0:
            self._inputs[index] = self.prepare(next(self.batches), self.iteration)
        last = chunk == len(self.stages.chunks) - 1
        return self._inputs.pop(index) if last else self._inputs[index]


def masked_sum(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the losses [B, T] that count. Selected, not multiplied: a loss that does not count may be NaN."""
    return torch.where(mask > 0, losses, 0.0).sum()
