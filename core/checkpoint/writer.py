"""Write one rank's files of an asynchronous save, in a process of its own.

Run as `python -m trivium.checkpoint.writer MEMORY START STOP`. MEMORY is the inherited descriptor
of the memory that holds the tensors and, at bytes START to STOP, the job as JSON. stdin is a
lifeline: nothing is ever written to it, its other end is the trainer's, and when the trainer is
gone so is this process, before it could meet a run that was started in its place.

It ends with status 0, or with 1 and one line on stderr. It starts in 0.1 s because nothing here
imports torch.
"""

import json
import mmap
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import publish
from .manifest import CheckpointError, one_line
from .rank_files import TensorBox, complete, rank_manifest, reported, write_rank_files
from .retention import Retention

_NICE = 10  # where cores are short, training goes first
_PAUSE = 0.02  # seconds between looks for the other ranks' files
_LOOK = 0.2  # seconds between looks at who the parent is


def main(memory: int, start: int, stop: int) -> int:
    """Do the job; return the exit status."""
    os.nice(_NICE)
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    try:
        mapped = mmap.mmap(memory, stop, prot=mmap.PROT_READ)
        _do(json.loads(mapped[start:stop]), memoryview(mapped))
    except Exception as error:
        sys.stderr.write(one_line(error) + "\n")
        return 1
    return 0


def _do(job: dict, memory: memoryview) -> None:
    """Write the rank's files; the first rank then waits for the others' and publishes."""
    save_dir = Path(job["save_dir"])
    iteration = job["iteration"]
    rest = job["complete"]
    folder = publish.begun(save_dir, iteration)
    with reported(save_dir, iteration):
        boxes = _boxes(job["boxes"], memory)
        write_rank_files(folder, job["rank"], boxes, job["max_shard_bytes"])
        if rest:
            _wait_for_all(folder, rest["world_size"])
    if rest:
        complete(
            save_dir,
            iteration,
            rest["world_size"],
            rest["state"],
            rest["config_yaml"],
            Retention(**rest["retention"]),
        )


def _boxes(items: list[list], memory: memoryview) -> Iterator[TensorBox]:
    """Yield the boxes of the job, whose bytes are views of the memory."""
    for name, whole, offsets, dtype, shape, start, stop in items:
        data = partial(_bytes, memory, start, stop)
        yield TensorBox(name, tuple(whole), tuple(offsets), dtype, tuple(shape), data)


def _bytes(memory: memoryview, start: int, stop: int) -> memoryview:
    return memory[start:stop]


def _wait_for_all(folder: Path, world_size: int) -> None:
    """Wait until all ranks have written.

    One after the other, so that a look costs one file whatever the number of ranks.
    """
    for rank in range(world_size):
        while not rank_manifest(folder, rank).exists():
            if not folder.exists():
                raise CheckpointError(f"{folder} was removed")
            time.sleep(_PAUSE)


def _end_with_trainer() -> None:
    """Leave as soon as stdin is closed or the parent is another.

    stdin alone would not do: processes that the trainer forked meanwhile hold its other end too.
    """
    trainer = os.getppid()
    while os.getppid() == trainer and not select.select([0], [], [], _LOOK)[0]:
        pass
    os._exit(1)


if __name__ == "__main__":
    status = main(*map(int, sys.argv[1:]))
    sys.stderr.flush()
    os._exit(status)
