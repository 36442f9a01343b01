"""Kill real runs, keep their checkpoints from being written, and damage them.

What was published stays, and the run goes on from it.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from runs import LLAMA, NO_DROPOUT, SMALL, exact, rows_of, start_step, train, write_data

from trivium.checkpoint import publish
from trivium.checkpoint.load import open_checkpoint
from trivium.checkpoint.manifest import CheckpointError
from trivium.mesh import Axis

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    f"{SMALL}{LLAMA}{NO_DROPOUT} --eval-interval 6 --eval-iters 2 --split 80,20,0 --log-interval 1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small")


def start(arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, ROOT / "pretrain_gpt.py", *arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


# --- kills ---


def kill_at_random_moments(
    arguments: str,
    saving: str,
    interval: int,
    folder: Path,
    kills: int,
    chance: random.Random,
    processes: int = 1,
) -> None:
    """Start, kill, start again until it ends by itself, every other time with --async-save.

    interval: iterations between saves by the flags `saving`.

    After each kill a checkpoint verifies that is no older than it must be. The rows at the end
    are those of a run that was left alone.
    """
    train(f"{arguments} --metrics-jsonl {folder}/whole.jsonl", processes)
    parts = folder / "parts"
    arguments += f" {saving} --save {parts} --load {parts}"
    for i in range(kills):
        asynchronous = (i + processes) % 2 == 0
        command = f"{arguments} {'--async-save' if asynchronous else ''}"
        reached = reached_before_it_is_killed(
            start_step(command) if processes > 1 else [start(command)], chance
        )
        # The saves before the last iteration that was logged are finished, all but one that may
        # have been in flight.
        check_what_is_left(parts, (reached - 1) // interval * interval - interval * asynchronous)
    train(arguments, processes)
    whole, found = (
        [rows_of(path, split) for split in (None, "valid")]
        for path in (folder / "whole.jsonl", parts / "metrics.jsonl")
    )
    assert [row["iteration"] for row in found[0]] == list(range(1, len(whole[0]) + 1))
    assert exact(found[0]) == exact(whole[0]) and found[1] == whole[1]


def reached_before_it_is_killed(run: list[subprocess.Popen], chance: random.Random) -> int:
    """The last iteration that the log tells of; 0 before the first."""
    log = run[0].stdout
    begun = next((line for line in log if "training from iteration" in line), None)
    assert begun, run[0].stderr.read()
    time.sleep(chance.uniform(0, 1.0))
    for process in run:
        process.kill()
    logged = [int(match[1]) for line in log if (match := re.match(r" iteration +(\d+)/", line))]
    for process in run:
        process.communicate()
    return max([int(begun.split()[-1]), *logged])


def check_what_is_left(save_dir: Path, owed: int) -> None:
    """Check the newest checkpoint: of iteration `owed` or later, whole, with all rows before it."""
    published = publish.published_iterations(save_dir) if save_dir.is_dir() else []
    newest = publish.tracked_iteration(save_dir) if published else 0
    if published:
        checkpoint = open_checkpoint(save_dir, world=Axis("world"), device=torch.device("cpu"))
        assert checkpoint.iteration == newest == checkpoint.state["iteration"], (
            "the newest does not verify"
        )
        assert rows_in(save_dir / "metrics.jsonl")[:newest] == list(range(1, newest + 1)), (
            "a row before the checkpoint is missing"
        )
    assert newest >= owed


def rows_in(path: Path) -> list[int]:
    """Iterations of the training rows; the last line may be torn."""
    lines = path.read_text().splitlines(keepends=True)
    return [
        int(match[1])
        for line in lines
        if line.endswith("\n")
        and '"split"' not in line
        and (match := re.match(r'{"iteration": (\d+)', line))
    ]


def test_killed_runs_end_up_with_the_losses_of_an_uninterrupted_one(data, tmp_path):
    arguments = f"{RUN} --data-path {data} --train-iters 60"
    kill_at_random_moments(
        arguments, "--save-interval 3 --save-keep-last 3", 3, tmp_path, 4, random.Random(1)
    )


def test_killed_runs_of_two_processes_do_too(data, tmp_path):
    """--deterministic-mode: the order of the sums over processes is then always the same."""
    arguments = (
        f"{RUN} --data-path {data} --train-iters 24 --deterministic-mode "
        "--use-distributed-optimizer"
    )
    kill_at_random_moments(
        arguments, "--save-interval 3", 3, tmp_path, 1, random.Random(2), processes=2
    )


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "kills", "iterations"), [(1, 70, 1500), (2, 30, 200)])
def test_runs_killed_a_hundred_times(data, tmp_path, processes, kills, iterations):
    """With everything that removes checkpoints, and data workers."""
    arguments = (
        f"{RUN} --data-path {data} --train-iters {iterations} --num-workers 1 "
        "--deterministic-mode --eval-interval 20"
    )
    saving = (
        "--save-interval 20 --non-persistent-save-interval 4 --save-keep-last 4 --save-keep-best 2"
    )
    kill_at_random_moments(
        arguments, saving, 4, tmp_path, kills, random.Random(processes), processes
    )


# --- saves that fail ---


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the small model (about 330 kB), not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(
            f"no file system can be mounted here: {made.stderr.strip()}; the limits in "
            "tests/checkpoint are all that is tested"
        )
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("way", ["", "--async-save"])
def test_a_full_disk_ends_the_run_and_leaves_what_was_published(data, tmp_path, small_disk, way):
    """With more room the run goes on from there, to the same losses."""
    arguments = f"{RUN} --data-path {data} --train-iters 40 --save-interval 10 {way}"
    train(f"{arguments} --save {tmp_path}/whole")
    save = (
        f"{arguments} --metrics-jsonl {tmp_path}/rows.jsonl --save {small_disk} --load {small_disk}"
    )
    with pytest.raises(CheckpointError) as failure, log_of(tmp_path / "log"):
        train(save)
    reason = (
        rf"checkpoint of iteration 20 was not saved: {small_disk}/\S+ cannot be written: No space "
        rf"left on device; the newest published is 10"
    )
    assert re.fullmatch(reason, str(failure.value))
    assert sorted(path.name for path in small_disk.iterdir()) == ["iter_0000010", publish.TRACKER]
    log = (tmp_path / "log").read_text()
    assert log.count("saved checkpoint") == 1 and "iteration       31/" not in log, (
        "no further save is tried"
    )
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    train(save)
    assert exact(rows_of(tmp_path / "rows.jsonl")) == exact(
        rows_of(tmp_path / "whole/metrics.jsonl")
    )


def test_a_writer_killed_on_one_of_two_processes_ends_both_with_the_same_line(data, tmp_path):
    arguments = (
        f"{RUN} --data-path {data} --train-iters 100000 --save-interval 20 --async-save "
        f"--save-keep-last 2 --save {tmp_path}"
    )
    run = start_step(arguments)
    next(line for line in run[0].stdout if "saved checkpoint at iteration 20" in line)
    kill_writers_of(run[1])
    said = [process.communicate(timeout=60) for process in run]
    assert [process.returncode for process in run] == [1, 1]
    newest = publish.tracked_iteration(tmp_path)
    line = said[0][1].splitlines()[-1].removeprefix("pretrain_gpt.py: rank 1: ")
    killed = (
        rf"checkpoint of iteration {newest + 20} was not saved: its writer, process \d+, was "
        rf"killed by SIGKILL; the newest published is {newest}"
    )
    assert re.fullmatch(killed, line), said
    assert said[1][1].splitlines()[-1] == f"[rank 1] pretrain_gpt.py: rank 1: {line}"
    assert f"[rank 1] error: {line}; the run ends after the next step" in said[1][0].splitlines()
    assert f"iteration {newest + 40:8d}/" not in said[0][0], "no further save is tried"
    assert not list(tmp_path.glob("*.tmp"))


def kill_writers_of(process: subprocess.Popen) -> None:
    """Every one that this run makes, at once, until the run ends."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        with suppress(OSError):  # a process may end between two looks at it
            for child in (
                Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ):
                if b"trivium.checkpoint.writer" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)
        time.sleep(0.005)


