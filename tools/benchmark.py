"""Measure speed: run suites, print tables, name the machine, and write everything as JSON."""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

# Before torch starts any thread: waiting threads sleep, so that several processes can share the
# cores. Processes that are started here inherit it.
if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ stands beside tools/

import torch
from _cli import Parser, positive, run

from benchmarks.checkouts import compare_checkouts
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
    """Run the suites that the arguments name."""
    options = build_parser().parse_args(argv)
    results = {"machine": machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(" | ".join(f"{key} {value}" for key, value in results["machine"].items()))
    if options.against:
        found = compare_checkouts(options.against, options.rounds, options.steps)
        results["against"] = found
    else:
        names = dict.fromkeys(name for given in options.suite for name in given)
        for name in names:
            results[name] = SUITES[name](options)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {options.out}")


def build_parser() -> Parser:
    """Return the parser of this tool's arguments."""
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
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="instead of suites, compare the step time of the train suite's models with another "
        "checkout of Trivium, by whole runs in turn; it needs a .venv of its own (make setup)",
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
        help="updates timed in each round, after a few that are not",
    )
    parser.add_argument("--out", type=Path, help="JSON file of all results")
    return parser


def suites(text: str) -> list[str]:
    """Parse names with commas between them (an argparse type)."""
    names = text.split(",")
    for name in names:
        if name not in (*SUITES, "all"):
            known = ", ".join(SUITES)
            raise argparse.ArgumentTypeError(f"{name!r} is no suite; choose from {known}, all")
    return list(SUITES) if "all" in names else names


def machine() -> dict[str, str | int]:
    """Return what the numbers were measured on."""
    found: dict[str, str | int] = {
        "cores": os.cpu_count() or 1,
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["devices"] = torch.cuda.device_count()
    return found


def processor() -> str:
    """Return the processor's name as Linux tells it, elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    run(main)
