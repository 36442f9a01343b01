"""The mesh: ranks stand where Megatron puts them, at any scale, and connected axes reduce over their own ranks."""

import itertools
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
from ranks import run_ranks

from trivium.comm import all_reduce
from trivium.mesh import Mesh

# (world, tp, cp, ep, pp); data parallel is what is left.
SIZES = [
    (world, tp, cp, ep, pp)
    for world in (1, 2, 8, 16, 24, 48)
    for tp, cp, ep, pp in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 4))
    if world % (tp * cp * pp) == 0 and (world // (tp * pp)) % ep == 0
]
AXIS_NAMES = ("world", "tp", "cp", "dp", "pp", "ep", "expert_dp", "dp_cp", "model")


def lines(world: int, axis: str, **sizes: int) -> set[tuple[int, ...]]:
    return {getattr(Mesh.plan(world, rank, **sizes), axis).ranks for rank in range(world)}


@pytest.fixture(scope="module")
def rank_generator():
    """Megatron's own arithmetic; its import prints warnings about kernels that are not installed."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return pytest.importorskip("megatron.core.parallel_state").RankGenerator


def test_there_are_many_sizes_to_compare():
    assert len(SIZES) > 80
    assert any(min(tp, cp, ep, pp) > 1 for _, tp, cp, ep, pp in SIZES)


def test_every_axis_is_megatrons(rank_generator):
    for world, tp, cp, ep, pp in SIZES:
        dense = rank_generator(tp=tp, ep=1, dp=world // (tp * cp * pp), pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
        expert = rank_generator(tp=tp, ep=ep, dp=world // (tp * ep * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp")
        pairs = [("tp", dense, "tp"), ("cp", dense, "cp"), ("dp", dense, "dp"), ("pp", dense, "pp"), ("dp_cp", dense, "dp-cp")]
        pairs += [("model", dense, "tp-pp"), ("ep", expert, "ep"), ("expert_dp", expert, "dp")]
        for ours, generator, theirs in pairs:
            expected = {tuple(group) for group in generator.get_ranks(theirs)}
            assert lines(world, ours, tp=tp, cp=cp, ep=ep, pp=pp) == expected, (world, tp, cp, ep, pp, ours)


def test_4096_ranks_worked_by_hand():
    """tp innermost, then cp, dp and pp: rank = tp + 8 (cp + 2 (dp + 32 pp)), experts over 16 of the 64 in cp x dp."""
    mesh = Mesh.plan(4096, 1 + 8 * (1 + 2 * (5 + 32 * 3)), tp=8, cp=2, ep=16, pp=8)
    assert (mesh.tp.rank, mesh.cp.rank, mesh.dp.rank, mesh.pp.rank) == (1, 1, 5, 3)
    assert (mesh.ep.rank, mesh.expert_dp.rank, mesh.dp_cp.rank) == (11, 0, 11)
    assert mesh.pp.ranks == tuple(89 + 512 * stage for stage in range(8))
    assert mesh.embedding.ranks == (mesh.rank,)


def test_at_4096_ranks_every_axis_partitions_the_world():
    sizes = {"tp": 8, "cp": 2, "ep": 16, "pp": 8}
    members: dict[str, dict[tuple[int, ...], int]] = {name: {} for name in AXIS_NAMES}
    for rank in range(4096):
        mesh = Mesh.plan(4096, rank, **sizes)
        for name in AXIS_NAMES:
            axis = getattr(mesh, name)
            assert axis.ranks[axis.rank] == rank and axis.size == len(axis.ranks)
            if axis.rank == 0:
                members[name][axis.ranks] = axis.size
    for name, groups in members.items():
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(4096)), name


def test_embedding_axis_joins_first_and_last_stage_only():
    meshes = [Mesh.plan(8, rank, tp=2, pp=4) for rank in range(8)]
    assert [mesh.embedding.ranks for mesh in meshes] == [(0, 6), (1, 7), (2,), (3,), (4,), (5,), (0, 6), (1, 7)]
    assert [mesh.embedding.rank for mesh in meshes] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert Mesh.plan(4, 2, tp=4).embedding.ranks == (2,)


@pytest.mark.parametrize(
    ("world", "rank", "sizes", "numbers"),
    [(6, 0, {"tp": 4}, ("6", "4")), (8, 0, {"tp": 2, "ep": 3}, ("3", "4")), (4, 4, {}, ("4", "4")), (4, -1, {}, ("-1", "4"))],
)
def test_wrong_sizes_are_refused_with_both_numbers(world, rank, sizes, numbers):
    with pytest.raises(ValueError) as refusal:
        Mesh.plan(world, rank, **sizes)
    words = str(refusal.value).split()
    assert all(number in words for number in numbers), words


def test_one_process_needs_no_group():
    mesh = Mesh.plan(1, 0).connect("no such backend", 1.0)
    assert all(axis.group is None for axis in mesh.axes())
    assert not torch.distributed.is_initialized()
    mesh.close()


def sums(mesh: Mesh) -> list[tuple[str, float, int]]:
    found = []
    for axis in mesh.axes():
        total = all_reduce(torch.tensor(2.0**mesh.rank), axis).item()
        found.append((axis.name, total, sum(2**rank for rank in axis.ranks)))
    return found


@pytest.mark.parametrize(
    ("n", "sizes"),
    [(2, {"tp": 2}), (2, {"pp": 2}), (4, {"tp": 2, "cp": 2, "ep": 2}), (4, {"cp": 2, "pp": 2}), (4, {"ep": 4})],
    ids=str,
)
def test_connected_axes_sum_over_their_own_ranks(n, sizes):
    """Rank r gives 2^r, so that a sum tells which ranks took part."""
    for found in run_ranks(n, sums, **sizes):
        assert len(found) == 10
        assert all(total == expected for _, total, expected in found), found


def group_sharing(mesh: Mesh) -> tuple[bool, bool]:
    return mesh.dp.group is mesh.dp_cp.group, all(axis.group is not None for axis in mesh.axes() if axis.size > 1)


def test_axes_of_the_same_ranks_share_a_group():
    assert run_ranks(4, group_sharing, tp=2) == [(True, True)] * 4
