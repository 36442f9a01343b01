"""Candidates in processes of their own that stay alive, one update of each in turn: the noise of the machine hits all of them alike."""

import math
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trivium import launch
from trivium.config import Config, flags, resolve

Build = Callable[[Config, Path, torch.device], Callable[[], float]]

BUDGET = 12.0  # seconds an update may take; a candidate that needs longer gets fewer sequences
REFERENCE_BUDGET = (
    2.0  # times that for the reference, whose losses of the whole batch everyone is held against
)
PROBED = 1.0  # seconds spent on updates of one sequence to tell
SLOW_ROUNDS = 1  # of a candidate with fewer sequences
PROBE_LIMIT = 45.0  # seconds a probe may take; what is slower yet is left out
PATIENCE = 30.0  # seconds an answer may take after the deadline
LEISURE = 3.0  # seconds a process has to end by itself
ALWAYS = 2  # how many candidates begin even after it: the reference and who is held against it


@dataclass(frozen=True)
class Candidate:
    """An engine, and the flags of the run it is to do.

    build(config, weights, device): its update on the initial weights in that file, as a function that returns the update's loss. needs:
    a module that may not be installed. probe: what tells how long its update takes, where building it takes long.
    """

    name: str
    build: Build
    arguments: str
    needs: str | None = None
    probe: Build | None = None

    def config(self, batch: int | None = None) -> Config:
        sized = "" if batch is None else f" --micro-batch-size {batch} --global-batch-size {batch}"
        return resolve(flags.parse((self.arguments + sized).split()).config, 1)


@dataclass(frozen=True)
class Update:
    """faults: pages that the system had to map in."""

    seconds: float
    faults: int
    loss: float


@dataclass(frozen=True)
class Memory:
    """Highest bytes of the process, and those of them above what it held once its modules were imported; on a device, of the device alone."""

    total: int
    own: int


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no answer, in one line."""

    reason: str


@dataclass
class Turns:
    """What one candidate did with `batch` sequences an update: the first update, not timed, and the others. Or why it did nothing."""

    config: Config
    batch: int = 0
    first: Update | None = None
    timed: list[Update] = field(default_factory=list)
    memory: Memory | None = None
    reference: str = ""  # the candidate whose losses on the same sequences are `expected`
    expected: list[float] = field(default_factory=list)  # none where it could not be asked
    failure: Failure | None = None

    @property
    def losses(self) -> list[float]:
        return [update.loss for update in (self.first, *self.timed) if update is not None]

    @property
    def deviation(self) -> float:
        """The largest relative distance of a loss from the reference's; not finite where either is not."""
        distances = [
            abs(ours - theirs) / abs(theirs)
            for ours, theirs in zip(self.losses, self.expected, strict=False)
        ]
        return max(
            distances, key=lambda distance: (math.isnan(distance), distance), default=math.nan
        )

    @property
    def seconds(self) -> float:
        return median(update.seconds for update in self.timed)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        seconds = sorted(update.seconds for update in self.timed)
        quarter = len(seconds) // 4
        return (seconds[-1 - quarter] - seconds[quarter]) / 2 / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.config.batch.seq_length / self.seconds


def take_turns(
    candidates: Sequence[Candidate],
    weights: Path,
    rounds: int,
    deadline: float = math.inf,
    *,
    probe: bool = True,
    patience: float = PATIENCE,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Turns]:
    """One timed update of each candidate, then more in turn, up to `rounds`, of whoever would end before `deadline` (of time.monotonic).

    The first candidate that works is the reference: each loss of the others is held against its loss after as many updates on the same
    sequences. With `probe` a candidate that would take longer than BUDGET for an update gets fewer sequences, and fewer turns. Whoever
    is not ready at the deadline, or `patience` seconds after it, is left out. between: called in each round.
    """
    with started(candidates, weights, deadline, patience) as workers:
        for number, worker in enumerate(workers):
            worker.choose_batch(
                probe, BUDGET if number else REFERENCE_BUDGET * BUDGET, late=number >= ALWAYS
            )
        compiled = [worker for worker in workers if worker.candidate.probe]
        for number, worker in enumerate(workers):
            if worker not in compiled:
                worker.send("prepare", worker.turns.batch, late=number >= ALWAYS)
                worker.turns.first = worker.answer()
        for worker in compiled:  # compilers run side by side
            worker.send("prepare", worker.turns.batch, late=True)
        for worker in compiled:
            worker.turns.first = worker.answer()
        for number in range(rounds):
            if not any(worker.joins(number) for worker in workers):
                break
            between()
            for worker in workers:
                if worker.joins(number):
                    worker.take_turn()
        for worker in workers:
            worker.turns.memory = worker.ask("memory")
        hold_against_reference(workers)
        return {worker.candidate.name: worker.turns for worker in workers}


