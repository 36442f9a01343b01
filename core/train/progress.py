"""How far a run has come."""

from dataclasses import dataclass

from ..config import BatchConfig


@dataclass(frozen=True)
class Progress:
    """Updates done and data consumed; a skipped update counts, as its samples are gone."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after_step(self, batch: BatchConfig) -> "Progress":
        samples = batch.global_batch_size
        return Progress(
            self.iteration + 1,
            self.consumed_samples + samples,
            self.consumed_tokens + samples * batch.seq_length,
        )
