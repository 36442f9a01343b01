"""Compare the step time of two checkouts of Trivium.

What lies inside a checkout differs from commit to commit, so each is measured from outside: a whole
run of its own pretrain_gpt.py under its own Python, which writes the time of every iteration to
metrics.jsonl. Runs alternate (A B, then B A, and so on), so that a slow minute of the machine hits
both. The result is the median over rounds of the ratio within a round.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.models import SHAPES, shape_flags
from benchmarks.table import Column, Table, number

THIS = Path(__file__).resolve().parents[1]
WARM_UP = 3  # iterations of each run that do not count: memory is new to them
IMPORTED_FROM = "import trivium; print(trivium.__file__)"


@dataclass(frozen=True)
class Checkout:
    """A checkout of Trivium and the Python that imports it.

    name: the word for it in the table
    folder: the root of the checkout
    python: an interpreter whose `trivium` is the one in `folder`
    """

    name: str
    folder: Path
    python: Path

    def verify(self) -> None:
        """Raise ValueError unless `python` imports the code of this checkout."""
        done = subprocess.run(
            [str(self.python), "-c", IMPORTED_FROM],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        imported = Path(done.stdout.strip() or "nothing").resolve()
        if self.folder.resolve() not in imported.parents:
            raise ValueError(
                f"--against {self.folder}: its Python {self.python} imports {imported}; "
                "run make setup in that checkout"
            )


def other_checkout(folder: Path) -> Checkout:
    """Return the checkout that --against names. Raises ValueError where it cannot be run."""
    python = folder / ".venv" / "bin" / "python"
    for needed in (folder / "pretrain_gpt.py", python):
        if not needed.exists():
            raise ValueError(f"--against {folder}: there is no {needed}; run make setup there")
    return Checkout("other", folder.absolute(), python.absolute())


def compare_checkouts(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Time the models of the train suite in this checkout and in another one, in turn.

    folder: the other checkout, with a .venv
    rounds: runs of each checkout and model
    steps: iterations of a run that count
    """
    ours = Checkout("this", THIS, Path(sys.executable))
    pair = (ours, other_checkout(folder))
    for checkout in pair:
        checkout.verify()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\nstep time: this checkout against {folder}, {rounds} rounds of {steps} iterations")
    results: dict[str, Any] = {"other": str(folder)}
    for shape in SHAPES:
        results[shape] = compare_shape(pair, shape_flags(shape, device), rounds, steps)
        report(shape, results[shape])
    return results


def compare_shape(
    pair: tuple[Checkout, Checkout], flags: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Run one model in both checkouts, in turn.

    pair: this checkout and the other one
    flags: the model
    rounds: runs of each checkout
    steps: iterations of a run that count

    Returns: milliseconds of an iteration in each round, this checkout's and the other's; the ratio
    of each round, this over other; and the medians.
    """
    times: dict[str, list[float]] = {checkout.name: [] for checkout in pair}
    for turn in range(rounds):
        order = pair if turn % 2 == 0 else pair[::-1]
        for checkout in order:
            times[checkout.name].append(iteration_ms(checkout, flags, steps))
    rounds_of_both = zip(times["this"], times["other"], strict=True)
    ratios = [this / other for this, other in rounds_of_both]
    return {
        "milliseconds": times,
        "medians": {name: median(each) for name, each in times.items()},
        "ratios": ratios,
        "ratio": median(ratios),
    }


def iteration_ms(checkout: Checkout, flags: str, steps: int) -> float:
    """Return the median milliseconds of an iteration of one run of pretrain_gpt.py."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        last = WARM_UP + steps
        arguments = (
            f"{flags} --train-iters {last} --log-interval {last}"
            f" --eval-iters 0 --metrics-jsonl {metrics}"
        )
        run_checkout(checkout, arguments, Path(folder))
        lines = metrics.read_text().splitlines()
    counted: list[float] = []
    for line in lines:
        row = json.loads(line)
        if row["iteration"] > WARM_UP:
            counted.append(row["iteration_ms"])
    return median(counted)


def run_checkout(checkout: Checkout, arguments: str, folder: Path) -> None:
    """Run pretrain_gpt.py of a checkout in a folder. Raises ValueError if it fails."""
    script = checkout.folder / "pretrain_gpt.py"
    done = subprocess.run(
        [str(checkout.python), str(script), *arguments.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"the run of {checkout.folder} failed: {said[-1]}")


COLUMNS = [
    Column("this ms", 12, number("this", 1)),
    Column("other ms", 12, number("other", 1)),
    Column("this/other", 12, number("ratio", 4)),
]


def report(shape: str, found: dict[str, Any]) -> None:
    """Print the rounds of one model and their medians."""
    table = Table(shape, 10, COLUMNS)
    print(f"\n{table.header()}")
    times = found["milliseconds"]
    for index, ratio in enumerate(found["ratios"]):
        row = {
            "this": times["this"][index],
            "other": times["other"][index],
            "ratio": ratio,
        }
        print(table.line(f"round {index + 1}", row))
    medians = found["medians"] | {"ratio": found["ratio"]}
    print(table.line("median", medians))
