"""Speed, measured: runs a suite, prints tables, names the machine, and writes everything as JSON."""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

# Before torch starts any thread: waiting threads sleep, so that several processes can share the cores. Those started here inherit it.
if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ stands beside tools/

import torch
from _cli import Parser, positive, run

from benchmarks.checkpoint import checkpoint_suite
from benchmarks.generate import generate_suite
from benchmarks.ops import ops_suite
from benchmarks.parallel import parallel_suite
from benchmarks.scaling import scaling_suite
from benchmarks.train import train_suite

EXAMPLE = "python tools/benchmark.py --suite train,ops --peers --out results.json"
SUITES = {
    "train": train_suite,
    "ops": ops_suite,
    "scaling": scaling_suite,
    "generate": generate_suite,
    "parallel": lambda options: parallel_suite(options.rounds, options.steps),
    "checkpoint": lambda options: checkpoint_suite(options.rounds, options.steps),
}


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--suite",
        nargs="+",
        type=suites,
        default=[list(SUITES)],
        help=f"what to measure: {', '.join(SUITES)} or all",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="measure other engines beside this one, in turn with it",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=3,
        help="how often every candidate is run, in turn with the others",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=5,
        help="updates timed in each round, after two that are not",
    )
    parser.add_argument("--out", type=Path, help="JSON file of all results")
    options = parser.parse_args(argv)
    names = dict.fromkeys(name for given in options.suite for name in given)
    results = {"machine": machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(" | ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for name in names:
        results[name] = SUITES[name](options)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {options.out}")


def suites(text: str) -> list[str]:
    """Names with commas between them, as an argparse type."""
    names = text.split(",")
    for name in names:
        if name not in (*SUITES, "all"):
            raise argparse.ArgumentTypeError(
                f"{name!r} is no suite; choose from {', '.join(SUITES)}, all"
            )
    return list(SUITES) if "all" in names else names


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    found: dict[str, str | int] = {
        "cores": os.cpu_count() or 1,
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()}
    return found


def processor() -> str:
    """The processor's name as Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


if __name__ == "__main__":
    run(main)
