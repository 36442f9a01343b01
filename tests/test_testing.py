"""The harness itself: results in order, the first failure with its traceback, and no case that
spoils the next.
"""

import os
import time

import pytest
import torch

from trivium.checkpoint.manifest import CheckpointError
from trivium.comm import all_reduce
from trivium.mesh import Mesh
from trivium.testing import RankError, run_ranks


def add(mesh: Mesh, value: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    return mesh.rank, mesh.tp.size, all_reduce(value.clone(), mesh.world)


def test_results_come_back_in_rank_order():
    results = run_ranks(4, add, torch.tensor([1.0, 2.0]), tp=2)
    assert [(rank, tp, value.tolist()) for rank, tp, value in results] == [
        (rank, 2, [4.0, 8.0]) for rank in range(4)
    ]


def fail_on_one(mesh: Mesh, kind: type) -> None:
    if mesh.rank == 1:
        raise kind("the first failure")
    all_reduce(torch.zeros(1), mesh.world)  # never completes, and fails only because rank 1 left


@pytest.mark.parametrize("kind", [CheckpointError, KeyError])
def test_the_first_failure_is_raised_as_it_was_with_its_traceback(kind):
    start = time.monotonic()
    with pytest.raises(kind, match="the first failure") as failure:
        run_ranks(2, fail_on_one, kind)
    assert (
        "on rank 1:" in failure.value.__notes__[0] and "fail_on_one" in failure.value.__notes__[0]
    )
    assert time.monotonic() - start < 20
    assert len(run_ranks(2, add, torch.zeros(1))) == 2


def leave(mesh: Mesh, how: str) -> None:
    if mesh.rank == 0:
        os._exit(3) if how == "die" else time.sleep(60)


@pytest.mark.parametrize(
    ("how", "reason"), [("die", "rank 0 died"), ("hang", r"ranks \[0\] did not answer within 1 s")]
)
def test_a_dead_or_hung_rank_is_named_and_replaced(how, reason):
    with pytest.raises(RankError, match=reason):
        run_ranks(2, leave, how, timeout=1.0)
    assert [rank for rank, _, _ in run_ranks(2, add, torch.zeros(1))] == [0, 1]


def process_and_descriptors(mesh: Mesh) -> tuple[int, int]:
    return os.getpid(), len(os.listdir("/proc/self/fd"))


def test_a_hundred_cases_leak_no_descriptor():
    """After ten cases, for what torch opens once."""
    for _ in range(10):
        before = run_ranks(2, process_and_descriptors)
    ours = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        after = run_ranks(2, process_and_descriptors)
    assert [pid for pid, _ in after] == [pid for pid, _ in before]
    assert (
        all(late <= early + 2 for (_, early), (_, late) in zip(before, after, strict=True))
        and len(os.listdir("/proc/self/fd")) <= ours
    )
