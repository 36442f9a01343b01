"""Save a checkpoint while training goes on.

The problem: writing takes long, and the weights change with the next update. So training stops for
a copy to host memory alone, and files are written from the copy. A thread would share the
interpreter with the trainer and slow its steps down, so a process of its own writes.

The idea, for one save:

    foreground, all ranks    agree that the folder is made; copy the slices to memory that another
                             process can map (_Memory); start that process (_Flight)
    background, each rank    writer.py writes the rank's files; the first rank's then waits for the
                             others' files, joins the manifests and publishes (rank_files.complete)
    foreground, all ranks    `finish`: wait until all are done or one has failed, and agree on it

The processes meet in the file system alone: no collective runs in the background, where it would
mix with those of the training step. A failure is seen by the rank whose process it is (`problem`);
what all ranks do about it they decide in `finish`. A trainer that ends, however it ends, takes
its writer along (the lifeline in writer.py), so that a restarted run never meets an old writer.
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
from .rank_files import MAX_SHARD_BYTES, not_saved, reported
from .retention import KEEP_ALL, Retention
from .save import begin, boxes_of

_ALIGNMENT = 64  # bytes: of every tensor in the memory
# Bytes: sizes are rounded up to it, for the job grows by a digit now and then, and new memory is
# slow until it has been written once.
_GRAIN = 1 << 20
_PAUSE = 0.02  # seconds between looks at the processes while all ranks wait
# What a scheduler or a terminal sends to every process of a job: the trainer answers it, and may
# want to finish the save first.
_TRAINERS_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP}


class Background:
    """The save in flight of this rank, at most one.

    All ranks of `world` call `start` and `finish` alike; `device` is where they agree.
    """

    def __init__(self, world: Axis, device: torch.device):
        self.world = world
        self.device = device
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
        """Begin to save `iteration`, as `save` does.

        The tensors of `pieces` may change as soon as this returns. None may be in flight: `finish`
        it first. Raises CheckpointError on all ranks where one cannot begin.
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
                start, stop = self._memory.hold(pieces, job)
                self._flight = _Flight(save_dir, iteration, self._memory, start, stop)

        try:
            together(launch, self.world, self.device)
        except CheckpointError:
            self._give_up(folder)
            raise

    def problem(self) -> str | None:
        """Return why the save in flight has failed on this rank; None while it has not.

        It costs one look at a process.
        """
        return self._flight.problem() if self._flight else None

    def published(self) -> int | None:
        """Return, on the first rank, the iteration in flight once it is published.

        None before that, and on the other ranks.
        """
        flight = self._flight
        if flight is None or self.world.rank != 0 or flight.running():
            return None
        return None if flight.problem() else flight.iteration

    def finish(self) -> int | None:
        """Wait until the save in flight is published; return its iteration, None without one.

        Raises the same CheckpointError on all ranks if it failed on one: nothing is published then,
        and nothing is left behind.
        """
        flight = self._flight
        if flight is None:
            return None
        # The first rank's process waits for the files of the others, for ever if one of them has
        # failed: so all ranks wait together, until one has failed or all are done.
        while not self._decided(flight):
            time.sleep(_PAUSE)

        def report() -> None:
            problem = flight.problem()
            if problem:
                raise CheckpointError(problem)

        try:
            together(report, self.world, self.device)
        except CheckpointError:
            self._give_up(publish.begun(flight.save_dir, flight.iteration))
            raise
        flight.end()
        self._flight = None
        return flight.iteration

    def _decided(self, flight: "_Flight") -> bool:
        """Return whether one rank has failed, or all are done."""
        mine = [flight.problem() is not None, flight.running()]
        flags = torch.tensor(mine, dtype=torch.int64, device=self.device)
        failed, running = all_reduce(flags, self.world, "max").tolist()
        return bool(failed) or not running

    def _give_up(self, folder: Path) -> None:
        """End the processes of all ranks, then remove what they wrote."""
        if self._flight:
            self._flight.end()
            self._flight = None
        # A barrier: no process of any rank may write into the folder while it is removed.
        all_reduce(torch.zeros((), device=self.device), self.world)
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


class _Memory:
    """Memory that another process can map.

    It is kept between saves, because new pages are slow to get. It is a memory file where the
    system has those, since a container's /dev/shm may be small; else a temporary file without a
    name.
    """

    def __init__(self) -> None:
        self.descriptor = -1
        self._mapped: mmap.mmap | None = None

    def hold(self, pieces: Iterable[Piece], job: dict) -> tuple[int, int]:
        """Copy the pieces in, and behind them, as JSON, the job with the place of each.

        Returns where the JSON begins and ends. The copies are complete then, also those from a
        device.
        """
        boxes: list[list] = []
        placed: list[tuple[torch.Tensor, int, int]] = []
        end = 0
        for piece, box in boxes_of(pieces):
            start = _rounded_up(end, _ALIGNMENT)
            end = start + box.stored.num_bytes
            if end > start:
                boxes.append([box.name, box.whole, box.offsets, box.dtype, box.shape, start, end])
                placed.append((piece.tensor, start, end))
        text = json.dumps(job | {"boxes": boxes}).encode()
        mapped = self._reserve(end + len(text))
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        with torch.no_grad():
            for tensor, start, stop in placed:
                copy = memory[start:stop].view(tensor.dtype).view(tensor.shape)
                copy.copy_(tensor, non_blocking=True)
        # The copies from a device are only queued so far; the next update must not overtake them.
        for device in {tensor.device for tensor, _, _ in placed if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        mapped[end : end + len(text)] = text
        return end, end + len(text)

    def _reserve(self, size: int) -> mmap.mmap:
        """Return memory of `size` bytes or more: what there is, or new memory in its place."""
        size = _rounded_up(size, _GRAIN)
        if self._mapped is not None and len(self._mapped) >= size:
            return self._mapped
        self.close()
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("trivium-checkpoint")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        os.ftruncate(self.descriptor, size)
        self._mapped = mmap.mmap(self.descriptor, size)
        return self._mapped

    def close(self) -> None:
        """Give the memory back, as soon as no view of it is left."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1
        self._mapped = None

    def __del__(self) -> None:
        self.close()


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class _Flight:
    """One save on its way, and the process that writes this rank's files of it."""

    def __init__(self, save_dir: Path, iteration: int, memory: _Memory, start: int, stop: int):
        self.save_dir = save_dir
        self.iteration = iteration
        self._problem: str | None = None
        command = [
            sys.executable,
            "-P",
            "-m",
            "trivium.checkpoint.writer",
            *map(str, (memory.descriptor, start, stop)),
        ]
        # A process inherits what its maker blocks, so the writer never takes the trainer's signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[memory.descriptor],
                # The lifeline: closed when this process is gone, however it ends.
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def running(self) -> bool:
        """Return whether the process has not ended yet."""
        return self._process.poll() is None

    def problem(self) -> str | None:
        """Return why it failed; None while it runs, and when it is done."""
        if self._problem is None and not self.running() and self._process.returncode:
            assert self._process.stderr is not None
            said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            if said:
                self._problem = said[-1]
            else:
                self._problem = str(not_saved(self.save_dir, self.iteration, self._ended()))
        return self._problem

    def end(self) -> None:
        """End the process, whatever it is doing, and leave nothing open."""
        self._process.kill()
        self._process.communicate()

    def _ended(self) -> str:
        """Return how the process ended, for a message."""
        status = self._process.returncode
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"ended with status {status}"
        return f"its writer, process {self._process.pid}, {how}"
