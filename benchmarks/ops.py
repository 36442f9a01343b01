"""The ops suite: every fused op, forward and backward, against PyTorch, eager and compiled.

Each op runs on every implementation that this machine has. Bytes are those that the op must move at
the least; the share is of the speed of a copy, or of a matrix product, measured in the same run.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.candidate import relative_spread
from benchmarks.limits import PEAK_SECONDS, copy_speed, matrix_peaks, timed
from benchmarks.op_problems import Problem, problems
from benchmarks.table import Column, Row, Table, share
from trivium import launch, ops
from trivium.ops import OPS, Ops

SECONDS = 0.2  # that one measurement of one candidate takes at least


@dataclass(frozen=True)
class Format:
    """The implementations of one number format on a device, and its limits.

    word: float32 or bfloat16
    plain, ours: PyTorch's implementation, and the one that `auto` chooses
    ours_name: native on a CPU, triton on a GPU
    copy, product: GB/s of a copy and GFLOP/s of a matrix product
    """

    word: str
    device: torch.device
    plain: Ops
    ours: Ops
    ours_name: str
    copy: float
    product: float

    def kernels(self, problem: Problem) -> dict[str, Ops]:
        """Return the implementations of a problem by name, ours last."""
        found = {"torch": self.plain}
        if self.ours_name in OPS[problem.op] and self.ours.kernels == self.ours_name:
            found[self.ours_name] = self.ours
        return found

    def table(self) -> Table:
        """Return the table of this format."""
        ours = self.ours_name
        columns = [
            Column("torch", 9, milliseconds("torch")),
            Column("compile", 9, milliseconds("compile")),
            Column(ours, 9, milliseconds(ours)),
            Column("spread", 8, share("spread")),
            Column("x torch", 9, times_faster("torch", ours)),
            Column("x compile", 11, times_faster("compile", ours)),
            Column("speed", 14, speed),
            Column("share", 7, share("share")),
        ]
        return Table(f"{self.word:<37}pass", 47, columns)


def ops_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Time every op in fp32 and bf16 on every implementation, in turn; return medians.

    options: rounds
    """
    device = launch.choose_device("auto", 0)
    if device.type == "cpu":
        # As in training; else most of what is timed are page faults of the outputs.
        ops.keep_freed_memory()
    limits = measure_limits(device)
    results: dict[str, Any] = {"limits": limits}
    for dtype in (torch.float32, torch.bfloat16):
        chosen = choose_format(device, dtype, limits)
        if chosen.ours.kernels == "torch":
            print(f"no {chosen.ours_name} kernels here: see the line above")
        table = chosen.table()
        print(f"\n{table.header()}")
        for problem in problems(device, dtype):
            for part in ("forward", "backward") if problem.inputs else ("all",):
                row = measure(problem, chosen, part, options.rounds)
                results[f"{problem.name}, {part}, {chosen.word}"] = row
                print(table.line(f"{problem.name:<37}{part}", row))
    return results


def choose_format(device: torch.device, dtype: torch.dtype, limits: dict[str, float]) -> Format:
    """Return the implementations of a dtype on a device.

    limits: what measure_limits returned
    """
    word = str(dtype).removeprefix("torch.")
    ours = ops.select_ops("auto", device, dtype)
    product = limits["float32 GFLOP/s" if ours.fp32_matmul else f"{word} GFLOP/s"]
    return Format(
        word,
        device,
        ops.select_ops("torch", device, dtype),
        ours,
        "native" if device.type == "cpu" else "triton",
        limits["copy GB/s"],
        product,
    )


def milliseconds(name: str) -> Callable[[Row], str]:
    """Return a writer of an implementation's milliseconds."""
    return lambda row: f"{row[name]:.3f}" if name in row else "-"


def times_faster(other: str, ours: str) -> Callable[[Row], str]:
    """Return a writer of how many times faster ours is."""

    def text(row: Row) -> str:
        if ours not in row or other not in row:
            return "-"
        return f"{row[other] / row[ours]:.2f}"

    return text


def speed(row: Row) -> str:
    """Write the speed of the best implementation."""
    if "gigabytes_per_second" in row:
        return f"{row['gigabytes_per_second']:.1f} GB/s"
    return f"{row['gigaflops']:.0f} GFLOP/s"


def measure(problem: Problem, chosen: Format, part: str, rounds: int) -> Row:
    """Time one pass of an op on each implementation, and say how near it comes to its limit.

    part: forward, backward, or all where they cannot be told apart
    Returns milliseconds by implementation, medians over rounds, and the spread of the last one.
    """
    torch._dynamo.reset()
    kernels = chosen.kernels(problem)
    runs = {name: warm_run(problem, each, part) for name, each in kernels.items()}
    if part != "all":
        # Passes in place are compared with PyTorch's eager form alone: compiled, they would copy.
        runs["compile"] = warm_run(problem, kernels["torch"], part, compiled=True)
    times = take_turns(runs, rounds, chosen.device)
    row: Row = {name: median(taken) for name, taken in times.items()}
    best = list(kernels)[-1]
    row["spread"] = relative_spread(times[best])
    moved = problem.moved[part == "backward"]
    if moved:
        row["gigabytes_per_second"] = moved / row[best] / 1e6
        row["share"] = row["gigabytes_per_second"] / chosen.copy
    else:
        row["gigaflops"] = problem.flops / row[best] / 1e6
        row["share"] = row["gigaflops"] / chosen.product
    return row


def take_turns(
    runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the milliseconds of one call in each round, for each of the runs.

    A round calls each run so often that the rounds of one run take SECONDS together.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[str, int] = {}
    for name, run in runs.items():
        once = max(seconds_of(run, 1, device), 1e-5)
        counts[name] = max(1, int(SECONDS / once / rounds))
    for _ in range(rounds):
        for name, run in runs.items():
            seconds = seconds_of(run, counts[name], device)
            times[name].append(seconds / counts[name] * 1e3)
    return times


def seconds_of(run: Callable[[], Any], count: int, device: torch.device) -> float:
    """Return the seconds of so many calls."""

    def calls() -> None:
        for _ in range(count):
            run()

    return timed(device.type, calls)


def warm_run(
    problem: Problem, kernels: Ops, part: str, *, compiled: bool = False
) -> Callable[[], Any]:
    """Return a function that runs one pass of an op; it has been called twice already.

    kernels: the implementation
    part: forward, backward or all
    compiled: by torch.compile
    """

    def forward() -> Any:
        return problem.run(kernels)

    if compiled:
        forward = torch.compile(forward, dynamic=False)
    if part != "backward":
        return warmed(forward)
    outputs = forward()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [torch.randn_like(output) for output in outputs]

    def backward() -> Any:
        return torch.autograd.grad(outputs, problem.inputs, seeds, retain_graph=True)

    return warmed(backward)


def warmed(run: Callable[[], Any]) -> Callable[[], Any]:
    """Call a function twice and return it."""
    run()
    run()
    return run


def measure_limits(device: torch.device) -> dict[str, float]:
    """Return the speed of a copy and of matrix products, under the names of the table."""
    peaks = matrix_peaks(device.type, PEAK_SECONDS)
    found = {
        "copy GB/s": copy_speed(device) / 1e9,
        "float32 GFLOP/s": peaks["fp32"] / 1e9,
        "bfloat16 GFLOP/s": peaks["bf16"] / 1e9,
    }
    print(" | ".join(f"{name} {value:.0f}" for name, value in found.items()))
    return found
