"""The loop: steps, evaluations, checkpoints, and the reasons to end."""

from collections.abc import Callable
from contextlib import closing

from .. import logs
from ..data.loader import MicroBatches
from .data import Data
from .report import Reporter
from .resume import RunState
from .schedule import Progress
from .step import Trainer
from .stop import StopRequest


def run(
    trainer: Trainer, data: Data, state: RunState, reporter: Reporter, progress: Progress
) -> Progress:
    """Train from `progress` to --train-iters, or to the first reason to stop.

    Returns how far the run came.
    """
    log, config = logs.get_logger(), trainer.config
    logging, checkpoint = config.logging, config.checkpoint
    train_iters = config.batch.train_iters
    if progress.iteration >= train_iters:
        log.info(f" nothing to train: iteration {progress.iteration} of {train_iters} is done")
        return progress

    request = StopRequest(config.batch)
    batches = data.train(progress.consumed_samples)
    reporter.restart_clock()
    stop = at_interval = False
    while progress.iteration < train_iters and not stop:
        # A save in flight that failed on one rank: all ranks meet it in save's own agreement.
        lost = state.watch()
        result = trainer.step(progress, batches, bool(request) or lost)
        progress = result.progress
        last = progress.iteration == train_iters
        at_interval = _divides(config.batch.exit_interval, progress)
        # On an accelerator `add` reads a step late: the request of another rank is seen then.
        stop = reporter.add(result) or at_interval

        loss = None
        if last or _divides(logging.eval_interval, progress):
            stop |= reporter.drain()
            loss = _evaluate(trainer, data.valid, "valid", reporter, progress)
        if last:
            _evaluate(trainer, data.test, "test", reporter, progress)

        persistent = stop or last or _divides(checkpoint.save_interval, progress)
        passing = _divides(checkpoint.non_persistent_save_interval, progress)
        if checkpoint.save and (persistent or passing):
            # The rows reach the disk before the checkpoint does, so that a resume finds them all.
            stop |= reporter.drain()
            state.save(progress, loss, persistent=persistent or stop)
            reporter.restart_clock()
    batches.close()
    state.finish()
    if progress.iteration < train_iters:
        reason = request.reason
        if at_interval and not request:
            reason = f"--exit-interval {config.batch.exit_interval}"
        log.info(f" stopped at iteration {progress.iteration}: {reason}")
    return progress


def _divides(interval: int | None, progress: Progress) -> bool:
    """Return whether the iteration is a multiple of `interval`; False without one."""
    if interval is None:
        return False
    return progress.iteration % interval == 0


def _evaluate(
    trainer: Trainer,
    batches: Callable[[], MicroBatches] | None,
    split: str,
    reporter: Reporter,
    progress: Progress,
) -> float | None:
    """Measure and report the loss of a split; return None where there is no such split."""
    if batches is None:
        return None
    passes, num_passes = trainer.passes, trainer.config.logging.eval_iters
    # Closed here: worker processes that are left to the garbage collector hold it up for five
    # seconds.
    with closing(batches()) as source:
        loss = passes.mean_loss(source, trainer.schedule.evaluation, num_passes)
    reporter.evaluation(progress.iteration, split, loss)
    reporter.restart_clock()
    return loss
