"""What a run reports: rows of numbers, and the places they go to (metrics.jsonl, the console, TensorBoard, a picture). Rank 0 alone writes."""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import logs
from ..config import Config


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


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation of a split."""

    iteration: int
    split: str
    lm_loss: float
    ppl: float


class MetricsFile:
    """Rows as JSON lines, appended across restarts. What a crash left after the iteration that is resumed from is dropped."""

    def __init__(self, path: Path, iteration: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(path)
        kept = [row for row in rows if row["iteration"] <= iteration]
        if rows and iteration == 0:
            aside = path.with_suffix(".previous.jsonl")
            os.replace(path, aside)
            logs.get_logger().info(f"{path} holds the rows of an earlier run; they are now in {aside}")
        elif path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(_line(asdict(row)))

    def evaluation(self, row: EvaluationRow) -> None:
        self._file.write(_line(asdict(row)))

    def flush(self) -> None:
        """On the disk: what is in here cannot be newer than a checkpoint that follows."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics file; none if there is no file. A last line that a crash cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _line(row: dict) -> str:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite) + "\n"


class Console:
    """Megatron's line every --log-interval, and on a terminal a progress bar under it."""

    def __init__(self, config: Config, iteration: int):
        self.config = config
        self._rows: list[Row] = []
        self._skipped, self._nan = 0, 0
        self._progress, self._task = None, None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
            self._progress = Progress(*columns, transient=True)
            self._task = self._progress.add_task("starting", total=config.batch.train_iters, completed=iteration, speed="")
            self._progress.start()

    def write(self, row: Row) -> None:
        """Take in an iteration; a bad one is named at once."""
        self._rows.append(row)
        self._skipped += row.skipped
        self._nan += not math.isfinite(row.lm_loss)
        if row.skipped:
            logs.get_logger().warning(f"iteration {row.iteration}: {_what_is_wrong(row)}; the update is skipped")
        if self._progress:
            speed = f"{row.tokens_per_second:,.0f} tokens/s"
            self._progress.update(self._task, completed=row.iteration, description=f"loss {row.lm_loss:.3f}", speed=speed)
        if row.iteration % self.config.logging.log_interval == 0:
            self._write_line()

    def evaluation(self, row: EvaluationRow) -> None:
        name = {"valid": "validation", "test": "test"}[row.split]
        logs.get_logger().info(f" {name} loss at iteration {row.iteration} | lm loss value: {row.lm_loss:.6E} | lm loss PPL: {row.ppl:.6E} |")

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
    fields = [f"tokens per second: {last.tokens_per_second * slower:.1f}", f"TFLOP/s per device: {last.tflops_per_device * slower:.3f}"]
    if last.mfu is not None:
        fields += [f"MFU: {100 * last.mfu * slower:.2f}%", f"MFU (causal): {100 * last.mfu_causal * slower:.2f}%"]
    return fields


def _what_is_wrong(row: Row) -> str:
    if not math.isfinite(row.lm_loss):
        return f"the loss is {row.lm_loss}"
    return f"the gradient norm is {row.grad_norm}" + (f" at loss scale {row.loss_scale:.0f}" if row.loss_scale != 1 else "")


class TensorBoard:
    """Scalars under Megatron's tags."""

    def __init__(self, folder: str, iteration: int):
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that most runs can do without

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
    for split, label, style in ((None, "training", {"linewidth": 1}), ("valid", "validation", {"marker": "o", "markersize": 4})):
        points = [(row["iteration"], row["lm_loss"]) for row in rows if row.get("split") == split and row["lm_loss"] is not None]
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
