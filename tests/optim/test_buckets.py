"""Buckets over data parallel: whatever is cut, copied or overlapped, masters are those of one
process; and every use of a parameter counts.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from trivium import comm
from trivium.config import OptimizerConfig
from trivium.gradients import use
from trivium.layout import Layout, ReductionGroup, Rows, attach_layout, layout_of
from trivium.mesh import Axis, Mesh
from trivium.ops import Ops
from trivium.optim.buckets import Bucket, Reduction, make_buckets, reductions_over
from trivium.optim.groups import Group
from trivium.optim.optimizer import Optimizer
from trivium.optim.reduce import squared_norm
from trivium.rng import Init, new_parameter
from trivium.role import Role
from trivium.testing import run_ranks

CPU, ONE = torch.device("cpu"), Axis("tp")
# Of one bucket of 192 slots each but the last, and so shards of 2 and of 4 end inside of matrices,
# vectors and the padding behind them.
SHAPES = {
    "a.weight": (7, 5),
    "a.bias": (7,),
    "b.weight": (3, 33),
    "c.weight": (20, 11),
    "c.bias": (20,),
    "d.weight": (2, 2),
}
MICRO_BATCHES, UPDATES = 8, 3
ONE_PROCESS = {ReductionGroup.DENSE: Reduction()}


@dataclass(frozen=True)
class How:
    """How the data-parallel ranks share a run."""

    shards: int = 1
    keep_gradients: bool = True
    overlap: bool = False
    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    size: int = 60  # of a bucket

    def __str__(self) -> str:
        strategy = "zero1" if self.keep_gradients else "zero2"
        words = [f"shards{self.shards}", strategy, str(self.dtype)[6:], self.optimizer]
        return "-".join([*words, *["overlap"] * self.overlap])


def parameters() -> list[nn.Parameter]:
    found = []
    for name, shape in SHAPES.items():
        matrix = len(shape) == 2
        layout = Layout.whole(name, shape, ONE, role=Role.MATRIX if matrix else Role.BIAS)
        found.append(new_parameter(layout, Init(1, 0.5 if matrix else None, fill=0.2)))
    return found


def optimizer_over(mesh: Mesh, params: list[nn.Parameter], how: How) -> Optimizer:
    how_reduced = Reduction(overlap=how.overlap, keep_gradients=how.keep_gradients)
    reductions = reductions_over(mesh, how_reduced)
    config = OptimizerConfig(weight_decay=0.3, adam_eps=1e-3, optimizer=how.optimizer)
    return Optimizer(
        make_buckets(params, how.dtype, CPU, reductions, how.size),
        config,
        Ops(),
        CPU,
        overlap_gather=how.overlap,
    )


def backward(params: list[nn.Parameter], seed: int, whole: bool = True) -> None:
    """Gradients that depend on the weights.

    `whole`: small whole numbers, so that any sum over micro-batches and ranks is exact, in bf16
    too.
    """
    generator, total = torch.Generator().manual_seed(seed), 0
    for p in params:
        weight, noise = use(p), 10 * torch.randn(p.shape, generator=generator)
        gradient = noise + 16 * weight.detach().float()
        total = total + (weight * (gradient.round() if whole else gradient).to(p.dtype)).sum()
    total.backward()


def trained(
    mesh: Mesh, how: How, whole: bool = True
) -> tuple[list, list[torch.Tensor], list[float]]:
    """Some updates: the pieces of this rank's masters and moments, all working weights, and the
    squared norm of each update over all ranks.
    """
    params = parameters()
    optimizer, norms = optimizer_over(mesh, params, how), []
    own = MICRO_BATCHES // mesh.dp_cp.size
    for i in range(UPDATES):
        optimizer.begin(own)
        for micro_batch in range(own):
            backward(params, i * MICRO_BATCHES + own * mesh.dp_cp.rank + micro_batch, whole)
        optimizer.reduce()
        norms.append(
            comm.all_reduce(squared_norm(optimizer.buckets, CPU, Ops()), mesh.world).item()
        )
        optimizer.update(0.1 / (i + 1), torch.tensor(1 / 64), torch.tensor(i == 1))
    pieces = [
        (piece.name, piece.box, piece.tensor)
        for piece in (*optimizer.weight_pieces(), *optimizer.moment_pieces())
    ]
    return pieces, [use(p).detach() for p in params], norms


def assembled(ranks: list) -> dict[str, torch.Tensor]:
    """Whole masters and moments of the pieces of all ranks, which must agree where they overlap and
    leave nothing out.
    """
    whole: dict[str, torch.Tensor] = {}
    for pieces, *_ in ranks:
        for name, box, tensor in pieces:
            shape = next(shape for suffix, shape in SHAPES.items() if name.endswith(suffix))
            target = whole.setdefault(name, torch.full(shape, torch.nan))[
                tuple(slice(*bounds) for bounds in box)
            ]
            assert (target.isnan() | (target == tensor)).all(), f"{name}: copies differ"
            target.copy_(tensor)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


WAYS = [
    (2, How()),
    (2, How(shards=2)),
    (2, How(shards=2, keep_gradients=False)),
    (2, How(shards=2, dtype=torch.bfloat16)),
    (2, How(shards=2, keep_gradients=False, dtype=torch.bfloat16, overlap=True)),
    (4, How()),
    (4, How(keep_gradients=False)),
    (4, How(shards=4, overlap=True)),
    (4, How(shards=4, keep_gradients=False, overlap=True)),
    (4, How(shards=4, optimizer="sgd")),
    (4, How(shards=2)),
    (4, How(shards=2, overlap=True, dtype=torch.bfloat16)),
    (4, How(shards=2, keep_gradients=False)),
    (4, How(shards=2, keep_gradients=False, overlap=True, optimizer="sgd", dtype=torch.bfloat16)),
]


@pytest.mark.parametrize(("n", "how"), WAYS, ids=str)
def test_masters_moments_and_weights_are_those_of_one_process(n, how):
    """Gradients that sum exactly: bit for bit, over three updates of which the second is skipped,
    with weight decay on matrices alone.
    """
    alone = trained(Mesh.plan(1, 0), How(dtype=how.dtype, optimizer=how.optimizer))
    ranks = run_ranks(n, trained, how, shards=how.shards)
    expected, found = assembled([alone]), assembled(ranks)
    assert found.keys() == expected.keys() and len(found) == len(SHAPES) * (
        2 if how.optimizer == "sgd" else 3
    )
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for _, weights, norms in ranks:
        for name, weight, reference in zip(SHAPES, weights, alone[1], strict=True):
            assert torch.equal(weight, reference) and torch.equal(
                weight, expected[name].to(how.dtype)
            ), f"{name}: what is used is not the master"
        # fp32 sums of at most 385 squares in another order: sqrt(385) x 2^-24.
        assert norms == pytest.approx(alone[2], rel=1.2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "shards", "keep_gradients"),
    [(2, 2, True), (2, 2, False), (4, 2, True), (4, 2, False), (2, 1, True)],
)
def test_overlap_changes_no_bit(n, shards, keep_gradients, dtype):
    """Of gradients that do round."""
    on, off = (
        assembled(
            run_ranks(n, trained, How(shards, keep_gradients, overlap, dtype), False, shards=shards)
        )
        for overlap in (True, False)
    )
    assert all(torch.equal(on[name], off[name]) for name in on)


def started(mesh: Mesh, how: How) -> tuple[list[int], int]:
    """How many reductions have begun after the first micro-batch, the second, and all; and the
    number of buckets.
    """
    params = parameters()
    optimizer, seen, honest = optimizer_over(mesh, params, how), [], comm.start_reduce_scatter

    def start(tensor, axis):
        seen.append(tensor.numel())
        return honest(tensor, axis)

    comm.start_reduce_scatter = start
    try:
        optimizer.begin(2)
        counts = []
        for micro_batch in range(2):
            backward(params, micro_batch)
            counts.append(len(seen))
        optimizer.reduce()
    finally:
        comm.start_reduce_scatter = honest
    return [*counts, len(seen)], len(optimizer.buckets)


def test_a_bucket_is_reduced_when_its_last_gradient_is_there():
    """With overlap before backward ends, without it after; ZeRO-2 once for every micro-batch."""
    for overlap, keep_gradients, expected in (
        (True, True, (0, 1, 1)),
        (False, True, (0, 0, 1)),
        (False, False, (1, 2, 2)),
        (True, False, (1, 2, 2)),
    ):
        for counts, buckets in run_ranks(2, started, How(2, keep_gradients, overlap), shards=2):
            assert buckets > 2 and counts == [buckets * times for times in expected]


# --- uses ---


def used(times: int, micro_batches: int, uses: int = 1, keep_gradients: bool = True) -> Optimizer:
    """A weight used `times` times in each of the micro-batches that were announced, and then
    reduced.
    """
    layout = Layout.whole("words", (4, 3), ONE)
    weight = new_parameter(
        layout.tied(Axis("embedding"), uses) if uses > 1 else layout, Init(1, 0.5)
    )
    optimizer = optimizer_over(Mesh.plan(1, 0), [weight], How(keep_gradients=keep_gradients))
    optimizer.begin(micro_batches)
    for _ in range(2):
        sum(use(weight).sum() for _ in range(times)).backward() if times else None
    optimizer.reduce()
    return optimizer


@pytest.mark.parametrize("keep_gradients", [True, False])
def test_as_many_uses_as_the_layout_says_are_summed(keep_gradients):
    assert (
        used(1, 2, keep_gradients=keep_gradients).buckets[0].gradients[:12].tolist() == [2.0] * 12
    )
    assert (
        used(2, 2, uses=2, keep_gradients=keep_gradients).buckets[0].gradients[:12].tolist()
        == [4.0] * 12
    )


@pytest.mark.parametrize(("times", "uses"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("keep_gradients", [True, False])
def test_a_parameter_used_too_often_is_an_error(times, uses, keep_gradients):
    """Its bucket would be on its way while a gradient is still being added."""
    counts = f"gradient {2 * uses + 1} of {2 * uses}"
    message = f"bucket of words and 0 more: {counts}: a parameter was used more often"
    with pytest.raises(RuntimeError, match=message):
        used(times, 2, uses, keep_gradients)


@pytest.mark.parametrize(("times", "uses"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("keep_gradients", [True, False])
def test_a_use_that_does_not_come_adds_zeros(times, uses, keep_gradients):
    optimizer = used(times, 3, uses, keep_gradients)
    assert optimizer.buckets[0].gradients[:12].tolist() == [2.0 * times] * 12


def test_a_gradient_outside_of_an_update_is_an_error():
    (weight,) = [new_parameter(Layout.whole("words", (4, 3), ONE), Init(1, 0.5))]
    optimizer_over(Mesh.plan(1, 0), [weight], How())
    with pytest.raises(RuntimeError, match="gradient 1 of 0"):
        use(weight).sum().backward()


# --- memory ---


def bucket_of(rank: int, size: int, dtype: torch.dtype, **more) -> Bucket:
    """As rank `rank` of `size` shards makes it: nothing is communicated."""
    return Bucket(
        parameters(), dtype, CPU, Reduction(Axis("shards", size, rank, tuple(range(size))), **more)
    )


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor, and the bytes that its storage keeps."""
    return tensor.data_ptr(), tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fp32_masters_are_the_weights_and_bf16_masters_are_not(size):
    for rank in range(size):
        bucket = bucket_of(rank, size, torch.float32)
        assert (
            bucket.masters.data_ptr() == bucket.own_weights.data_ptr()
            and bucket.masters.untyped_storage().data_ptr() == bucket.weights.data_ptr()
        )
        bucket = bucket_of(rank, size, torch.bfloat16)
        assert (
            bucket.masters.dtype == torch.float32
            and bucket.weights.dtype == bucket.own_weights.dtype == torch.bfloat16
        )
        assert (
            bucket.masters.untyped_storage().data_ptr()
            != bucket.weights.untyped_storage().data_ptr()
        )
        assert memory(bucket.masters)[1] == 4 * bucket.size // size, (
            "the whole fp32 weights are kept"
        )
        assert torch.equal(bucket.own_weights, bucket.masters.bfloat16())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_zero2_keeps_the_gradients_of_its_shard_alone(size):
    for keep_gradients in (True, False):
        bucket = bucket_of(size - 1, size, torch.bfloat16, keep_gradients=keep_gradients)
        assert memory(bucket.gradients)[1] == 4 * bucket.size // (1 if keep_gradients else size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_views_of_flat_weights_in_slots_that_begin_aligned(dtype):
    params, before = parameters(), [p.detach().clone() for p in parameters()]
    bucket = Bucket(params, dtype, CPU, Reduction())
    bucket.weights.mul_(2)
    assert all(
        torch.equal(p, 2 * q.to(dtype)) and p.dtype == dtype
        for p, q in zip(params, before, strict=True)
    )
    assert all(
        start % 64 == 0 and stop - start == p.numel()
        for p, (start, stop) in zip(bucket.parameters, bucket.slots, strict=True)
    )
    inside = torch.zeros(bucket.size, dtype=torch.bool)
    for start, stop in bucket.slots:
        assert not inside[start:stop].any()
        inside[start:stop] = True
    assert bucket.weights[~inside].abs().sum() == 0


