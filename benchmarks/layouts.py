"""Run Trivium under one layout on processes of its own, and measure time, traffic and memory."""

import os
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.candidate import parse_config, relative_spread
from benchmarks.engine import Updates, random_batches
from benchmarks.traffic import Traffic
from benchmarks.worker import fork_server
from trivium import launch

WARM_UP = 2


@dataclass(frozen=True)
class Job:
    """One run of a layout.

    processes: how many share this machine's cores evenly
    arguments: flags of pretrain_gpt.py
    steps: updates that are timed, after WARM_UP that are not
    """

    processes: int
    arguments: str
    steps: int


@dataclass(frozen=True)
class Measurement:
    """The measurements of one run, taken on rank 0.

    seconds: of each timed update
    sent: bytes that it sends in an update, by kind
    memory: highest bytes of its device, 0 on a CPU
    loss: of the last timed update
    """

    seconds: list[float]
    sent: dict[str, int]
    memory: int
    loss: float


def run_layout(job: Job) -> Measurement:
    """Start the processes of one run, wait for them, and return what rank 0 measured.

    Raises ValueError if a process fails.
    """
    context = fork_server()
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        workers = []
        for rank in range(job.processes):
            process = launch.Process(rank, job.processes, rank)
            workers.append(context.Process(target=measure, args=(process, job, store, answers)))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise ValueError(
            f"a process of {job.processes} failed under the flags {job.arguments}; "
            "its own message is above"
        )
    return answers.get()


def measure(process: launch.Process, job: Job, store: str, answers: SimpleQueue) -> None:
    """Run one rank: updates on made-up tokens, then one more to count what is sent.

    store: file in which the processes meet
    answers: takes rank 0's Measurement
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.processes))
    config = parse_config(job.arguments, job.processes)
    device = launch.choose_device("auto", process.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    mesh = launch.plan_mesh(config, process).connect(backend, 10, init_method=f"file://{store}")
    batches = random_batches(config, mesh.dp.rank, mesh.dp.size)
    updates = Updates(config, mesh, device, batches)
    seconds: list[float] = []
    for number in range(WARM_UP + job.steps):
        start = time.perf_counter()
        loss = updates.step()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    with Traffic() as traffic:
        updates.step()
    if process.rank == 0:
        answers.put(Measurement(seconds, traffic.sent, memory, loss))
    mesh.close()
    launch.leave(0, process)


def summary(runs: list[Measurement]) -> dict[str, Any]:
    """Return the medians of several runs of one layout."""
    seconds = [second for run in runs for second in run.seconds]
    return {
        "milliseconds": median(seconds) * 1e3,
        "spread": relative_spread(seconds),
        "sent": runs[0].sent,
        "memory": max(run.memory for run in runs),
        "loss": runs[0].loss,
    }


def megabytes_sent(row: dict[str, Any]) -> str:
    """Write the MB that a rank sends in an update."""
    total = sum(row["sent"].values())
    return f"{total / 1e6:.1f}"
