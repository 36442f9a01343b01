"""The mesh: ranks stand where Megatron puts them, at any scale, and connected axes reduce over
their own ranks.
"""

import itertools
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch

from trivium.comm import all_reduce
from trivium.mesh import Mesh
from trivium.testing import run_ranks

# (world, tp, cp, ep, pp); data parallel is what is left.
SIZES = [
    (world, tp, cp, ep, pp)
    for world in (1, 2, 8, 16, 24, 48)
    for tp, cp, ep, pp in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 4))
    if world % (tp * cp * pp) == 0 and (world // (tp * pp)) % ep == 0
]
AXIS_NAMES = (
    "world",
    "tp",
    "cp",
    "dp",
    "pp",
    "etp",
    "ep",
    "expert_dp",
    "dp_cp",
    "shards",
    "copies",
    "expert_shards",
    "expert_copies",
    "model",
    "embedding",
    "kv",
)
PARTITIONING = [
    name for name in AXIS_NAMES if name != "embedding"
]  # the embedding axis leaves out the stages in between


def lines(world: int, axis: str, **sizes: int) -> set[tuple[int, ...]]:
    return {getattr(Mesh.plan(world, rank, **sizes), axis).ranks for rank in range(world)}


@pytest.fixture(scope="module")
def rank_generator():
    """Megatron's own arithmetic; its import prints warnings about kernels that are missing."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return pytest.importorskip("megatron.core.parallel_state").RankGenerator


def test_there_are_many_sizes_to_compare():
    assert len(SIZES) > 80
    assert any(min(tp, cp, ep, pp) > 1 for _, tp, cp, ep, pp in SIZES)


def test_every_axis_is_megatrons(rank_generator):
    for world, tp, cp, ep, pp in SIZES:
        dense = rank_generator(
            tp=tp, ep=1, dp=world // (tp * cp * pp), pp=pp, cp=cp, order="tp-cp-ep-dp-pp"
        )
        expert = rank_generator(
            tp=tp, ep=ep, dp=world // (tp * ep * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp"
        )
        pairs = [
            ("tp", dense, "tp"),
            ("cp", dense, "cp"),
            ("dp", dense, "dp"),
            ("pp", dense, "pp"),
            ("dp_cp", dense, "dp-cp"),
        ]
        pairs += [("model", dense, "tp-pp"), ("ep", expert, "ep"), ("expert_dp", expert, "dp")]
        for ours, generator, theirs in pairs:
            expected = {tuple(group) for group in generator.get_ranks(theirs)}
            assert lines(world, ours, tp=tp, cp=cp, ep=ep, pp=pp) == expected, (
                world,
                tp,
                cp,
                ep,
                pp,
                ours,
            )


def test_the_expert_grid_with_a_tensor_size_of_its_own_is_megatrons(rank_generator):
    """Any etp x ep x expert_dp that fills the ranks of a stage, whatever tp is."""
    tried = 0
    for world, tp, cp, pp in ((8, 2, 1, 1), (16, 2, 2, 2), (24, 1, 1, 2), (24, 2, 3, 1)):
        for etp, ep in itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 6)):
            stage = world // pp
            if stage % (etp * ep):
                continue
            tried += 1
            theirs = rank_generator(
                tp=etp, ep=ep, dp=stage // (etp * ep), pp=pp, cp=1, order="tp-cp-ep-dp-pp"
            )
            sizes = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp}
            for ours, name in (("etp", "tp"), ("ep", "ep"), ("expert_dp", "dp"), ("pp", "pp")):
                expected = {tuple(group) for group in theirs.get_ranks(name)}
                assert lines(world, ours, **sizes) == expected, (sizes, ours)
    assert tried > 30


def test_expert_grid_worked_by_hand():
    """8 ranks, tp 2 and dp 4 for dense weights; experts whole (etp 1), over 4 ranks, 2 copies."""
    mesh = Mesh.plan(8, 5, tp=2, ep=4, etp=1)
    assert (mesh.tp.ranks, mesh.dp.ranks) == ((4, 5), (1, 3, 5, 7))
    assert (mesh.etp.ranks, mesh.ep.ranks, mesh.expert_dp.ranks) == ((5,), (4, 5, 6, 7), (1, 5))


def test_expert_state_has_as_many_instances_as_dense_state():
    """4 copies of a dense weight in 2 instances of 2 shards; 4 copies of an expert likewise."""
    mesh = Mesh.plan(8, 5, tp=2, shards=2, ep=2, etp=1)
    assert (mesh.shards.size, mesh.copies.size) == (2, 2)
    assert (mesh.expert_shards.ranks, mesh.expert_copies.ranks) == ((5, 7), (1, 5))
    mesh = Mesh.plan(8, 5, tp=2, ep=2, etp=1)
    assert (mesh.expert_shards.ranks, mesh.expert_copies.ranks) == ((5,), (1, 3, 5, 7))


def test_4096_ranks_worked_by_hand():
    """tp innermost, then cp, dp and pp: rank = tp + 8 (cp + 2 (dp + 32 pp)), experts over 16 of the
    64 in cp x dp.
    """
    mesh = Mesh.plan(4096, 1 + 8 * (1 + 2 * (5 + 32 * 3)), tp=8, cp=2, ep=16, pp=8)
    assert (mesh.tp.rank, mesh.cp.rank, mesh.dp.rank, mesh.pp.rank) == (1, 1, 5, 3)
    assert (mesh.ep.rank, mesh.expert_dp.rank, mesh.dp_cp.rank) == (11, 0, 11)
    assert mesh.pp.ranks == tuple(89 + 512 * stage for stage in range(8))
    assert mesh.embedding.ranks == (mesh.rank,)


LARGE = [
    {"tp": 8, "cp": 2, "ep": 16, "pp": 8},
    {"tp": 8, "cp": 2, "ep": 4, "pp": 8, "shards": 64, "kv_copies": 4},
    {"tp": 8, "cp": 2, "pp": 8, "shards": 16, "kv_copies": 8},
    {"tp": 4, "cp": 8, "pp": 4, "shards": 4, "kv_copies": 2},
    {"cp": 4, "pp": 32, "shards": 2},
    {"tp": 8, "cp": 2, "ep": 32, "etp": 2, "pp": 8, "shards": 16},
]


@pytest.fixture(scope="module", params=LARGE, ids=str)
def large(request) -> tuple[dict[str, int], list[Mesh]]:
    """Sizes, and the mesh of each of 4,096 ranks."""
    return request.param, [Mesh.plan(4096, rank, **request.param) for rank in range(4096)]


def test_at_4096_ranks_every_axis_partitions_the_world(large):
    """And all ranks of a group have the same group in mind, each at its own place in it."""
    members: dict[str, dict[tuple[int, ...], list[int]]] = {name: {} for name in AXIS_NAMES}
    for rank, mesh in enumerate(large[1]):
        for axis in mesh.axes():
            assert axis.ranks[axis.rank] == rank and axis.size == len(axis.ranks)
            members[axis.name].setdefault(axis.ranks, []).append(rank)
    for name in PARTITIONING:
        assert all(sorted(ranks) == held for ranks, held in members[name].items()), name
        assert sorted(rank for ranks in members[name] for rank in ranks) == list(range(4096)), name


def test_at_4096_ranks_each_copy_of_a_parameter_is_one_shard_in_one_block(large):
    """shards x copies is dp x cp: each block of shards holds the whole state, and a shard lies on
    one rank of each block.
    """
    sizes, meshes = large
    for mesh in meshes:
        assert (
            mesh.shards.size == sizes.get("shards", 1)
            and mesh.shards.size * mesh.copies.size == mesh.dp_cp.size
        )
        assert {rank for copy in mesh.copies.ranks for rank in meshes[copy].shards.ranks} == set(
            mesh.dp_cp.ranks
        )
        assert set(mesh.shards.ranks) & set(mesh.copies.ranks) == {mesh.rank}
        assert all(meshes[copy].shards.rank == mesh.shards.rank for copy in mesh.copies.ranks), (
            "copies of different shards"
        )
        assert mesh.dp_cp.rank == mesh.copies.rank * mesh.shards.size + mesh.shards.rank, (
            "a block is of neighbours: one node, where it fits"
        )


def test_at_4096_ranks_neighbours_of_tp_share_a_key_value_head(large):
    """Head h of the K = tp / copies lies on ranks h x copies and on of tp, and nowhere else."""
    copies = large[0].get("kv_copies", 1)
    for rank, mesh in enumerate(large[1]):
        head = mesh.tp.rank // copies
        assert (
            mesh.kv.ranks == mesh.tp.ranks[head * copies : (head + 1) * copies]
            and mesh.kv.ranks[mesh.kv.rank] == rank
        )


def test_without_sharding_every_rank_is_a_copy_and_with_one_instance_none_is():
    mesh = Mesh.plan(16, 5, tp=2, cp=2)
    assert (mesh.shards.ranks, mesh.copies.ranks, mesh.kv.ranks) == ((5,), mesh.dp_cp.ranks, (5,))
    mesh = Mesh.plan(16, 5, tp=2, cp=2, shards=8, kv_copies=2)
    assert (mesh.shards.ranks, mesh.copies.ranks, mesh.kv.ranks) == (mesh.dp_cp.ranks, (5,), (4, 5))


def test_embedding_axis_joins_first_and_last_stage_only():
    meshes = [Mesh.plan(8, rank, tp=2, pp=4) for rank in range(8)]
    assert [mesh.embedding.ranks for mesh in meshes] == [
        (0, 6),
        (1, 7),
        (2,),
        (3,),
        (4,),
        (5,),
        (0, 6),
        (1, 7),
    ]
    assert [mesh.embedding.rank for mesh in meshes] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert Mesh.plan(4, 2, tp=4).embedding.ranks == (2,)


@pytest.mark.parametrize(
    ("world", "rank", "sizes", "numbers"),
    [
        (6, 0, {"tp": 4}, ("6", "4")),
        (12, 0, {"tp": 2, "pp": 2, "cp": 2}, ("12", "2", "8")),
        (8, 0, {"tp": 2, "ep": 3}, ("3", "4")),
        (8, 0, {"tp": 2, "ep": 2, "etp": 3}, ("3", "2", "6", "8")),
        (16, 0, {"tp": 2, "shards": 4, "ep": 8}, ("2", "1")),
        (8, 0, {"tp": 2, "cp": 2, "shards": 3}, ("3", "2", "4")),
        (8, 0, {"tp": 4, "kv_copies": 3}, ("3", "4")),
        (4, 4, {}, ("4", "4")),
        (4, -1, {}, ("-1", "4")),
    ],
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
    [
        (2, {"tp": 2}),
        (2, {"pp": 2}),
        (4, {"tp": 2, "cp": 2, "ep": 2}),
        (4, {"cp": 2, "pp": 2}),
        (4, {"ep": 4}),
        (4, {"tp": 2, "ep": 2, "etp": 1}),
        (4, {"tp": 2, "ep": 2, "etp": 1, "shards": 2}),
        (4, {"shards": 2}),
        (4, {"cp": 2, "shards": 4}),
        (4, {"tp": 4, "kv_copies": 2}),
    ],
    ids=str,
)
def test_connected_axes_sum_over_their_own_ranks(n, sizes):
    """Rank r gives 2^r, so that a sum tells which ranks took part."""
    for found in run_ranks(n, sums, **sizes):
        assert [name for name, _, _ in found] == list(AXIS_NAMES)
        assert all(total == expected for _, total, expected in found), found


def group_sharing(mesh: Mesh) -> tuple[bool, bool]:
    return mesh.dp.group is mesh.dp_cp.group is mesh.copies.group, all(
        axis.group is not None for axis in mesh.axes() if axis.size > 1
    )


def test_axes_of_the_same_ranks_share_a_group():
    assert run_ranks(4, group_sharing, tp=2) == [(True, True)] * 4


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2, "shards": 4}, {"shards": 2}], ids=str)
def test_without_expert_parallelism_experts_need_no_group_of_their_own(sizes):
    """Each expert axis is the dense axis of the same ranks."""
    for rank in range(8):
        mesh = Mesh.plan(8, rank, **sizes)
        assert mesh.etp.ranks == mesh.tp.ranks and mesh.ep.size == 1
        assert mesh.expert_dp.ranks == mesh.dp_cp.ranks
        assert mesh.expert_shards.ranks == mesh.shards.ranks
        assert mesh.expert_copies.ranks == mesh.copies.ranks
