"""The loss curve of a run as a picture, drawn when the run ends."""

import os
from pathlib import Path

from ... import logs
from ..report import EvaluationRow, Row
from .jsonl import read_rows


class LossCurve:
    """loss.png beside the metrics file, drawn from the rows of all runs that wrote to it."""

    def __init__(self, metrics: Path):
        self._metrics = metrics

    def write(self, row: Row) -> None:
        """Ignore the row: the file holds it, and those of earlier starts as well."""

    def evaluation(self, row: EvaluationRow) -> None:
        """Ignore the row, as `write` does."""

    def flush(self) -> None:
        """Do nothing: the picture is drawn at the end."""

    def close(self) -> None:
        """Draw the picture, if the metrics file holds rows; a pipe or a device holds none."""
        rows = read_rows(self._metrics)
        if not rows:
            return
        picture = self._metrics.with_name("loss.png")
        draw_losses(rows, picture)
        logs.get_logger().info(f" loss curve: {picture}")


def draw_losses(rows: list[dict], path: Path) -> None:
    """Draw the losses of training and validation over the iterations as a PNG."""
    import matplotlib  # slow to import, and needed once a run

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    training = _points(rows, None)
    validation = _points(rows, "valid")
    if training:
        axes.plot(*zip(*training, strict=True), label="training", linewidth=1)
    if validation:
        axes.plot(*zip(*validation, strict=True), label="validation", marker="o", markersize=4)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    # Renamed when it is whole: a viewer never sees half a picture.
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    plt.close(figure)


def _points(rows: list[dict], split: str | None) -> list[tuple[int, float]]:
    """Return (iteration, loss) of the rows of a split; None: of training.

    A loss that was not finite is null in the file, and leaves a gap.
    """
    points = []
    for row in rows:
        loss = row["lm_loss"]
        if row.get("split") == split and loss is not None:
            points.append((row["iteration"], loss))
    return points
