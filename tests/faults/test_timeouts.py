"""A rank that stops answering, or dies, ends the others in time.

Their message names the rank, the operation and the group.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import NO_DROPOUT, SMALL, free_port, start_step

import pretrain_gpt
from trivium.comm import (
    CommunicationError,
    all_reduce,
    all_to_all,
    start_all_gather,
    start_receive,
    start_reduce_scatter,
    start_send,
)
from trivium.data.loader import MicroBatches
from trivium.launch import Process
from trivium.mesh import Axis, Mesh
from trivium.testing import RankError, run_ranks
from trivium.train import data

RUN = f"{SMALL}{NO_DROPOUT} --mock-data --eval-iters 0 --train-iters 100000"
SLOW = "a rank hangs or the network is cut; if it is only slow, raise --distributed-timeout-minutes"
GONE = "another rank is gone, and its own message says why"
# Floats: more than sockets hold, so that a send to a rank that does not read cannot complete.
LARGE = 2_000_000

OPERATIONS: dict[str, Callable[[Axis], object]] = {
    "all-reduce": lambda axis: all_reduce(torch.zeros(LARGE), axis),
    "reduce-scatter": lambda axis: start_reduce_scatter(torch.zeros(LARGE), axis).wait(),
    "all-gather": lambda axis: start_all_gather(torch.zeros(LARGE), axis).wait(),
    "all-to-all": lambda axis: all_to_all(torch.zeros(2, LARGE), axis),
    "receive from rank 1": lambda axis: start_receive(torch.zeros(LARGE), axis, 1).wait(),
    "send to rank 1": lambda axis: start_send(torch.zeros(LARGE), axis, 1).wait(),
}


def outcomes(mesh: Mesh, groups: list[dist.ProcessGroup]) -> dict[str, tuple[float, str]]:
    """Start every operation at once over tp, each in a group of its own.

    Returns after how many seconds each failed, and with what words.
    """

    def fail(operation, group) -> tuple[float, str]:
        start = time.monotonic()
        with pytest.raises(CommunicationError) as failure:
            operation(replace(mesh.tp, group=group))
        return time.monotonic() - start, str(failure.value)

    with ThreadPoolExecutor(len(OPERATIONS)) as threads:
        return dict(zip(OPERATIONS, threads.map(fail, OPERATIONS.values(), groups), strict=True))


def beside_a_stopped_rank(mesh: Mesh, path: Path) -> dict[str, tuple[float, str]] | None:
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=3)) for _ in OPERATIONS]
    for group in (
        groups
    ):  # each group's connections are made by its first operation or before: not by one that fails
        all_reduce(torch.zeros(1), replace(mesh.tp, group=group))
    if mesh.rank == 1:
        path.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    stopped = wait_for_stop(path)
    try:
        return outcomes(mesh, groups)
    finally:
        os.kill(stopped, signal.SIGCONT)


def wait_for_stop(path: Path) -> int:
    """The process whose id is in `path`, once it is stopped."""
    while not (path.exists() and path.read_text() and state(int(path.read_text())) == "T"):
        time.sleep(0.01)
    return int(path.read_text())


def state(process: int) -> str:
    """T: stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_every_operation_with_a_stopped_rank_fails_after_its_timeout_and_says_which_it_was(
    tmp_path,
):
    failures = run_ranks(2, beside_a_stopped_rank, tmp_path / "process", tp=2)[0]
    for operation, (seconds, message) in failures.items():
        assert 2.5 < seconds < 13, (operation, seconds)  # the rest is for a busy machine
        assert message.startswith(f"rank 0: {operation} over tp (ranks 0, 1) failed: "), message
        assert re.search(r"Timed out waiting 3000ms|timeout", message) and message.endswith(
            f"; {SLOW}"
        ), message


# --- whole runs ---

SECONDS = 6
RUNS = [
    pytest.param(
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "(all-gather|reduce-scatter|all-reduce) over tp",
        True,
        id="tp2",
    ),
    pytest.param(
        "--context-parallel-size 2 --cp-comm-type a2a", "all-to-all over cp", False, id="cp2"
    ),
    pytest.param(
        "--pipeline-model-parallel-size 2",
        "(receive from|send to) rank 1 over pp",
        True,
        id="pp2",
        marks=pytest.mark.soak,
    ),
    pytest.param(
        "--use-distributed-optimizer",
        "reduce-scatter over shards",
        False,
        id="dp2",
        marks=pytest.mark.soak,
    ),
]


