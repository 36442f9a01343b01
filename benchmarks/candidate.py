"""Describe an engine that is measured, and what it did in its updates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from trivium.config import Config, flags, resolve

# Build an update: (configuration, file of initial weights, device) to a function that does one
# update and returns its loss.
Build = Callable[[Config, Path, torch.device], Callable[[], float]]


def parse_config(arguments: str, processes: int = 1) -> Config:
    """Return the resolved configuration that these flags of pretrain_gpt.py give."""
    return resolve(flags.parse(arguments.split()).config, processes)


@dataclass(frozen=True)
class Candidate:
    """One engine with the flags of its run.

    name: how tables call it
    build: makes its update from the initial weights in a file
    arguments: flags of pretrain_gpt.py
    needs: a module that may not be installed
    probe: a cheaper build that tells how long an update takes, for an engine that is slow to build
    """

    name: str
    build: Build
    arguments: str
    needs: str | None = None
    probe: Build | None = None

    def config(self, batch: int | None = None) -> Config:
        """Return the configuration, with `batch` sequences an update in place of its own number."""
        if batch is None:
            return parse_config(self.arguments)
        sized = f"--micro-batch-size {batch} --global-batch-size {batch}"
        return parse_config(f"{self.arguments} {sized}")


@dataclass(frozen=True)
class Update:
    """One update: its seconds, its loss, and `faults`, the pages that the system had to map in."""

    seconds: float
    faults: int
    loss: float


@dataclass(frozen=True)
class Memory:
    """The highest memory of a process, in bytes; on a GPU, that of the device alone.

    total: of the whole process
    own: above what the process held once its modules were imported
    """

    total: int
    own: int


@dataclass(frozen=True)
class Failure:
    """The reason why a candidate has no answer, in one line."""

    reason: str


@dataclass
class Result:
    """The updates of one candidate, or why it did none.

    batch: sequences an update
    first: the first update, which is not timed
    timed: all later updates
    reference: the candidate whose losses on the same sequences are `expected`
    expected: empty where the reference could not be asked
    """

    config: Config
    batch: int = 0
    first: Update | None = None
    timed: list[Update] = field(default_factory=list)
    memory: Memory | None = None
    reference: str = ""
    expected: list[float] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def full(self) -> bool:
        """Return whether an update has the whole batch of the configuration."""
        return self.batch == self.config.batch.global_batch_size

    @property
    def losses(self) -> list[float]:
        """Return the loss of every update, the first one included."""
        return [update.loss for update in (self.first, *self.timed) if update is not None]

    @property
    def deviation(self) -> float:
        """Return the largest relative distance of a loss from the reference's, NaN if any is."""
        distances = []
        for ours, theirs in zip(self.losses, self.expected, strict=False):
            distances.append(abs(ours - theirs) / abs(theirs))
        if any(math.isnan(distance) for distance in distances):
            return math.nan
        return max(distances, default=math.nan)

    @property
    def seconds(self) -> float:
        """Return the median seconds of a timed update."""
        return median(update.seconds for update in self.timed)

    @property
    def spread(self) -> float:
        """Return half the distance between the quartiles of the seconds, over their median."""
        return relative_spread([update.seconds for update in self.timed])

    @property
    def tokens_per_second(self) -> float:
        """Return tokens per second of the median update."""
        return self.batch * self.config.batch.seq_length / self.seconds


def relative_spread(values: list[float]) -> float:
    """Return half the distance between the quartiles, as a share of the median."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)