class log_of:
    """What the run in this process logs, also in a file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.file = self.path.open("w")
        self.honest, sys.stdout = sys.stdout, self.file

    def __exit__(self, *error):
        sys.stdout = self.honest
        self.file.close()


# --- damage ---


@pytest.mark.parametrize("way", ["", "--async-save"])
def test_a_run_goes_on_from_the_newest_that_is_whole(data, tmp_path, way):
    arguments = f"{RUN} --data-path {data} --save-interval 3 {way}"
    train(f"{arguments} --save {tmp_path}/whole")
    train(f"{arguments} --save {tmp_path}/parts --exit-interval 12")
    folders = publish.published_folders(tmp_path / "parts")
    shard = "shard_00000.safetensors"
    os.truncate(folders[12] / shard, 100_000)
    flip_a_byte(folders[9] / shard)
    (folders[6] / shard).unlink()
    with log_of(tmp_path / "log"):
        train(f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts")
    warnings = [
        line
        for line in (tmp_path / "log").read_text().splitlines()
        if line.startswith("warning: checkpoint")
    ]
    for line, (iteration, reason) in zip(
        warnings, [(12, "cannot be read"), (9, "is damaged"), (6, "is missing")], strict=True
    ):
        assert (
            line.startswith(f"warning: checkpoint {iteration} does not verify: ")
            and reason in line
            and shard in line
        )
    assert "training from iteration 3\n" in (tmp_path / "log").read_text()
    assert exact(rows_of(tmp_path / "parts/metrics.jsonl")) == exact(
        rows_of(tmp_path / "whole/metrics.jsonl")
    )
    assert publish.published_iterations(tmp_path / "parts") == [3, 6, 9, 12, 15, 18, 20]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)
