"""metrics.jsonl: one JSON object a line for every iteration and every evaluation."""

import itertools
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

from ... import logs
from ...config import Config, ConfigError
from ..report import EvaluationRow, Row


class MetricsFile:
    """Rows as JSON lines, appended across restarts.

    Rows that a crash left after the iteration that is resumed from are dropped. A path that is no
    regular file (a pipe, /dev/null) is written to and never replaced.
    """

    def __init__(self, path: Path, iteration: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._regular = path.is_file() or not path.exists()
        if path.is_file():
            _keep_until(path, iteration)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append the row of one iteration."""
        values = asdict(row)
        del values["no_predictions"]  # no part of the format
        self._file.write(_line(values))

    def evaluation(self, row: EvaluationRow) -> None:
        """Append the row of one evaluation."""
        values = asdict(row)
        self._file.write(_line(values))

    def flush(self) -> None:
        """Put all rows on the disk: a checkpoint that follows cannot be newer than they are."""
        try:
            self._file.flush()
            if self._regular:
                os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = self._file.name  # a write to a full disk does not know its file
            raise

    def close(self) -> None:
        """Put all rows on the disk and close the file."""
        self.flush()
        self._file.close()


def metrics_path(config: Config) -> Path | None:
    """Return where the rows go: --metrics-jsonl, else under --save, else nowhere."""
    named, save = config.logging.metrics_jsonl, config.checkpoint.save
    if named:
        return Path(named)
    if save:
        return Path(save) / "metrics.jsonl"
    return None


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a metrics file; none if it is no regular file.

    A last line that a crash cut short is left out. Raises ConfigError for a file that holds
    anything else: it is somebody's, and must not be written to.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "iteration" not in row:
                raise ValueError
            rows.append(row)
        except ValueError:
            # Cut short by a crash: the last line, and it begins as ours do.
            torn = number == len(lines) and line.startswith('{"iteration"'[: len(line)])
            if not torn:
                problem = f"line {number} is no row of metrics; name another file"
                raise ConfigError([f"--metrics-jsonl {path}: {problem}"]) from None
    return rows


def _keep_until(path: Path, iteration: int) -> None:
    """Drop the rows after `iteration` and a torn last line.

    A run from the start moves the whole file aside instead, to a name that is free.
    """
    rows = read_rows(path)
    # A run from the start continues nothing, but the rows of an earlier run are worth keeping.
    if iteration == 0 and rows:
        _put_aside(path)
        return
    # Into a file beside it first: a crash in here must not lose the rows before.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            if row["iteration"] <= iteration:
                file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _put_aside(path: Path) -> None:
    """Rename the file to the first of NAME.1.jsonl, NAME.2.jsonl, ... that is free."""
    numbered = (path.with_suffix(f".{number}.jsonl") for number in itertools.count(1))
    aside = next(name for name in numbered if not name.exists())
    os.rename(path, aside)
    logs.get_logger().info(f"{path} holds the rows of an earlier run; they are now in {aside}")


def _line(row: dict) -> str:
    """Return the row as a line of JSON.

    JSON knows no NaN and no infinity: they become null.
    """
    finite = dict(row)
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            finite[key] = None
    return json.dumps(finite) + "\n"