# --- weight decay ---


def decays(bucket: Bucket) -> torch.Tensor:
    """Which elements of a shard decay; its spans tile it."""
    found, end = torch.zeros(bucket.length, dtype=torch.bool), 0
    for span in bucket.spans:
        assert span.start == end
        found[span.start : span.stop], end = span.group is Group.DECAYED, span.stop
    assert end == bucket.length
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_boundary_of_decay_may_lie_inside_a_shard(size):
    """Matrices first: over all shards those before the boundary are all matrices and those behind
    it all vectors, and each shard knows its part.
    """
    buckets = [bucket_of(rank, size, torch.float32) for rank in range(size)]
    decayed = torch.cat([decays(bucket) for bucket in buckets])
    for p, (start, stop) in zip(buckets[0].parameters, buckets[0].slots, strict=True):
        assert (decayed[start:stop] == (p.dim() > 1)).all()
    assert sum(len(bucket.spans) == 2 for bucket in buckets) == 1, "chosen to hold both"


def shrunk(mesh: Mesh) -> tuple[list, list[torch.Tensor]]:
    """An update without gradients: what moves is decayed."""
    params = parameters()
    optimizer = optimizer_over(mesh, params, How(shards=2, size=10_000))
    optimizer.begin(1)
    sum((use(p) * 0).sum() for p in params).backward()
    optimizer.reduce()
    optimizer.update(0.5, torch.tensor(1.0), torch.tensor(False))
    return [p.detach() for p in params], [len(bucket.spans) == 2 for bucket in optimizer.buckets]


