"""Measure candidates side by side: each in a process that stays alive, one update of each in turn.

Since they take turns, the noise of the machine hits all of them alike. The first candidate that
works is the reference: the losses of all others are compared with its losses after as many updates
on the same sequences, so that nobody wins by computing less.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.candidate import Candidate, Result
from benchmarks.worker import Worker, started

BUDGET = 12.0  # seconds an update may take; a candidate that needs longer gets fewer sequences
REFERENCE_BUDGET = 2.0  # times BUDGET: the whole batch's losses of the reference are needed
SLOW_ROUNDS = 1  # rounds of a candidate with fewer sequences
PROBE_LIMIT = 45.0  # seconds a probe may take; a candidate that is slower still is left out
PATIENCE = 30.0  # seconds an answer may take after the deadline
ALWAYS = 2  # candidates that begin even after the deadline: the reference and the next one


@dataclass(frozen=True)
class Limits:
    """The limits on how long and how often candidates run.

    rounds: timed updates of each, at the most
    deadline: time.monotonic() after which no update begins but those of the first round
    probe: give a candidate that would take longer than BUDGET fewer sequences and fewer rounds
    patience: seconds after the deadline until a candidate that does not answer is left out
    """

    rounds: int
    deadline: float = math.inf
    probe: bool = True
    patience: float = PATIENCE


def run_in_turn(
    candidates: Sequence[Candidate],
    weights: Path,
    limits: Limits,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Result]:
    """Run one timed update of each candidate, then more in turn as far as the limits allow.

    weights: file of the initial weights
    between: called once in each round
    Returns each candidate's result by its name.
    """
    with started(candidates, weights, limits.deadline, limits.patience) as workers:
        for number, worker in enumerate(workers):
            budget = BUDGET if number else REFERENCE_BUDGET * BUDGET
            choose_batch(worker, limits.probe, budget, late=number >= ALWAYS)
        do_first_updates(workers)
        for number in range(limits.rounds):
            if not any(has_turn(worker, number) for worker in workers):
                break
            between()
            for worker in workers:
                if has_turn(worker, number):
                    take_turn(worker)
        for worker in workers:
            worker.result.memory = worker.ask("memory")
        compare_losses(workers)
        return {worker.candidate.name: worker.result for worker in workers}


def choose_batch(worker: Worker, probe: bool, budget: float, late: bool) -> None:
    """Set the sequences of an update: all, or as many as a probe says fit into `budget` seconds."""
    result = worker.result
    whole = result.config.batch.global_batch_size
    if not probe:
        result.batch = whole
        return
    worker.send("probe", late=late)
    one = worker.answer(PROBE_LIMIT)  # seconds of an update of one sequence
    if one is None:
        return
    result.batch = whole if one * whole <= budget else max(1, int(budget / one))


def do_first_updates(workers: list[Worker]) -> None:
    """Build each candidate and run its first update; those that compile do so at the same time."""
    compiled = [worker for worker in workers if worker.candidate.probe]
    for number, worker in enumerate(workers):
        if worker not in compiled:
            worker.send("prepare", worker.result.batch, late=number >= ALWAYS)
            worker.result.first = worker.answer()
    for worker in compiled:
        worker.send("prepare", worker.result.batch, late=True)
    for worker in compiled:
        worker.result.first = worker.answer()


def has_turn(worker: Worker, number: int) -> bool:
    """Return whether a candidate takes part in a round: in the first one, every candidate does."""
    result = worker.result
    if number == 0 or not result.timed:
        return number == 0
    if not result.full and number >= SLOW_ROUNDS:
        return False
    return time.monotonic() + result.timed[-1].seconds <= worker.deadline


def take_turn(worker: Worker) -> None:
    """Run one timed update."""
    update = worker.ask("update")
    if update is not None:
        worker.result.timed.append(update)


def compare_losses(workers: list[Worker]) -> None:
    """Give every result the losses of the reference, the first candidate that works.

    For a batch that is not its own the reference starts again, if there is time.
    """
    working = [worker for worker in workers if worker.result.failure is None]
    if not working:
        reasons = [f"{w.candidate.name}: {w.result.failure.reason}" for w in workers]
        raise ValueError(f"no candidate finished its updates: {'; '.join(reasons)}")
    reference = working[0]
    by_batch = {reference.result.batch: reference.result.losses}
    for worker in working:
        result = worker.result
        if result.batch not in by_batch:
            repeated = reference.ask("losses", result.batch, len(result.losses))
            by_batch[result.batch] = repeated or []
        result.reference = reference.candidate.name
        result.expected = by_batch[result.batch]
    # What the reference has measured stands, whatever became of the repetitions.
    reference.result.failure = None