class Hanging(MicroBatches):
    """A loader that hangs where its eleventh micro-batch should be.

    It writes its process's id to `path` first. Then it is stopped, threads and all, or sleeps.
    """

    path: Path
    stopped: bool

    def __next__(self):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 11:
            self.path.write_text(str(os.getpid()))
            if self.stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            while self.path.exists():
                time.sleep(0.05)
        return super().__next__()


def run_beside_a_hanging_loader(
    mesh: Mesh, flags: str, stopped: bool, path: Path, port: str
) -> tuple[float, str]:
    """Run with a rank 1 that hangs.

    Returns how many seconds later the run ended on this rank, and with what words.
    """
    dist.destroy_process_group()  # the pool's: the run makes its own, with its own timeout
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if mesh.rank == 1:
        Hanging.path, Hanging.stopped = path, stopped
        data.MicroBatches = Hanging
    try:
        with pytest.raises(CommunicationError) as failure:
            pretrain_gpt.main(
                f"{RUN} {flags} --distributed-timeout-minutes {SECONDS / 60}".split(),
                Process(mesh.rank, 2, mesh.rank),
            )
        return time.time() - path.stat().st_mtime if mesh.rank == 0 else 0.0, str(failure.value)
    finally:
        data.MicroBatches = MicroBatches
        if mesh.rank == 0:
            process = int(path.read_text())
            path.unlink()
            os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize(("flags", "operation", "stopped"), RUNS)
def test_a_run_with_a_hanging_rank_ends_in_time_and_names_the_axis(
    tmp_path, flags, operation, stopped
):
    seconds, message = run_ranks(
        2,
        run_beside_a_hanging_loader,
        flags,
        stopped,
        tmp_path / "process",
        free_port(),
        timeout=120,
    )[0]
    assert seconds < SECONDS + 10
    assert re.match(rf"rank 0: {operation} \(ranks 0, 1\) failed: ", message) and message.endswith(
        f"; {SLOW}"
    ), message


def beside_a_killed_rank(mesh: Mesh, folder: Path) -> None:
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=100)) for _ in OPERATIONS]
    for group in groups:
        all_reduce(torch.zeros(1), replace(mesh.tp, group=group))
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    failures = outcomes(mesh, groups)
    (folder / "failures").write_text(
        "\n".join(f"{seconds} {message}" for seconds, message in failures.values())
    )


def test_every_operation_with_a_killed_rank_fails_at_once_and_says_that_it_is_gone(tmp_path):
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(2, beside_a_killed_rank, tmp_path, tp=2)
    failures = (tmp_path / "failures").read_text().splitlines()
    for operation, line in zip(OPERATIONS, failures, strict=True):
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 10, "not after the 100 seconds that it may take"
        assert message.startswith(
            f"rank 0: {operation} over tp (ranks 0, 1) failed: "
        ) and message.endswith(f"; {GONE}"), message


@pytest.mark.soak
@pytest.mark.parametrize(
    ("number", "timeout", "earliest", "latest", "reason"),
    [(signal.SIGSTOP, 12, 11, 24, SLOW), (signal.SIGKILL, 100, 0, 30, GONE)],
    ids=["stopped", "killed"],
)
@pytest.mark.parametrize(
    "flags",
    ["--overlap-grad-reduce", "--context-parallel-size 2 --cp-comm-type a2a --num-workers 2"],
)
def test_the_processes_of_a_failed_run_are_gone_and_say_one_line(
    tmp_path, number, timeout, earliest, latest, reason, flags
):
    """Groups that are taken down with operations under way abort the process.

    So it has to leave without that, and still with its rows written.
    """
    arguments = (
        f"{RUN} {flags} --log-interval 1 --distributed-timeout-minutes {timeout / 60} "
        f"--metrics-jsonl {tmp_path}/rows.jsonl"
    )
    ranks = start_step(arguments)
    try:
        lines = iter(ranks[0].stdout)
        assert any(re.search(r"iteration +5/", line) for line in lines)
        ranks[1].send_signal(number)
        start = time.monotonic()
        _, error = ranks[0].communicate(timeout=latest)
        took = time.monotonic() - start
    finally:
        for rank in ranks:
            rank.kill()
    assert (
        ranks[0].returncode == 1
        and error.count("\n") == 1
        and error.startswith("pretrain_gpt.py: rank 0: ")
    ), error
    assert error.strip().endswith(f"; {reason}") and earliest <= took < latest, (took, error)
    assert '"iteration": 5,' in (tmp_path / "rows.jsonl").read_text()
