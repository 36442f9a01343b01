"""What a run reports: rows of numbers, and the places they go to (metrics.jsonl, the console, TensorBoard, a picture). Rank 0 alone writes."""

import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import logs
from ..config import Config, ConfigError


@dataclass(frozen=True)
class Row:
    """One iteration, as metrics.jsonl holds it."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    lm_loss: float
    grad_norm: float
    learning_rate: float
    global_batch_size: int
    iteration_ms: float
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    mfu_causal: float | None
    loss_scale: float
    skipped: int
    memory_bytes: int
    no_predictions: bool = False  # said on the console alone


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation of a split."""

    iteration: int
    split: str
    lm_loss: float
    ppl: float


class MetricsFile:
    """Rows as JSON lines, appended across restarts. What a crash left after the iteration that is resumed from is dropped.

    A path that is no regular file (a pipe, /dev/null) is written to and never replaced.
    """

    def __init__(self, path: Path, iteration: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._regular = path.is_file() or not path.exists()
        if path.is_file():
            _keep_until(path, iteration)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        values = asdict(row)
        del values["no_predictions"]
        self._file.write(_line(values))

    def evaluation(self, row: EvaluationRow) -> None:
        self._file.write(_line(asdict(row)))

    def flush(self) -> None:
        """On the disk: what is in here cannot be newer than a checkpoint that follows."""
        try:
            self._file.flush()
            if self._regular:
                os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = self._file.name  # a write to a full disk does not know its file
            raise

    def close(self) -> None:
        self.flush()
        self._file.close()


def _keep_until(path: Path, iteration: int) -> None:
    """Drop the rows after `iteration` and a torn last line; a run from the start moves the whole file aside, under a name that is free."""
    rows = read_rows(path)
    if iteration == 0 and rows:
        number = next(n for n in itertools.count(1) if not path.with_suffix(f".{n}.jsonl").exists())
        os.rename(path, path.with_suffix(f".{number}.jsonl"))
        logs.get_logger().info(
            f"{path} holds the rows of an earlier run; they are now in {path.with_suffix(f'.{number}.jsonl')}"
        )
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows if row["iteration"] <= iteration)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics file; none if it is no regular file. A last line that a crash cut short is left out.

    Raises ConfigError for a file that holds anything else: it is somebody's, and is not written to.
    """
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "iteration" not in row:
                raise ValueError
            rows.append(row)
        except ValueError:
            if number < len(lines) or not line.startswith('{"iteration"'[: len(line)]):
                raise ConfigError(
                    [
                        f"--metrics-jsonl {path}: line {number} is no row of metrics; name another file"
                    ]
                ) from None
    return rows


def _line(row: dict) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite) + "\n"


class Console:
    """Megatron's line every --log-interval, and on a terminal a progress bar under it."""

    def __init__(self, config: Config, iteration: int):
        self.config = config
        self._rows: list[Row] = []
        self._skipped, self._nan = 0, 0
        self._progress, self._task = None, None
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, transient=True)
            self._task = self._progress.add_task(
                "starting", total=config.batch.train_iters, completed=iteration, speed=""
            )
            self._progress.start()

    def write(self, row: Row) -> None:
        """Take in an iteration; a bad one is named at once."""
        self._rows.append(row)
        self._skipped += row.skipped
        self._nan += not (math.isfinite(row.lm_loss) or row.no_predictions)
        if row.skipped:
            logs.get_logger().warning(
                f"iteration {row.iteration}: {_what_is_wrong(row)}; the update is skipped"
            )
        if self._progress:
            speed = f"{row.tokens_per_second:,.0f} tokens/s"
            self._progress.update(
                self._task,
                completed=row.iteration,
                description=f"loss {row.lm_loss:.3f}",
                speed=speed,
            )
        if row.iteration % self.config.logging.log_interval == 0:
            self._write_line()

    def evaluation(self, row: EvaluationRow) -> None:
        name = {"valid": "validation", "test": "test"}[row.split]
        logs.get_logger().info(
            f" {name} loss at iteration {row.iteration} | lm loss value: {row.lm_loss:.6E} | lm loss PPL: {row.ppl:.6E} |"
        )

    def close(self) -> None:
        if self._progress:
            self._progress.stop()

    def _write_line(self) -> None:
        rows, last = self._rows, self._rows[-1]
        losses = [row.lm_loss for row in rows if not row.skipped] or [math.nan]
        elapsed = sum(row.iteration_ms for row in rows) / len(rows)
        fields = [
            f" iteration {last.iteration:8d}/{self.config.batch.train_iters:8d}",
            f"consumed samples: {last.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {elapsed:.1f}",
            f"learning rate: {last.learning_rate:.6E}",
            f"global batch size: {last.global_batch_size:5d}",
            f"lm loss: {sum(losses) / len(losses):.6E}",
            f"loss scale: {last.loss_scale:.1f}",
            f"grad norm: {last.grad_norm:.3f}",
            f"number of skipped iterations: {self._skipped:3d}",
            f"number of nan iterations: {self._nan:3d}",
        ]
        if self.config.logging.log_throughput:
            fields += _throughput(rows, elapsed)
        logs.get_logger().info(" | ".join(fields) + " |")
        self._rows, self._skipped, self._nan = [], 0, 0


def _throughput(rows: list[Row], elapsed: float) -> list[str]:
    """Means over the rows, from the mean time: a mean of rates would flatter."""
    last = rows[-1]
    slower = last.iteration_ms / elapsed
    fields = [
        f"tokens per second: {last.tokens_per_second * slower:.1f}",
        f"TFLOP/s per device: {last.tflops_per_device * slower:.3f}",
    ]
    if last.mfu is not None:
        fields += [
            f"MFU: {100 * last.mfu * slower:.2f}%",
            f"MFU (causal): {100 * last.mfu_causal * slower:.2f}%",
        ]
    return fields


def _what_is_wrong(row: Row) -> str:
    if row.no_predictions:
        return "its mask leaves no prediction"
    if not math.isfinite(row.lm_loss):
        return f"the loss is {row.lm_loss}"
    return f"the gradient norm is {row.grad_norm}" + (
        f" at loss scale {row.loss_scale:.0f}" if row.loss_scale != 1 else ""
    )


class TensorBoard:
    """Scalars under Megatron's tags."""

    def __init__(self, folder: str, iteration: int):
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # a second of imports that most runs can do without

        self._writer = SummaryWriter(folder, purge_step=iteration + 1)

    def write(self, row: Row) -> None:
        scalars = {
            "lm loss": row.lm_loss,
            "learning-rate": row.learning_rate,
            "grad-norm": row.grad_norm,
            "loss-scale": row.loss_scale,
            "batch-size": row.global_batch_size,
            "iteration-time": row.iteration_ms / 1000,
            "throughput": row.tflops_per_device,
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, row.iteration)

    def evaluation(self, row: EvaluationRow) -> None:
        name = {"valid": "lm loss validation", "test": "lm loss test"}[row.split]
        self._writer.add_scalar(name, row.lm_loss, row.iteration)
        self._writer.add_scalar(f"{name} ppl", row.ppl, row.iteration)

    def close(self) -> None:
        self._writer.close()


def draw_losses(rows: list[dict], path: Path) -> None:
    """The loss curve of training and validation as a PNG."""
    import matplotlib  # slow to import, and needed once a run

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for split, label, style in (
        (None, "training", {"linewidth": 1}),
        ("valid", "validation", {"marker": "o", "markersize": 4}),
    ):
        points = [
            (row["iteration"], row["lm_loss"])
            for row in rows
            if row.get("split") == split and row["lm_loss"] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    plt.close(figure)