def hold_against_reference(workers: "list[Worker]") -> None:
    """Give everyone the losses of the first candidate that works; it begins anew for a batch that is not its own, if there is time."""
    reference = next((worker for worker in workers if worker.turns.failure is None), None)
    if reference is None:
        raise ValueError(
            "no candidate finished its updates: "
            + "; ".join(f"{w.candidate.name}: {w.turns.failure.reason}" for w in workers)
        )
    repeated: dict[int, list[float]] = {reference.turns.batch: reference.turns.losses}
    for worker in workers:
        turns = worker.turns
        if turns.failure is None:
            if turns.batch not in repeated:
                repeated[turns.batch] = (
                    reference.ask("losses", turns.batch, len(turns.losses)) or []
                )
            turns.reference, turns.expected = reference.candidate.name, repeated[turns.batch]
    reference.turns.failure = (
        None  # what it has measured stands, whatever became of the repetitions
    )


class Worker:
    """The parent's end of a candidate. After a failure everything is answered by None."""

    def __init__(self, candidate: Candidate, weights: Path, deadline: float, patience: float):
        self.candidate, self.deadline, self.patience, self.turns = (
            candidate,
            deadline,
            patience,
            Turns(candidate.config()),
        )
        context = multiprocessing.get_context(
            "forkserver"
        )  # its server imports once, and starts no device
        context.set_forkserver_preload(["torch", "torch.distributed", "trivium.train.build"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(candidate, weights, theirs), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def full(self) -> bool:
        return self.turns.batch == self.turns.config.batch.global_batch_size

    def choose_batch(self, probe: bool, budget: float, late: bool) -> None:
        whole, one = self.turns.config.batch.global_batch_size, 0.0
        if probe:
            self.send("probe", late=late)
            one = self.answer(PROBE_LIMIT)
        if one is not None:
            self.turns.batch = whole if one * whole <= budget else max(1, int(budget / one))

    def joins(self, number: int) -> bool:
        """Whether there is a turn for it in a round: in the first for everyone."""
        if number == 0 or not self.turns.timed:
            return number == 0
        return (self.full or number < SLOW_ROUNDS) and time.monotonic() + self.turns.timed[
            -1
        ].seconds <= self.deadline

    def take_turn(self) -> None:
        update = self.ask("update")
        if update is not None:
            self.turns.timed.append(update)

    def ask(self, *message: Any) -> Any:
        self.send(*message)
        return self.answer()

    def send(self, *message: Any, late: bool = False) -> None:
        """late: whether it is too late for this after the deadline."""
        if late and time.monotonic() > self.deadline:
            self.turns.failure = self.turns.failure or Failure("there was no time left for it")
        if self.turns.failure is None:
            try:
                self.connection.send(message)
            except OSError:
                self.turns.failure = Failure("its process ended")

    def answer(self, limit: float = math.inf) -> Any:
        if self.turns.failure is not None:
            return None
        limit = min(limit, max(0.0, self.deadline - time.monotonic()) + self.patience)
        try:
            answered = self.connection.poll(None if limit == math.inf else limit)
            found = self.connection.recv() if answered else Failure(f"no answer in {limit:.0f} s")
        except (EOFError, OSError):
            found = Failure("its process ended, perhaps for want of memory")
        if isinstance(found, Failure):
            self.turns.failure = found
            self.close()
            return None
        return found

    def close(self) -> None:
        """At the other end's own leisure, unless it is busy: a compiler's helpers end with it."""
        self.connection.close()
        self.process.join(LEISURE)
        self.process.terminate()
        self.process.join()


@contextmanager
def started(
    candidates: Sequence[Candidate], weights: Path, deadline: float, patience: float
) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for candidate in candidates:
            workers.append(Worker(candidate, weights, deadline, patience))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def serve(candidate: Candidate, weights: Path, connection) -> None:
    """A candidate's own process: answers what it is asked until the other end closes."""
    torch.set_num_threads(os.cpu_count() or 1)
    warnings.simplefilter("ignore")  # of what an engine would rather have installed
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
            answer = Failure(
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            )
        connection.send(answer)


class Session:
    """What a candidate's process can be asked for."""

    def __init__(self, candidate: Candidate, weights: Path):
        self.candidate, self.weights, self.device = (
            candidate,
            weights,
            launch.choose_device("auto", 0),
        )
        if candidate.needs:
            import_module(candidate.needs)
        self.imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.run: Callable[[], float] | None = None

    def probe(self) -> float:
        """Seconds of an update of one sequence, at best: the first one finds memory new."""
        self.run = (self.candidate.probe or self.candidate.build)(
            self.candidate.config(1), self.weights, self.device
        )
        seconds: list[float] = []
        while sum(seconds) < PROBED:
            seconds.append(self.update().seconds)
        return min(seconds)

    def prepare(self, batch: int) -> Update:
        """Begin anew, and the first update."""
        self.run = None  # two models at once would count as memory of the update
        self.run = self.candidate.build(self.candidate.config(batch), self.weights, self.device)
        return self.update()

    def update(self) -> Update:
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        loss = self.run()
        seconds = time.perf_counter() - start
        return Update(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, loss)

    def memory(self) -> Memory:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            return Memory(peak, peak)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Memory(peak * 1024, (peak - self.imported) * 1024)

    def losses(self, batch: int, count: int) -> list[float]:
        """Of the first updates on `batch` sequences."""
        self.run = None
        self.run = self.candidate.build(self.candidate.config(batch), self.weights, self.device)
        return [self.run() for _ in range(count)]