def test_weight_decay_is_that_of_matrices_on_every_shard():
    ranks = run_ranks(2, shrunk, shards=2)
    assert sorted(inside for _, inside in ranks) == [[False], [True]]
    for weights, _ in ranks:
        for p, q in zip(weights, parameters(), strict=True):
            assert torch.equal(p, q * (1 - 0.5 * 0.3) if q.dim() > 1 else q)


# --- which parameters share a bucket ---


def names_of(buckets: list[Bucket]) -> list[list[str]]:
    return [[layout_of(p).parts[0].name for p in bucket.parameters] for bucket in buckets]


def test_neighbours_share_a_bucket_up_to_its_size_and_none_is_in_two():
    params = parameters()
    for size, expected in (
        (1, [["a.weight"], ["a.bias"], ["b.weight"], ["c.weight"], ["c.bias"], ["d.weight"]]),
        (42, [["a.weight", "a.bias"], ["b.weight"], ["c.weight"], ["c.bias", "d.weight"]]),
        (43, [["a.weight", "b.weight", "a.bias"], ["c.weight"], ["c.bias", "d.weight"]]),
        (10_000, [["a.weight", "b.weight", "c.weight", "d.weight", "a.bias", "c.bias"]]),
    ):
        found = names_of(make_buckets([*params, params[0]], torch.float32, CPU, ONE_PROCESS, size))
        assert [sorted(names) for names in found] == [sorted(names) for names in expected]
        assert all(
            sorted(names, key=lambda name: len(SHAPES[name]) < 2) == names for names in found
        ), "matrices first"


