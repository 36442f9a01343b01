"""Reductions start in one order on all ranks, whatever gradients a rank leaves out."""

from itertools import product

import pytest
import torch

from trivium import comm
from trivium.config import OptimizerConfig
from trivium.gradients import use
from trivium.layout import Layout, ReductionGroup
from trivium.mesh import Axis, Mesh
from trivium.ops import Ops
from trivium.optim.buckets import Bucket, Reduction, make_buckets, reductions_over
from trivium.optim.optimizer import Optimizer
from trivium.optim.order import BackwardPasses, ReductionOrder
from trivium.rng import Init, new_parameter
from trivium.role import Role
from trivium.testing import run_ranks

CPU, ONE = torch.device("cpu"), Axis("tp")
NAMES = "abcd"


def parameter(name: str, role: Role = Role.MATRIX, uses: int = 1) -> torch.nn.Parameter:
    layout = Layout.whole(name, (5, 4), ONE, role=role)
    return new_parameter(layout if uses == 1 else layout.tied(ONE, uses), Init(1, 0.5))


def buckets_of(
    parameters: list[torch.nn.Parameter], reduction: Reduction, passes: BackwardPasses | None = None
) -> list[Bucket]:
    """One parameter in each bucket."""
    reductions = {ReductionGroup.DENSE: reduction}
    return make_buckets(parameters, torch.float32, CPU, reductions, 1, passes)


class Spied:
    """A bucket that notes when it is reduced."""

    def __init__(self, name: str, seen: list[str]):
        self.name, self.seen, self.ready = name, seen, 0

    def is_ready(self) -> bool:
        return self.ready > 0

    def start_reducing(self) -> None:
        self.ready -= 1
        self.seen.append(self.name)

    def settle(self) -> None:
        self.seen.append(f"settled {self.name}")


def test_a_bucket_that_is_ready_waits_for_its_turn():
    seen: list[str] = []
    c, b, a = buckets = [Spied(name, seen) for name in "cba"]
    order = ReductionOrder(buckets, once=True)
    order.begin(2)
    for bucket in (a, c):
        bucket.ready = 1
        order.advance()
    assert seen == ["c"]
    b.ready = 1
    order.advance()
    assert seen == ["c", "b", "settled c", "a", "settled b"]


def test_what_is_left_at_the_end_goes_in_order_and_the_next_update_starts_anew():
    seen: list[str] = []
    buckets = [Spied(name, seen) for name in "ba"]
    order = ReductionOrder(buckets, once=False)
    for micro_batches in (2, 1):
        order.begin(micro_batches)
        buckets[1].ready = 1
        order.advance()
        order.finish()
    assert [name for name in seen if len(name) == 1] == list("baba" + "ba")


def test_a_backward_pass_completes_the_head_first_and_the_embedding_last():
    """Whatever order they are registered in; of two tied copies, the last stage's is a head."""
    head, words, layer = parameter("h", Role.HEAD), parameter("w"), parameter("l")
    twin = new_parameter(
        Layout.whole("t", (5, 4), ONE).tied(Axis("embedding", 2, 1, (0, 1)), 1), Init(1, 0.5)
    )
    buckets = buckets_of([head, twin, words, layer], Reduction())
    order = [str(bucket)[10] for bucket in buckets[0]._order.buckets]
    assert order in (list("htlw"), list("thlw"))


def test_chunks_take_turns_as_the_plan_says():
    """Two chunks of two parameters, and a weight with a use in each: complete by every second."""
    tied, *rest = parameter("t", uses=2), *(parameter(name) for name in NAMES)
    chunks = [[tied, *rest[:2]], [*rest[2:], tied]]
    passes = BackwardPasses(chunks, lambda micro_batches: [1] * micro_batches + [0] * micro_batches)
    buckets = buckets_of([tied, *rest], Reduction(keep_gradients=False), passes)
    turns = passes.turns(buckets[0]._order.buckets, 2)
    assert "".join(str(bucket)[10] for bucket in turns) == "dc" + "dct" + "ba" + "bat"


# --- on two ranks ---


def skipped(rank: int, micro_batch: int, name: str, which: str) -> bool:
    """Whether a rank leaves a parameter out of a micro-batch."""
    if which == "one micro-batch of rank 1":
        return name == "c" and rank == 1 and micro_batch == 0
    if which == "all of rank 1":
        return name == "c" and rank == 1
    if which == "all of both":
        return name == "c"
    assert which == "other ones"
    return name == NAMES[(rank + 2 * micro_batch) % 4]


WHICH = ("one micro-batch of rank 1", "all of rank 1", "all of both", "other ones")


def backward(parameters: list[torch.nn.Parameter], rank: int, micro_batch: int, which: str) -> None:
    """Gradients (rank + 1) 10^micro_batch in every element, last parameter first."""
    gradient = (rank + 1) * 10.0**micro_batch
    total = torch.zeros(())
    for name, p in zip(NAMES, parameters, strict=True):
        if not skipped(rank, micro_batch, name, which):
            # A chain, so that the backward pass goes through the parameters in reverse.
            total = total * 1.0 + (use(p) * gradient).sum()
    total.backward()


def reduced(mesh: Mesh, which: str, overlap: bool, keeps: bool) -> tuple[list[list[float]], list]:
    """Mean gradient of each parameter's shard in two updates, and the order of the reductions."""
    parameters = [parameter(name) for name in NAMES]
    reductions = reductions_over(mesh, Reduction(overlap=overlap, keep_gradients=keeps))
    buckets = make_buckets(parameters, torch.float32, CPU, reductions, 1)
    optimizer = Optimizer(buckets, OptimizerConfig(), Ops(), CPU)
    honest, started = Bucket.start_reducing, []
    Bucket.start_reducing = lambda bucket: (started.append(str(bucket)[10]), honest(bucket))[1]
    found = []
    try:
        for update in (which, "one micro-batch of rank 1"):
            optimizer.begin(2)
            for micro_batch in range(2):
                backward(parameters, mesh.rank, micro_batch, update)
            optimizer.reduce()
            found.append([total_of(bucket, mesh) for bucket in buckets])
    finally:
        Bucket.start_reducing = honest
    return found, started


def total_of(bucket: Bucket, mesh: Mesh) -> float:
    return comm.all_reduce(bucket.gradients.sum(), mesh.shards).item() / 20


def expected(which: str) -> list[float]:
    sums = dict.fromkeys(NAMES, 0.0)
    for rank, micro_batch, name in product(range(2), range(2), NAMES):
        if not skipped(rank, micro_batch, name, which):
            sums[name] += (rank + 1) * 10.0**micro_batch
    return list(sums.values())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])
@pytest.mark.parametrize("keeps", [True, False], ids=["zero1", "zero2"])
def test_a_gradient_that_does_not_come_is_zero_on_any_rank(shards, overlap, keeps):
    """Whole numbers: exact. An update after it has nothing of it."""
    for which in WHICH:
        ranks = run_ranks(2, reduced, which, overlap, keeps, shards=shards)
        for found, started in ranks:
            assert found == [expected(which), expected("one micro-batch of rank 1")], which
            # Of one shard that keeps its gradients nothing is reduced over shards.
            rounds = 2 * (2 if not keeps else shards - 1)
            assert started == list("dcba") * rounds, which
