"""Parameters of experts: they differ by ep rank and are reduced over expert_dp alone.

Toy weights on four ranks against one process that holds them all: gradients, norm, update.
"""

import pytest
import torch
from parity.harness import Held, assemble, held

from trivium import comm
from trivium.config import OptimizerConfig
from trivium.gradients import use
from trivium.layout import Layout
from trivium.mesh import Mesh
from trivium.ops import Ops
from trivium.optim.buckets import Reduction, make_buckets, reductions_over
from trivium.optim.optimizer import Optimizer
from trivium.optim.reduce import squared_norm
from trivium.rng import Init, new_parameter
from trivium.role import Role
from trivium.testing import run_ranks

CPU = torch.device("cpu")
EXPERTS, MICRO_BATCHES = 4, 4
MESHES = [
    {"ep": 2},
    {"ep": 4},
    {"tp": 2, "ep": 2, "etp": 1},
    {"tp": 2, "ep": 2},
    {"tp": 2, "ep": 1, "etp": 4},
    {"cp": 2, "ep": 2},
]


def gradient(name: str, shape: tuple[int, ...], micro_batch: int) -> torch.Tensor:
    """Small whole numbers, so that sums over micro-batches and ranks are exact."""
    seed = sum(map(ord, name)) * 1000 + micro_batch
    return torch.randint(-20, 20, shape, generator=torch.Generator().manual_seed(seed)).float()


def parameters(mesh: Mesh) -> list[torch.nn.Parameter]:
    """A dense matrix and norm, and the matrix and norm of each expert of this rank."""
    axes = [("dense", mesh.tp, False)]
    local = EXPERTS // mesh.ep.size
    first = mesh.ep.rank * local
    axes += [(f"experts.{i}", mesh.etp, True) for i in range(first, first + local)]
    found = []
    for name, axis, expert in axes:
        matrix = Layout.rows_cut({f"{name}.weight": 8}, (9,), axis)
        norm = Layout.whole(f"{name}.norm", (7,), axis, role=Role.NORM)
        for layout, init in ((matrix, Init(1, 0.5)), (norm, Init(1, fill=1.0))):
            found.append(new_parameter(layout.of_expert() if expert else layout, init))
    return found


def own_micro_batches(mesh: Mesh, expert: bool) -> list[int]:
    """Dense weights see this rank's samples; an expert those that its ep ranks send it."""
    axis = mesh.expert_dp if expert else mesh.dp_cp
    count = MICRO_BATCHES // axis.size
    return list(range(axis.rank * count, (axis.rank + 1) * count))


def backward(mesh: Mesh, params: list[torch.nn.Parameter]) -> None:
    total = torch.zeros(())
    for p in params:
        (part,) = p.param_layout.parts
        box = tuple(slice(*interval) for interval in part.box)
        for micro_batch in own_micro_batches(mesh, part.name.startswith("experts")):
            whole = gradient(part.name, part.shape, micro_batch)
            total = total + (use(p) * whole[box]).sum()
    total.backward()


def trained(mesh: Mesh, keeps: bool) -> tuple[list[Held], list[Held], float]:
    """Gradients and updated masters as this rank holds them, and the squared norm of all."""
    params = parameters(mesh)
    reductions = reductions_over(mesh, Reduction(overlap=True, keep_gradients=keeps))
    buckets = make_buckets(params, torch.float32, CPU, reductions, 40)
    config = OptimizerConfig(weight_decay=0.3, adam_eps=1e-3)
    optimizer = Optimizer(buckets, config, Ops(), CPU)
    # More gradients than one pass gives: as many as there are micro-batches of an expert.
    optimizer.begin(MICRO_BATCHES)
    backward(mesh, params)
    optimizer.reduce()
    norm = comm.all_reduce(squared_norm(buckets, CPU, Ops()), mesh.world).item()
    gradients = held(optimizer, lambda shard: shard.pieces(shard.gradients.clone()))
    optimizer.update(0.1, torch.tensor(1 / 64), torch.tensor(False))
    return gradients, held(optimizer, lambda shard: shard.pieces(shard.masters)), norm


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("way", ["no_shard", "zero1", "zero2", "instances"])
def test_experts_over_ranks_are_those_of_one_process(sizes, way):
    copies = 4 // sizes.get("tp", 1)
    expert_copies = 4 // (sizes["ep"] * sizes.get("etp", sizes.get("tp", 1)))
    shards = {"no_shard": 1, "zero1": copies, "zero2": copies, "instances": copies // 2}[way]
    if shards == 0 or (shards > 1 and expert_copies % (copies // shards)):
        pytest.skip("not so many instances of an expert")
    gradients, masters, norm = trained(Mesh.plan(1, 0), True)
    ranks = run_ranks(4, trained, way != "zero2", shards=shards, **sizes)
    for k, alone in enumerate((gradients, masters)):
        found, expected = assemble([rank[k] for rank in ranks]), assemble([alone])
        assert found.keys() == expected.keys() and len(found) == 2 + 2 * EXPERTS
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    # fp32 sums of a few hundred squares of whole numbers, in another order.
    assert all(rank[2] == pytest.approx(norm, rel=1e-6) for rank in ranks)


def owned_boxes(mesh: Mesh) -> list[tuple]:
    """Return name, shape and box of every piece that this rank writes into a checkpoint."""
    buckets = make_buckets(parameters(mesh), torch.float32, CPU, reductions_over(mesh), 40)
    optimizer = Optimizer(buckets, OptimizerConfig(), Ops(), CPU)
    pieces = [*optimizer.weight_pieces(owned=True), *optimizer.moment_pieces(owned=True)]
    return [(piece.name, piece.shape, piece.box) for piece in pieces]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=str)
def test_the_ranks_write_every_element_once(sizes, shards):
    """Experts too, whose copies stand on other ranks than those of dense weights."""
    written: dict[str, torch.Tensor] = {}
    for boxes in run_ranks(4, owned_boxes, shards=shards, **sizes):
        for name, shape, box in boxes:
            times = written.setdefault(name, torch.zeros(shape))
            times[tuple(slice(*interval) for interval in box)] += 1
    assert len(written) == 3 * (2 + 2 * EXPERTS)  # weights, and AdamW's two moments
    for name, times in written.items():
        assert bool((times == 1).all()), name


def buckets_by_group(mesh: Mesh) -> list[set[bool]]:
    buckets = make_buckets(parameters(mesh), torch.float32, CPU, reductions_over(mesh), 10_000)
    return [{"experts" in layout.parts[0].name for layout in b.layouts} for b in buckets]


def test_experts_share_no_bucket_with_dense_weights():
    assert buckets_by_group(Mesh.plan(1, 0)) == [{False}, {True}]
