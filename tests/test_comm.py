"""Communication over an axis: what every form gives on 1, 2 and 3 ranks, with its gradient, and
what is said when a rank does not answer.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trivium import comm
from trivium.comm import (
    CommunicationError,
    all_reduce,
    all_to_all,
    own_slice,
    start_all_gather,
    start_all_reduce,
    start_gather_tokens,
    start_receive,
    start_reduce_scatter,
    start_reduce_tokens,
    start_send,
)
from trivium.mesh import Axis, Mesh
from trivium.testing import RankError, run_ranks

SIZES = (1, 2, 3)


def given(rank: int, *shape: int) -> torch.Tensor:
    """Small whole numbers, others on each rank: their sums are exact in any order."""
    return torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(rank)).float()


# --- plain and started early ---


def plain(mesh: Mesh) -> dict[str, torch.Tensor]:
    """Every form that is not differentiable.

    What is started is waited for only once all are under way.
    """
    axis, n = mesh.tp, mesh.tp.size
    found = {op: all_reduce(given(mesh.rank, 2, 3), axis, op) for op in ("sum", "max", "min")}
    summed, scattered, gathered = (
        given(mesh.rank, 2, 3),
        given(mesh.rank, 2 * n, 3),
        torch.full((2 * n, 3), torch.nan),
    )
    own_slice(gathered, axis).copy_(given(mesh.rank, 2, 3))
    cut, whole = given(mesh.rank, 2, 2, 3), given(mesh.rank, 2, 2 * n, 3)
    pending = {
        "started sum": start_all_reduce(summed, axis),
        "started max": start_all_reduce(given(mesh.rank, 2, 3), axis, "max"),
        "reduce-scatter": start_reduce_scatter(scattered, axis),
        "all-gather": start_all_gather(gathered, axis),
    }
    waiting = {
        "gather tokens": start_gather_tokens(cut, axis),
        "reduce tokens": start_reduce_tokens(whole.clone(), axis),
    }
    found |= {name: p.wait() for name, p in pending.items()} | {
        name: wait() for name, wait in waiting.items()
    }
    found["all-to-all"] = all_to_all(given(mesh.rank, n, 2, 3), axis)
    found["all-to-all of a transposed tensor"] = all_to_all(
        given(mesh.rank, 3, 2, n).transpose(0, 2), axis
    )
    # In place, where it says so: nothing is allocated for a bucket of gradients or weights.
    assert (
        found["started sum"] is summed
        and found["all-gather"] is gathered
        and torch.equal(cut, given(mesh.rank, 2, 2, 3))
    )
    assert found["reduce-scatter"].data_ptr() == own_slice(scattered, axis).data_ptr()
    assert all(p.wait() is found[name] for name, p in pending.items()), "waiting again"
    assert all(p.work is None and not p.buffers for p in pending.values()), "buffers are kept alive"
    return found


@pytest.mark.parametrize("n", SIZES)
def test_every_collective_gives_what_it_says(n):
    ranks = range(n)
    total = sum(given(r, 2 * n, 3) for r in ranks)
    tokens = sum(given(r, 2, 2 * n, 3) for r in ranks)
    small = torch.stack([given(r, 2, 3) for r in ranks])
    for rank, found in enumerate(run_ranks(n, plain, tp=n)):
        assert torch.equal(found["sum"], small.sum(0)) and torch.equal(
            found["started sum"], small.sum(0)
        )
        assert torch.equal(found["max"], small.amax(0)) and torch.equal(
            found["started max"], small.amax(0)
        )
        assert torch.equal(found["min"], small.amin(0))
        assert torch.equal(found["reduce-scatter"], total[2 * rank : 2 * rank + 2])
        assert torch.equal(found["all-gather"], small.flatten(0, 1))
        assert torch.equal(
            found["all-to-all"], torch.stack([given(r, n, 2, 3)[rank] for r in ranks])
        )
        assert torch.equal(
            found["all-to-all of a transposed tensor"],
            torch.stack([given(r, 3, 2, n).transpose(0, 2)[rank] for r in ranks]),
        )
        assert torch.equal(
            found["gather tokens"], torch.cat([given(r, 2, 2, 3) for r in ranks], dim=1)
        )
        assert torch.equal(found["reduce tokens"], tokens[:, 2 * rank : 2 * rank + 2])


def messages(mesh: Mesh) -> list[torch.Tensor]:
    """Two to every other rank and two from each, all started before the first is waited for: those
    of a pair arrive in the order they were sent.
    """
    others = [rank for rank in range(mesh.tp.size) if rank != mesh.tp.rank]
    sends = [
        start_send(given(10 * mesh.rank + other + 100 * i, 4), mesh.tp, other)
        for i in range(2)
        for other in others
    ]
    receives = [start_receive(torch.empty(4), mesh.tp, other) for i in range(2) for other in others]
    received = [pending.wait() for pending in receives]
    for pending in sends:
        pending.wait()
    return received


@pytest.mark.parametrize("n", [2, 3])
def test_messages_arrive_in_their_order(n):
    for rank, received in enumerate(run_ranks(n, messages, tp=n)):
        expected = [
            given(10 * other + rank + 100 * i, 4)
            for i in range(2)
            for other in range(n)
            if other != rank
        ]
        assert len(received) == 2 * (n - 1) and all(map(torch.equal, received, expected))


def message_over_the_other_axis(mesh: Mesh) -> list[float]:
    """`to` and `source` are places on the axis, not ranks of the world."""
    if mesh.pp.rank == 0:
        start_send(torch.tensor([float(mesh.rank)]), mesh.pp, 1).wait()
        return []
    return start_receive(torch.empty(1), mesh.pp, 0).wait().tolist()


def test_messages_go_to_places_on_the_axis():
    assert run_ranks(4, message_over_the_other_axis, tp=2, pp=2) == [[], [], [0.0], [1.0]]


def memory_of_what_is_kept(mesh: Mesh) -> tuple[int, int]:
    kept = start_reduce_tokens(torch.ones(2, 6, 4), mesh.tp)()
    return kept.numel() * kept.element_size(), kept.untyped_storage().nbytes()


def test_a_rank_keeps_its_tokens_and_not_the_memory_of_all():
    assert run_ranks(2, memory_of_what_is_kept, tp=2) == [(96, 96)] * 2


# --- differentiable ---


def through(mesh: Mesh, name: str, batch: int) -> dict[str, torch.Tensor]:
    """y = f(x) and the gradient of sum(w y), with x and w different on each rank."""
    length = 2 if name == "gather_tokens" else 2 * mesh.tp.size
    x = given(mesh.rank, batch, length, 3).requires_grad_()
    y = getattr(comm, name)(x, mesh.tp)
    (y * given(100 + mesh.rank, *y.shape)).sum().backward()
    return {"x": x.detach(), "y": y.detach(), "grad": x.grad}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["copy_to", "reduce_from", "gather_tokens", "reduce_tokens"])
def test_differentiable_forms_and_their_gradients(n, batch, name):
    """The first two are a conjugate pair around a region whose outside is the same on all ranks;
    the last two are each other's transpose.

    A batch of one is a case of its own: its tokens already lie in the order of the ranks, and what
    copies elsewhere is a view there.
    """
    ranks = range(n)
    results = run_ranks(n, through, name, batch, tp=n)
    x, grad = [r["x"] for r in results], [r["grad"] for r in results]
    w = [given(100 + r, *results[r]["y"].shape) for r in ranks]
    cut = [slice(2 * r, 2 * r + 2) for r in ranks]
    values, gradients = {
        "copy_to": (x, [sum(w)] * n),
        "reduce_from": ([sum(x)] * n, w),
        "gather_tokens": ([torch.cat(x, dim=1)] * n, [sum(w)[:, cut[r]] for r in ranks]),
        "reduce_tokens": ([sum(x)[:, cut[r]] for r in ranks], [torch.cat(w, dim=1)] * n),
    }[name]
    assert all(torch.equal(results[r]["y"], values[r]) for r in ranks)
    assert all(torch.equal(grad[r], gradients[r]) for r in ranks)
    assert all(torch.equal(x[r], given(r, *x[r].shape)) for r in ranks), "the input was overwritten"


@pytest.mark.parametrize("name", ["copy_to", "reduce_from", "gather_tokens", "reduce_tokens"])
def test_over_an_axis_of_one_nothing_happens(name):
    """Whatever the other axes are."""
    for rank, found in enumerate(run_ranks(2, through, name, 2, pp=2)):
        assert torch.equal(found["y"], found["x"]) and torch.equal(
            found["grad"], given(100 + rank, *found["y"].shape)
        )


@pytest.mark.parametrize("name", ["copy_to", "reduce_from", "gather_tokens", "reduce_tokens"])
def test_at_size_one_a_differentiable_form_gives_its_input_back(name):
    x = torch.ones(1, 2, 3, requires_grad=True)
    assert getattr(comm, name)(x, Mesh.plan(1, 0).tp) is x


def test_at_size_one_every_other_form_does_too():
    axis, x = Mesh.plan(1, 0).tp, torch.ones(1, 2, 3)
    for start in (start_all_reduce, start_reduce_scatter, start_all_gather):
        assert start(x, axis).wait() is x
    assert (
        all_reduce(x, axis) is x and all_to_all(x, axis) is x and torch.equal(own_slice(x, axis), x)
    )
    assert start_gather_tokens(x, axis)() is x and start_reduce_tokens(x, axis)() is x


def gradient_of_a_shared_output(mesh: Mesh, name: str) -> torch.Tensor:
    """Both branches of a residual get one gradient tensor: what is summed over ranks must be a copy
    of it.
    """
    x = torch.ones(1, 2, 3, requires_grad=True)
    branch, skip = (
        x.repeat(1, 2, 1) if name == twice else x for twice in ("reduce_tokens", "gather_tokens")
    )
    total = (
        getattr(comm, name)(branch, mesh.tp) + skip
    )  # backward takes the branch first: it came last
    # The product makes the gradient one in memory; that of a sum alone is a number.
    (total * torch.ones_like(total)).sum().backward()
    return x.grad


@pytest.mark.parametrize(
    ("name", "branch"),
    [("copy_to", 2), ("reduce_from", 1), ("gather_tokens", 2), ("reduce_tokens", 2)],
)
def test_the_gradient_of_a_residual_is_left_alone(name, branch):
    skip = 2 if name == "gather_tokens" else 1
    for gradient in run_ranks(2, gradient_of_a_shared_output, name, tp=2):
        assert torch.equal(gradient, torch.full((1, 2, 3), float(branch + skip)))


# --- failures ---


OPERATIONS: dict[str, Callable[[Axis], object]] = {
    "all-reduce": lambda axis: all_reduce(torch.zeros(2), axis),
    "reduce-scatter": lambda axis: start_reduce_scatter(torch.zeros(4), axis).wait(),
    "all-gather": lambda axis: start_all_gather(torch.zeros(4), axis).wait(),
    "all-to-all": lambda axis: all_to_all(torch.zeros(2), axis),
    "receive from rank {peer}": lambda axis: start_receive(torch.zeros(2), axis, 1).wait(),
    "send to rank {peer}": lambda axis: start_send(torch.zeros(2), axis, 1).wait(),
}


def alone(mesh: Mesh) -> list[str]:
    """Every operation over dp at once on its first rank alone, each in a group of its own that
    waits 4 seconds; what the errors say.
    """

    def failure_of(operation, group) -> str:
        with pytest.raises(CommunicationError) as failure:
            operation(replace(mesh.dp, group=group))
        return str(failure.value)

    groups = [
        dist.new_group(
            list(mesh.dp.ranks), timeout=timedelta(seconds=4), use_local_synchronization=True
        )
        for _ in OPERATIONS
    ]
    said = []
    if mesh.dp.rank == 0:
        with ThreadPoolExecutor(len(groups)) as threads:
            said = list(threads.map(failure_of, OPERATIONS.values(), groups))
    all_reduce(torch.zeros(1), mesh.world)  # the others stay until here
    return said


def test_a_rank_that_does_not_answer_is_an_error_that_names_rank_operation_and_ranks():
    """Ranks of the world, not places on the axis: rank 1 stands in a line with rank 3."""
    said = run_ranks(4, alone, tp=2)
    assert said[2:] == [[], []]
    for rank in (0, 1):
        for operation, message in zip(OPERATIONS, said[rank], strict=True):
            peer = rank + 2
            what = f"{operation.format(peer=peer)} over dp (ranks {rank}, {peer})"
            start = f"rank {rank}: {what} failed: "
            assert message.startswith(start) and len(message) > len(start), message
            assert "\n" not in message


def bereaved(mesh: Mesh, said: Path) -> None:
    if mesh.rank == 1:
        time.sleep(0.2)
        os._exit(9)
    with pytest.raises(CommunicationError) as failure:
        all_reduce(torch.zeros(2), mesh.tp)
    said.write_text(str(failure.value))


def test_a_rank_that_dies_is_an_error_at_once(tmp_path):
    """Long before the 60 seconds that a collective may take here."""
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(2, bereaved, tmp_path / "said", tp=2)
    assert (
        (tmp_path / "said")
        .read_text()
        .startswith("rank 0: all-reduce over tp (ranks 0, 1) failed: ")
    )
    assert time.monotonic() - start < 30


def test_an_error_is_one_line_of_bearable_length(monkeypatch):
    """Of many ranks the first sixteen are named; of what the transport says its first 300 letters,
    without line breaks.
    """

    def fail(*args, **kwargs):
        raise RuntimeError("timed out\n   after\na while " + "and more " * 100)

    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(CommunicationError) as failure:
        all_reduce(torch.zeros(1), Axis("dp", 20, 3, tuple(range(0, 40, 2))))
    ranks = ", ".join(str(rank) for rank in range(0, 32, 2))
    start, _, said = str(failure.value).partition("failed: ")
    assert start == f"rank 6: all-reduce over dp (ranks {ranks}, ...) "
    assert (
        said.startswith("timed out after a while and more")
        and len(said) == 300
        and isinstance(failure.value.__cause__, RuntimeError)
    )
