"""Saving while training goes on: every rank copies its slices to memory that a process of its own then writes from.

In the foreground: the copy to the host, and two small agreements among the ranks. In the background: one process per rank and save
(writer.py), which meet in the file system alone. A failure is seen by the rank whose process it is, in `problem`; what all ranks do about
it they decide in `finish`.
"""

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from ..comm import all_reduce
from ..layout import Piece
from ..mesh import Axis
from . import publish
from .agree import together
from .manifest import CheckpointError
from .part import MAX_SHARD_BYTES, not_saved, reported
from .retention import KEEP_ALL, Retention
from .save import begin, blocks_of

_ALIGNMENT = 64  # bytes: of every tensor in the memory
_GRAIN = (
    1 << 20
)  # bytes: the job grows by a digit now and then, and new memory is slow until it has been written once
_PAUSE = 0.02  # seconds between looks at the processes while all ranks wait
# What a scheduler or a terminal sends to every process of a job: the trainer answers it, and may want to finish the save first.
_TRAINERS_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP}


class Background:
    """The save in flight of this rank, at most one. All ranks of `world` call `start` and `finish` alike; `device` is where they agree."""

    def __init__(self, world: Axis, device: torch.device):
        self.world, self.device = world, device
        self._memory = _Memory()
        self._flight: _Flight | None = None

    def start(
        self,
        save_dir: Path,
        iteration: int,
        pieces: Iterable[Piece],
        *,
        state: dict,
        config_yaml: str,
        retention: Retention = KEEP_ALL,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Begin to save `iteration`, as `save` does; the tensors of `pieces` may change as soon as this returns.

        None may be in flight: `finish` it first. Raises CheckpointError on all ranks where one cannot begin.
        """
        save_dir = Path(save_dir).absolute()
        job = {
            "save_dir": str(save_dir),
            "iteration": iteration,
            "rank": self.world.rank,
            "max_shard_bytes": max_shard_bytes,
            "complete": None,
        }
        if self.world.rank == 0:
            job["complete"] = {
                "world_size": self.world.size,
                "state": state,
                "config_yaml": config_yaml,
                "retention": asdict(retention),
            }
        folder = begin(save_dir, iteration, self.world, self.device)

        def launch() -> None:
            with reported(save_dir, iteration):
                self._flight = _Flight(
                    save_dir, iteration, self._memory, *self._memory.hold(pieces, job)
                )

        try:
            together(launch, self.world, self.device)
        except CheckpointError:
            self._give_up(folder)
            raise

    def problem(self) -> str | None:
        """Why the save in flight has failed on this rank; None while it has not. Costs one look at a process."""
        return self._flight.problem() if self._flight else None

    def published(self) -> int | None:
        """On the first rank, the iteration in flight once it is published; None before, and on the others."""
        flight = self._flight
        done = (
            self.world.rank == 0
            and flight is not None
            and not flight.running()
            and flight.problem() is None
        )
        return flight.iteration if done else None

    def finish(self) -> int | None:
        """Wait until the save in flight is published, and tell its iteration; None if there is none.

        Raises the same CheckpointError on all ranks if it failed on one: nothing is published then, and nothing is left behind.
        """
        flight = self._flight
        if flight is None:
            return None
        # A rank whose process waits for another's part would wait for ever if that one failed: so they wait together.
        while not self._decided():
            time.sleep(_PAUSE)

        def report() -> None:
            if flight.problem():
                raise CheckpointError(flight.problem())

        try:
            together(report, self.world, self.device)
        except CheckpointError:
            self._give_up(publish.begun(flight.save_dir, flight.iteration))
            raise
        flight.end()
        self._flight = None
        return flight.iteration

    def _decided(self) -> bool:
        """Whether one has failed, or all are done."""
        mine = [self._flight.problem() is not None, self._flight.running()]
        failed, running = all_reduce(
            torch.tensor(mine, dtype=torch.int64, device=self.device), self.world, "max"
        ).tolist()
        return bool(failed) or not running

    def _give_up(self, folder: Path) -> None:
        """End the processes of all ranks, then remove what they wrote."""
        if self._flight:
            self._flight.end()
            self._flight = None
        all_reduce(torch.zeros((), device=self.device), self.world)
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


class _Memory:
    """Memory that another process can map, kept between saves: its pages are given by the system once.

    A memory file where there is one, since a container's /dev/shm may be small; else a temporary file without a name.
    """

    def __init__(self):
        self.descriptor = -1
        self._mapped: mmap.mmap | None = None

    def hold(self, pieces: Iterable[Piece], job: dict) -> tuple[int, int]:
        """Copy the pieces in, and behind them the job with the place of each as JSON; where that begins and ends.

        The copies are complete when this returns, also those from a device.
        """
        blocks, placed, end = [], [], 0
        for piece, block in blocks_of(pieces):
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + block.stored.num_bytes
            if end > start:
                blocks.append(
                    [block.name, block.whole, block.offsets, block.dtype, block.shape, start, end]
                )
                placed.append((piece.tensor, start, end))
        text = json.dumps(job | {"blocks": blocks}).encode()
        self._reserve(end + len(text))
        memory = torch.frombuffer(self._mapped, dtype=torch.uint8)
        with torch.no_grad():
            for tensor, start, stop in placed:
                memory[start:stop].view(tensor.dtype).view(tensor.shape).copy_(
                    tensor, non_blocking=True
                )
        for device in {tensor.device for tensor, _, _ in placed if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        self._mapped[end : end + len(text)] = text
        return end, end + len(text)

    def _reserve(self, size: int) -> None:
        size = -(-size // _GRAIN) * _GRAIN
        if self._mapped is not None and len(self._mapped) >= size:
            return
        self.close()
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("trivium-checkpoint")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        os.ftruncate(self.descriptor, size)
        self._mapped = mmap.mmap(self.descriptor, size)

    def close(self) -> None:
        """Give the memory back, as soon as no view of it is left."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self._mapped = -1, None

    def __del__(self):
        self.close()


class _Flight:
    """One save on its way, and the process that writes this rank's part of it."""

    def __init__(self, save_dir: Path, iteration: int, memory: _Memory, start: int, stop: int):
        self.save_dir, self.iteration = save_dir, iteration
        self._problem: str | None = None
        command = [
            sys.executable,
            "-P",
            "-m",
            "trivium.checkpoint.writer",
            *map(str, (memory.descriptor, start, stop)),
        ]
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, _TRAINERS_SIGNALS
        )  # a process inherits what its maker blocks
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[memory.descriptor],
                stdin=subprocess.PIPE,  # the lifeline: closed when this process is gone, however it ends
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def problem(self) -> str | None:
        """Why it failed; None while it runs, and when it is done."""
        if self._problem is None and not self.running() and self._process.returncode:
            said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self._problem = (
                said[-1] if said else str(not_saved(self.save_dir, self.iteration, self._ended()))
            )
        return self._problem

    def end(self) -> None:
        """End the process, whatever it is doing, and leave nothing open."""
        self._process.kill()
        self._process.communicate()

    def _ended(self) -> str:
        status = self._process.returncode
        how = (
            f"was killed by {signal.Signals(-status).name}"
            if status < 0
            else f"ended with status {status}"
        )
        return f"its writer, process {self._process.pid}, {how}"
