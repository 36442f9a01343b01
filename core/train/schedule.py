"""Progress of a run, and the global batch that comes next.

The batch is a function of progress: everything that depends on its size (the step, the reports,
the evaluation, the amount of data, the pipeline's plans) asks `BatchSchedule.batch_at`, and keeps
no size of its own.
"""

from dataclasses import dataclass

from ..config import BatchConfig


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one update, over all ranks.

    samples: of the whole batch.
    num_microbatches: forward passes of one data-parallel rank.
    seq_length: tokens of a sample.
    """

    samples: int
    num_microbatches: int
    seq_length: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens in the batch, those under a mask of 0 included."""
        return self.samples * self.seq_length


@dataclass(frozen=True)
class Progress:
    """Updates done and data consumed; a skipped update counts, as its samples are gone."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, batch: GlobalBatch) -> "Progress":
        """Return the progress after one more update, on `batch`."""
        return Progress(
            self.iteration + 1,
            self.consumed_samples + batch.samples,
            self.consumed_tokens + batch.tokens,
        )


class BatchSchedule:
    """The global batch of every update of a run; the same one for all of them today.

    evaluation: the global batch of each pass of an evaluation. It never changes, so that all
    evaluations of a run measure the same samples.
    """

    def __init__(self, config: BatchConfig, data_parallel: int):
        self.num_iterations = config.train_iters
        # Samples that all data-parallel ranks take together, one micro-batch each.
        per_pass = config.micro_batch_size * data_parallel
        self.evaluation = GlobalBatch(
            config.global_batch_size, config.global_batch_size // per_pass, config.seq_length
        )

    def batch_at(self, progress: Progress) -> GlobalBatch:
        """Return the global batch of the update that follows `progress`."""
        return self.evaluation

    def samples_from(self, progress: Progress) -> int:
        """Return the samples consumed when the run ends, if it goes on from `progress`."""
        updates = self.num_iterations - progress.iteration
        return progress.consumed_samples + updates * self.batch_at(progress).samples
