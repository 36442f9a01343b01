"""Run a candidate in a process of its own that stays alive and does one update when it is asked.

Two ends of one pipe: a Worker in the benchmark's own process, a Session in the candidate's. A
message is the name of a method of Session and its arguments; the answer is what the method returns,
or a Failure.
"""

import math
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidate import Candidate, Failure, Memory, Result, Update
from trivium import launch

PROBED = 1.0  # seconds of updates of one sequence that a probe runs
LEISURE = 3.0  # seconds a process has to end by itself
PRELOADED = ["torch", "torch.distributed", "trivium.train.build"]


def fork_server() -> multiprocessing.context.BaseContext:
    """Return a context whose server imports torch and Trivium once, and starts no device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Worker:
    """The benchmark's end of one candidate. After a failure every answer is None.

    candidate: the engine and its flags
    weights: file of the initial weights
    deadline: time.monotonic() after which nothing new begins
    patience: seconds an answer may take after the deadline
    """

    def __init__(self, candidate: Candidate, weights: Path, deadline: float, patience: float):
        self.candidate = candidate
        self.deadline = deadline
        self.patience = patience
        self.result = Result(candidate.config())
        context = fork_server()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(candidate, weights, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *message: Any) -> Any:
        """Send a message and wait for the answer."""
        self.send(*message)
        return self.answer()

    def send(self, *message: Any, late: bool = False) -> None:
        """Send a message, unless the candidate has failed.

        late: fail instead if the deadline has passed
        """
        if self.result.failure is not None:
            return
        if late and time.monotonic() > self.deadline:
            self.result.failure = Failure("there was no time left for it")
            return
        try:
            self.connection.send(message)
        except OSError:
            self.result.failure = Failure("its process ended")

    def answer(self, limit: float = math.inf) -> Any:
        """Wait for an answer, for `limit` seconds at the most; None if none came."""
        if self.result.failure is not None:
            return None
        time_left = max(0.0, self.deadline - time.monotonic())
        limit = min(limit, time_left + self.patience)
        try:
            answered = self.connection.poll(None if limit == math.inf else limit)
            found = self.connection.recv() if answered else Failure(f"no answer in {limit:.0f} s")
        except (EOFError, OSError):
            found = Failure("its process ended, perhaps for want of memory")
        if isinstance(found, Failure):
            self.result.failure = found
            self.close()
            return None
        return found

    def close(self) -> None:
        """End the process: let it end by itself first, since a compiler's helpers end with it."""
        self.connection.close()
        self.process.join(LEISURE)
        self.process.terminate()
        self.process.join()


@contextmanager
def started(
    candidates: Sequence[Candidate], weights: Path, deadline: float, patience: float
) -> Iterator[list[Worker]]:
    """Yield a worker for each candidate; all of them are closed at the end."""
    workers: list[Worker] = []
    try:
        for candidate in candidates:
            workers.append(Worker(candidate, weights, deadline, patience))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def serve(candidate: Candidate, weights: Path, connection: Connection) -> None:
    """Answer messages in the candidate's own process until the other end closes."""
    torch.set_num_threads(os.cpu_count() or 1)
    warnings.simplefilter("ignore")  # engines warn about what they would rather have installed
    session = None
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            session = session or Session(candidate, weights)
            answer = getattr(session, name)(*arguments)
        except Exception as error:
            answer = Failure(one_line(error))
        connection.send(answer)


def one_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


class Session:
    """The candidate's end: each public method answers one message."""

    def __init__(self, candidate: Candidate, weights: Path):
        self.candidate = candidate
        self.weights = weights
        self.device = launch.choose_device("auto", 0)
        if candidate.needs:
            import_module(candidate.needs)
        self.memory_after_imports = usage().ru_maxrss
        self.run: Callable[[], float] | None = None

    def probe(self) -> float:
        """Return the seconds of an update of one sequence, at best: the first finds memory new."""
        build = self.candidate.probe or self.candidate.build
        self.run = build(self.candidate.config(1), self.weights, self.device)
        seconds: list[float] = []
        while sum(seconds) < PROBED:
            seconds.append(self.update().seconds)
        return min(seconds)

    def prepare(self, batch: int) -> Update:
        """Build anew for `batch` sequences and do the first update."""
        self._build(batch)
        return self.update()

    def update(self) -> Update:
        """Do one update and time it."""
        faults = usage().ru_minflt
        start = time.perf_counter()
        loss = self.run()
        seconds = time.perf_counter() - start
        return Update(seconds, usage().ru_minflt - faults, loss)

    def memory(self) -> Memory:
        """Return the highest memory so far."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            return Memory(peak, peak)
        peak = usage().ru_maxrss  # kilobytes
        return Memory(peak * 1024, (peak - self.memory_after_imports) * 1024)

    def losses(self, batch: int, count: int) -> list[float]:
        """Return the losses of the first `count` updates on `batch` sequences."""
        self._build(batch)
        return [self.run() for _ in range(count)]

    def _build(self, batch: int) -> None:
        self.run = None  # two models at once would count as memory of the update
        self.run = self.candidate.build(self.candidate.config(batch), self.weights, self.device)


def usage() -> resource.struct_rusage:
    """Return what the system has counted for this process."""
    return resource.getrusage(resource.RUSAGE_SELF)