def test_a_tied_weight_has_a_bucket_of_its_own():
    """Its gradients come twice, or are summed over both ends of the pipeline, unlike its
    neighbours'.
    """
    for twins, uses in ((Axis("embedding"), 2), (Axis("embedding", 2, 1, (0, 1)), 1)):
        params = parameters()
        attach_layout(params[2], layout_of(params[2]).tied(twins, uses))
        assert [
            sorted(names)
            for names in names_of(make_buckets(params, torch.float32, CPU, ONE_PROCESS, 10_000))
        ] == [
            ["a.bias", "a.weight"],
            ["b.weight"],
            ["c.bias", "c.weight", "d.weight"],
        ]


# --- what ranks of one model share ---


def on_both_ends(mesh: Mesh, keep_gradients: bool) -> tuple[torch.Tensor, float]:
    """A tied weight on the first and the last of two stages, two data-parallel copies of each: its
    master, and the norm of all gradients.
    """
    layout = Layout.whole("words", (5, 3), ONE).tied(
        mesh.embedding, uses=1 if mesh.pp.size > 1 else 2
    )
    weight = new_parameter(layout, Init(1, 0.5))
    optimizer = optimizer_over(
        mesh, [weight], How(shards=mesh.shards.size, keep_gradients=keep_gradients)
    )
    optimizer.begin(4 // mesh.dp.size)
    for micro_batch in range(mesh.dp.rank, 4, mesh.dp.size):
        for stage in range(2) if mesh.pp.size == 1 else [mesh.pp.rank]:
            generator = torch.Generator().manual_seed(10 * micro_batch + stage)
            (use(weight) * torch.randint(-20, 20, (5, 3), generator=generator)).sum().backward()
    optimizer.reduce()
    norm = comm.all_reduce(squared_norm(optimizer.buckets, CPU, Ops()), mesh.world)
    optimizer.update(0.1, torch.tensor(1.0), torch.tensor(False))
    return use(weight).detach(), norm.item()


@pytest.mark.parametrize("keep_gradients", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_twins_stay_the_same_and_count_once(shards, keep_gradients):
    alone, norm = on_both_ends(Mesh.plan(1, 0), True)
    for weight, found in run_ranks(4, on_both_ends, keep_gradients, pp=2, shards=shards):
        assert torch.equal(weight, alone) and found == pytest.approx(norm, rel=1e-6)


def partial_gradients(mesh: Mesh) -> tuple[dict[str, float], float]:
    """On rank r of tp all gradients are r + 1: of a norm that saw its tokens, of a norm that saw
    all, and of q and a shared k of a fused weight.
    """
    norm = new_parameter(Layout.whole("norm", (70,), mesh.tp, partial=True), Init(1, fill=1.0))
    bias = new_parameter(Layout.whole("bias", (7,), mesh.tp), Init(1))
    fused = new_parameter(
        Layout.rows_cut({"q": 16, "k": Rows(4, mesh.kv)}, (2,), mesh.tp), Init(1, 0.5)
    )
    params = [norm, bias, fused]
    optimizer = optimizer_over(mesh, params, How(shards=mesh.shards.size))
    optimizer.begin(1)
    sum(use(p).sum() for p in params).mul(mesh.tp.rank + 1).backward()
    optimizer.reduce()
    found = {
        piece.name: piece.tensor.mean().item()
        for bucket in optimizer.buckets
        for piece in bucket.pieces(bucket.gradients)
    }
    return found, comm.all_reduce(squared_norm(optimizer.buckets, CPU, Ops()), mesh.world).item()


def test_shares_of_a_gradient_are_summed_over_the_ranks_that_see_one_and_counted_once():
    """4 ranks of tp, 2 key-value heads: ranks 0 and 1 share the first, 2 and 3 the second."""
    ranks = run_ranks(4, partial_gradients, tp=4, kv_copies=2)
    for rank, (found, squared) in enumerate(ranks):
        assert found["norm"] == 10 and found["bias"] == rank + 1 and found["q"] == rank + 1
        assert found["k"] == (3 if rank < 2 else 7)
        bias, q, k = (
            7 * 1**2,
            8 * (1 + 4 + 9 + 16),
            4 * (3**2 + 7**2),
        )  # of the bias only the first rank counts: it is the same, where tp is right
        assert squared == pytest.approx(70 * 10**2 + bias + q + k, rel=1e-6)
