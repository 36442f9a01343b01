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
        command = [str(self.python), "-c", IMPORTED_FROM]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
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

    Returns: milliseconds of an iteration in each round, this checkout's and the other's; the ratio
    of each round, this over other; and the medians.
    """
    times: dict[str, list[float]] = {checkout.name: [] for checkout in pair}
    for number in range(rounds):
        order = pair if number % 2 == 0 else pair[::-1]
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
        words = f"{flags} --train-iters {last} --log-interval {last} --eval-iters 0".split()
        script = checkout.folder / "pretrain_gpt.py"
        command = [str(checkout.python), str(script), *words, "--metrics-jsonl", str(metrics)]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise ValueError(f"the run of {checkout.folder} failed: {said[-1]}")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    counted = [row["iteration_ms"] for row in rows if row["iteration"] > WARM_UP]
    return median(counted)


def report(shape: str, found: dict[str, Any]) -> None:
    """Print the rounds of one model and their medians."""
    print(f"\n{shape:<10}{'this ms':>12}{'other ms':>12}{'this/other':>12}")
    times = found["milliseconds"]
    for number, ratio in enumerate(found["ratios"]):
        this, other = times["this"][number], times["other"][number]
        print(f"round {number + 1:<4}{this:>12.1f}{other:>12.1f}{ratio:>12.4f}")
    medians = found["medians"]
    print(f"{'median':<10}{medians['this']:>12.1f}{medians['other']:>12.1f}{found['ratio']:>12.4f}")
