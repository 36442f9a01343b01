"""Asynchronous saves: the same bytes as synchronous ones while training goes on, and on all ranks
the same end where one fails."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cases
import pytest
import torch

from trivium.checkpoint import background, publish
from trivium.checkpoint.background import Background
from trivium.checkpoint.manifest import CheckpointError
from trivium.checkpoint.retention import Retention
from trivium.mesh import Mesh
from trivium.testing import run_ranks

TRACKER = "latest_checkpointed_iteration.txt"


def start(
    saver: Background,
    save_dir: Path,
    iteration: int,
    seed: int,
    mesh: Mesh | None = None,
    **options,
) -> list:
    """Begin to save the small model; the pieces, which the save must not depend on any more."""
    pieces = [
        piece for piece in cases.local_pieces((mesh or Mesh.plan(1, 0)).tp, seed) if piece.primary
    ]
    saver.start(
        save_dir,
        iteration,
        pieces,
        state=cases.state(iteration, seed),
        config_yaml=f"seed: {seed}\n",
        **options,
    )
    return pieces


def alone() -> Background:
    return Background(cases.ALONE, cases.CPU)


def writer_of(saver: Background) -> subprocess.Popen:
    return saver._flight._process


@contextmanager
def stopped_writers():
    """Every writer is stopped as soon as it is made: it has not written anything, and will not."""
    honest = subprocess.Popen

    def stopped(*args, **kwargs):
        process = honest(*args, **kwargs)
        process.send_signal(signal.SIGSTOP)
        return process

    background.subprocess.Popen = stopped
    try:
        yield
    finally:
        background.subprocess.Popen = honest


def save_both_ways(mesh: Mesh, folder: Path) -> None:
    cases.write(folder / "sync", 100, 5, mesh, max_shard_bytes=800)
    saver = Background(mesh.world, cases.CPU)
    start(saver, folder / "async", 100, 5, mesh, max_shard_bytes=800)
    assert saver.finish() == 100 and saver.finish() is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_asynchronous_save_writes_the_bytes_of_a_synchronous_one(tmp_path, ranks):
    run_ranks(ranks, save_both_ways, tmp_path, tp=ranks)
    found = [
        {
            path.relative_to(tmp_path / way): path.read_bytes()
            for path in (tmp_path / way).rglob("*.*")
        }
        for way in ("sync", "async")
    ]
    assert found[0] == found[1] and len(found[0]) > 2 * ranks + 3


def test_tensors_may_change_as_soon_as_a_save_has_begun(tmp_path):
    """The writer has not written a byte when every tensor is overwritten; what it then writes is
    what there was."""
    saver = alone()
    with stopped_writers():
        for piece in start(saver, tmp_path, 100, 5):
            piece.tensor.zero_()
    assert saver.problem() is None and saver.published() is None
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000100.tmp"]
    writer_of(saver).send_signal(signal.SIGCONT)
    assert saver.finish() == 100
    assert cases.differences(cases.read(tmp_path), 5) == []


def test_a_finished_save_is_seen_without_waiting(tmp_path):
    saver = alone()
    start(saver, tmp_path, 100, 5)
    deadline = time.monotonic() + 20
    while saver.published() is None:
        assert time.monotonic() < deadline
    assert saver.published() == 100 == saver.finish() and saver.published() is None


def test_the_memory_is_kept_and_grows(tmp_path):
    saver = alone()
    kept = []
    for iteration in (1, 2):
        start(saver, tmp_path, iteration, iteration)
        saver.finish()
        kept.append((saver._memory.descriptor, saver._memory._mapped))
    assert kept[0] == kept[1]
    start(saver, tmp_path, 3, 3, retention=Retention(keep_last=2))
    large = torch.arange(1_000_000.0)
    saver.finish()
    saver.start(
        tmp_path,
        4,
        [cases.Piece("t", (1_000_000,), ((0, 1_000_000),), large)],
        state=cases.state(4, 4),
        config_yaml="",
    )
    saver.finish()
    assert publish.published_iterations(tmp_path) == [2, 3, 4] and torch.equal(
        cases.read(tmp_path, 4).read("t"), large
    )
    assert cases.differences(cases.read(tmp_path, 3), 3) == []


def test_without_memory_files_a_temporary_one_serves(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    saver = alone()
    start(saver, tmp_path, 100, 5)
    assert saver.finish() == 100 and cases.differences(cases.read(tmp_path), 5) == []


def test_a_writer_leaves_the_jobs_signals_to_its_trainer(tmp_path):
    """A scheduler signals every process of a job: the trainer saves and ends, and its writer must
    live to write that."""
    saver = alone()
    with stopped_writers():
        start(saver, tmp_path, 100, 5)
    assert os.getsid(writer_of(saver).pid) != os.getsid(0), (
        "what a terminal sends to the group of its trainer does not reach it either"
    )
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGCONT):
        writer_of(saver).send_signal(number)
    assert saver.finish() == 100
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) & background._TRAINERS_SIGNALS == set(), (
        "the trainer's own are not blocked"
    )


# --- failures ---


def save_twice(mesh: Mesh, save_dir: Path, failing: int, how: str) -> list[str]:
    """100 is saved, 200 fails on rank `failing`, 300 is saved again; what each came to."""
    saver, said = Background(mesh.world, cases.CPU), []
    for iteration in (100, 200, 300):
        try:
            with broken(
                saver, save_dir, how if (iteration, mesh.rank) == (200, failing) else "not"
            ):
                start(saver, save_dir, iteration, iteration // 100, mesh)
            while iteration == 200 and mesh.rank == failing and saver.problem() is None:
                time.sleep(0.01)  # it is seen here, without asking the others
            said.append(str(saver.finish()))
        except CheckpointError as error:
            said.append(str(error))
            if mesh.rank == 0:  # which removes what was written
                assert (
                    not list(save_dir.glob("*.tmp")) and (save_dir / TRACKER).read_text() == "100"
                )
    return said


@contextmanager
def broken(saver: Background, save_dir: Path, how: str):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if how == "full disk":  # for the process that is made here; the memory is there already
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        if how in ("not", "full disk"):
            yield
            return
        with stopped_writers():
            yield
        writer = writer_of(saver)
        if how == "killed":
            writer.kill()
        else:
            shutil.rmtree(save_dir / "iter_0000200.tmp")
            writer.send_signal(signal.SIGCONT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            "full disk",
            r"/iter_0000200\.tmp/shard_0000{}\.safetensors cannot be written: File too large",
        ),
        ("killed", r"its writer, process \d+, was killed by SIGKILL"),
        (
            "folder removed",
            r"/iter_0000200\.tmp(/shard_0000{}\.safetensors cannot be written: "
            r"No such file or directory| was removed)",
        ),
    ],
)
def test_a_writer_that_fails_on_one_rank_is_one_error_on_all(tmp_path, failing, how, reason):
    results = run_ranks(2, save_twice, tmp_path, failing, how, tp=2)
    assert results[0] == results[1]
    first, line, last = results[0]
    assert (first, last) == ("100", "300") and "\n" not in line
    expected = (
        rf"rank [01]: checkpoint of iteration 200 was not saved: .*{reason}; "
        "the newest published is 100"
    )
    assert re.fullmatch(expected.replace("{}", "[01]"), line), line
    if how != "folder removed":  # there both fail, and the lowest rank is quoted
        assert line.startswith(f"rank {failing}: ")
    assert (
        publish.published_iterations(tmp_path) == [100, 300]
        and cases.read(tmp_path).iteration == 300
    )


@pytest.mark.parametrize("place", ["below a file", "read-only"])
def test_a_folder_that_cannot_be_made_is_one_line_in_the_foreground(tmp_path, place):
    (tmp_path / "file").write_text("")
    save_dir = tmp_path / "file" / "save" if place == "below a file" else Path("/sys/kernel/save")
    for save in (lambda: start(alone(), save_dir, 1, 1), lambda: cases.write(save_dir, 1, 1)):
        with pytest.raises(
            CheckpointError,
            match=f"checkpoint of iteration 1 was not saved: .*{save_dir}.*; "
            "none is published there",
        ):
            save()


def test_state_that_is_not_json_is_refused_in_the_foreground(tmp_path):
    saver = alone()
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        saver.start(tmp_path, 1, [], state={"generator": object()}, config_yaml="")
    assert list(tmp_path.iterdir()) == [] and saver.finish() is None


# --- a writer without its trainer ---

TRAINER = """
import json, os, subprocess, sys, time
memory = os.memfd_create("m")
job = {"save_dir": sys.argv[1], "iteration": 100, "rank": 0, "max_shard_bytes": 1000, "boxes": []}
job["complete"] = {"world_size": 2}
size = os.write(memory, json.dumps(job).encode())
os.mkdir(sys.argv[1] + "/iter_0000100.tmp")
command = [sys.executable, "-m", "trivium.checkpoint.writer", str(memory), "0", str(size)]
writer = subprocess.Popen(command, pass_fds=[memory], stdin=subprocess.PIPE, start_new_session=True)
if sys.argv[2] == "forked":  # as a data worker is: it holds the other end of the writer's stdin
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    print(writer.pid, worker, flush=True)
else:
    print(writer.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("others", ["alone", "forked"])
def test_a_writer_ends_with_its_trainer(tmp_path, others):
    """Of two ranks' parts one never comes, so it would wait for ever; its trainer is killed, and it
    is gone before another run can start."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, tmp_path, others], stdout=subprocess.PIPE, text=True
    )
    writer, *worker = map(int, trainer.stdout.readline().split())
    try:
        wait_until(lambda: (tmp_path / "iter_0000100.tmp/manifest_00000.json").exists())
        assert is_alive(writer)
        trainer.kill()
        killed = time.monotonic()
        wait_until(lambda: not is_alive(writer))
        assert time.monotonic() - killed < 2, "starting Python and importing torch takes longer"
    finally:
        trainer.kill()
        for process in worker:
            os.kill(process, signal.SIGKILL)
        trainer.communicate()


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    """One that has ended and that nobody has asked for is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_job_that_makes_no_sense_is_one_line(tmp_path):
    memory = os.memfd_create("m")
    job = json.dumps({"save_dir": str(tmp_path)}).encode()
    os.write(memory, job)
    command = [sys.executable, "-m", "trivium.checkpoint.writer", str(memory), "0", str(len(job))]
    writer = subprocess.Popen(
        command, pass_fds=[memory], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = writer.stderr.read()  # before its stdin is closed, which ends it
    os.close(memory)
    assert writer.wait() == 1 and said == "KeyError: 'iteration'\n"
    writer.communicate()
