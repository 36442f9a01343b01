"""The loop: steps, evaluations, checkpoints, and the reasons to end."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from .. import logs
from ..data.loader import MicroBatches
from .report import Reporter
from .resume import RunState
from .schedule import Progress
from .step import Trainer
from .stop import StopWish


@dataclass(frozen=True)
class Data:
    """The run's data as calls: training batches from a position on, and the fixed batches of each evaluation (None: no such split)."""

    train: Callable[[int], MicroBatches]
    valid: Callable[[], MicroBatches] | None
    test: Callable[[], MicroBatches] | None


def run(
    trainer: Trainer, data: Data, state: RunState, reporter: Reporter, progress: Progress
) -> Progress:
    """Train from `progress` to --train-iters, or to the first reason to stop; how far it came."""
    batch = trainer.config.batch
    if progress.iteration >= batch.train_iters:
        logs.get_logger().info(
            f" nothing to train: iteration {progress.iteration} of {batch.train_iters} is done"
        )
        return progress
    logging, checkpoint = trainer.config.logging, trainer.config.checkpoint
    wish, batches = StopWish(batch), data.train(progress.consumed_samples)
    reporter.restart_clock()
    stop = at_interval = False
    while progress.iteration < batch.train_iters and not stop:
        lost = (
            state.watch()
        )  # a save in flight that failed; all ranks then meet it in save's own agreement
        result = trainer.step(progress, batches, bool(wish) or lost)
        progress = result.progress
        last = progress.iteration == batch.train_iters
        at_interval = _due(progress, batch.exit_interval, False)
        stop = reporter.add(result) or at_interval
        loss = None
        if _due(progress, logging.eval_interval, last):
            stop |= reporter.drain()
            loss = _evaluate(trainer, data.valid, "valid", reporter, progress)
        if last:
            _evaluate(trainer, data.test, "test", reporter, progress)
        persistent = stop or _due(progress, checkpoint.save_interval, last)
        if checkpoint.save and (
            persistent or _due(progress, checkpoint.non_persistent_save_interval, False)
        ):
            stop |= reporter.drain()
            state.save(progress, loss, persistent=persistent or stop)
            reporter.restart_clock()
    batches.close()
    state.finish()
    if progress.iteration < batch.train_iters:
        reason = (
            f"--exit-interval {batch.exit_interval}" if at_interval and not wish else wish.reason
        )
        logs.get_logger().info(f" stopped at iteration {progress.iteration}: {reason}")
    return progress


def _due(progress: Progress, interval: int | None, last: bool) -> bool:
    return last or (interval is not None and progress.iteration % interval == 0)


def _evaluate(
    trainer: Trainer,
    batches: Callable[[], MicroBatches] | None,
    split: str,
    reporter: Reporter,
    progress: Progress,
) -> float | None:
    """The loss of a split, reported; None where there is no such split."""
    if batches is None:
        return None
    # Closed here: worker processes that are left to the garbage collector hold it up for five seconds.
    with closing(batches()) as source:
        loss = trainer.passes.mean_loss(
            source, trainer.schedule.evaluation, trainer.config.logging.eval_iters
        )
    reporter.evaluation(progress.iteration, split, loss)
    reporter.restart_clock()
    return loss
