"""Speed, measured: runs a suite, prints tables, names the machine, and writes everything as JSON."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

# Before torch starts any thread: waiting threads sleep, so that several processes can share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from _bench_checkpoint import checkpoint_suite
from _bench_parallel import parallel_suite
from _cli import Parser, positive, run

EXAMPLE = "python tools/benchmark.py --suite parallel --out results.json"
SUITES = {"parallel": parallel_suite, "checkpoint": checkpoint_suite}


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, EXAMPLE)
    parser.add_argument("--suite", nargs="+", choices=(*SUITES, "all"), default=["all"], help="what to measure")
    parser.add_argument("--rounds", type=positive, default=3, help="how often every candidate is run, in turn with the others")
    parser.add_argument("--steps", type=positive, default=5, help="updates timed in each round, after two that are not")
    parser.add_argument("--out", type=Path, help="JSON file of all results")
    options = parser.parse_args(argv)
    names = list(SUITES) if "all" in options.suite else options.suite
    results = {"machine": machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(" | ".join(f"{key} {value}" for key, value in results["machine"].items()))
    for name in names:
        results[name] = SUITES[name](options.rounds, options.steps)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {options.out}")


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
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    run(main)
