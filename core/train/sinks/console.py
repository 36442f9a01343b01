"""The console: Megatron's log line, and on a terminal a progress bar under it."""

import math
import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ... import logs
from ...config import Config
from ..report import EvaluationRow, Row

SPLIT_NAMES = {"valid": "validation", "test": "test"}

# Megatron's lines, word for word: scripts of others read them.
ITERATION_LINE = (
    " iteration {row.iteration:8d}/{train_iters:8d} |"
    " consumed samples: {row.consumed_samples:12d} |"
    " elapsed time per iteration (ms): {elapsed:.1f} |"
    " learning rate: {row.learning_rate:.6E} |"
    " global batch size: {row.global_batch_size:5d} |"
    " lm loss: {loss:.6E} |"
    " loss scale: {row.loss_scale:.1f} |"
    " grad norm: {row.grad_norm:.3f} |"
    " number of skipped iterations: {skipped:3d} |"
    " number of nan iterations: {nan:3d} |"
)
EVALUATION_LINE = (
    " {split} loss at iteration {row.iteration} |"
    " lm loss value: {row.lm_loss:.6E} |"
    " lm loss PPL: {row.ppl:.6E} |"
)
# What --log-throughput adds, the second where the device's peak is known.
THROUGHPUT = " tokens per second: {tokens:.1f} | TFLOP/s per device: {tflops:.3f} |"
UTILIZATION = " MFU: {mfu:.2f}% | MFU (causal): {mfu_causal:.2f}% |"


class Console:
    """One line every --log-interval iterations, from the rows since the line before."""

    def __init__(self, config: Config, iteration: int):
        self.train_iters = config.batch.train_iters
        self.log_interval = config.logging.log_interval
        self.log_throughput = config.logging.log_throughput
        self._log = logs.get_logger()
        self._rows: list[Row] = []
        self._skipped = 0
        self._nan = 0
        self._bar: _ProgressBar | None = None
        if sys.stdout.isatty():
            self._bar = _ProgressBar(self.train_iters, iteration)

    def write(self, row: Row) -> None:
        """Take in an iteration; name a bad one at once."""
        self._rows.append(row)
        self._skipped += row.skipped
        # A batch without any prediction has no loss: that is not a NaN of the model's.
        if not (math.isfinite(row.lm_loss) or row.no_predictions):
            self._nan += 1
        if row.skipped:
            problem = _what_is_wrong(row)
            self._log.warning(f"iteration {row.iteration}: {problem}; the update is skipped")
        if self._bar:
            self._bar.move(row)
        if row.iteration % self.log_interval == 0:
            self._write_line()

    def evaluation(self, row: EvaluationRow) -> None:
        """Write the line of an evaluation."""
        split = SPLIT_NAMES[row.split]
        self._log.info(EVALUATION_LINE.format(row=row, split=split))

    def flush(self) -> None:
        """Do nothing: every line is flushed as it is written."""

    def close(self) -> None:
        """Take the progress bar off the terminal."""
        if self._bar:
            self._bar.close()

    def _write_line(self) -> None:
        """Write the line of the rows so far, and begin to count anew."""
        rows = self._rows
        last = rows[-1]
        # A skipped update did not train, and its loss may be inf: the mean leaves it out.
        losses = [row.lm_loss for row in rows if not row.skipped] or [math.nan]
        elapsed = sum(row.iteration_ms for row in rows) / len(rows)
        line = ITERATION_LINE.format(
            row=last,
            train_iters=self.train_iters,
            elapsed=elapsed,
            loss=sum(losses) / len(losses),
            skipped=self._skipped,
            nan=self._nan,
        )
        if self.log_throughput:
            line += _throughput(last, elapsed)
        self._log.info(line)
        self._rows = []
        self._skipped = 0
        self._nan = 0


class _ProgressBar:
    """A bar at the foot of the terminal, which log lines scroll above."""

    def __init__(self, total: int, completed: int):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("starting", total=total, completed=completed, speed="")
        self._progress.start()

    def move(self, row: Row) -> None:
        """Show the iteration of `row`, with its loss and speed."""
        self._progress.update(
            self._task,
            completed=row.iteration,
            description=f"loss {row.lm_loss:.3f}",
            speed=f"{row.tokens_per_second:,.0f} tokens/s",
        )

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()


def _throughput(last: Row, elapsed: float) -> str:
    """Return the rates that belong to the mean time of a line's rows: a mean of rates flatters.

    last: the last row, whose rates belong to its own time.
    elapsed: the mean time in ms.
    """
    slower = last.iteration_ms / elapsed
    tokens = last.tokens_per_second * slower
    text = THROUGHPUT.format(tokens=tokens, tflops=last.tflops_per_device * slower)
    if last.mfu is None or last.mfu_causal is None:
        return text
    mfu = 100 * last.mfu * slower
    mfu_causal = 100 * last.mfu_causal * slower
    return text + UTILIZATION.format(mfu=mfu, mfu_causal=mfu_causal)


def _what_is_wrong(row: Row) -> str:
    """Return why an update was skipped, in a few words."""
    if row.no_predictions:
        return "its mask leaves no prediction"
    if not math.isfinite(row.lm_loss):
        return f"the loss is {row.lm_loss}"
    norm = f"the gradient norm is {row.grad_norm}"
    if row.loss_scale == 1:
        return norm
    return f"{norm} at loss scale {row.loss_scale:.0f}"
