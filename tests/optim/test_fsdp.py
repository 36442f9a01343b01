"""ZeRO-3: parameters cut by fully_shard add up to those of one process, in every phase of an update
and in checkpoints.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity.harness import Held, assemble, held
from runs import LLAMA, SMALL, rows_of, train, write_data
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trivium.checkpoint.load import open_checkpoint
from trivium.checkpoint.save import save
from trivium.config import ConfigError, OptimizerConfig, flags, resolve
from trivium.layout import Layout, layout_of
from trivium.mesh import Axis, Mesh
from trivium.ops import Ops
from trivium.optim.buckets import Reduction
from trivium.optim.fully_sharded import ShardedParameter, cut_parameters
from trivium.optim.optimizer import Optimizer
from trivium.optim.reduce import squared_norm
from trivium.rng import Init, new_parameter
from trivium.role import Role
from trivium.testing import run_ranks
from trivium.train.build import build_optimizer, build_passes

CPU, ONE = torch.device("cpu"), Axis("tp")
VOCABULARY, WIDTH = 11, 6  # over 4 ranks 6 rows are 2, 2, 2 and none
ZERO3 = "--data-parallel-sharding-strategy optim_grads_params"
MESHES = pytest.mark.parametrize(
    ("ranks", "shards"), [(2, 2), (4, 4), (4, 2)], ids=["2", "4", "4-in-2-copies"]
)


class Unit(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.weight = new_parameter(
            Layout.whole(f"{index}.weight", (WIDTH, WIDTH), ONE), Init(1, 0.5)
        )
        scale = Layout.whole(f"{index}.scale", (WIDTH,), ONE, role=Role.NORM)
        self.scale = new_parameter(scale, Init(1, fill=1.0))
        self.dtypes, self.weights, self.bytes = [], [], []
        self.scales = True

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        self.dtypes.append((x.dtype, angles.dtype))
        self.weights.append(self.weight)
        self.bytes.append(self.weight.untyped_storage().nbytes())
        scaled = x * self.scale if self.scales else x
        return x + torch.tanh(F.linear(scaled, self.weight)) * angles.cos().to(x.dtype)


class Toy(nn.Module):
    """Embedding with a row of padding, two units, and the embedding again as the head."""

    def __init__(self):
        super().__init__()
        self.words = new_parameter(
            Layout.vocabulary_cut("words", VOCABULARY, VOCABULARY + 1, WIDTH, ONE), Init(1, 0.5)
        )
        self.units = nn.ModuleList(Unit(index) for index in range(2))
        self.weights = []
        self.skips: set[int] = set()  # units that a pass leaves out

    def forward(self, tokens: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        self.weights.append(self.words)
        x = F.embedding(tokens, self.words)
        for index, unit in enumerate(self.units):
            if index not in self.skips:
                x = unit(x, angles=angles)
        return F.linear(x, self.words)[..., :VOCABULARY].float()


def cut_toy(mesh: Mesh, dtype: torch.dtype) -> tuple[Toy, Optimizer]:
    model = Toy()
    shards = cut_parameters(model, model.units, dtype, CPU, Reduction(mesh.shards, mesh.copies))
    return model, Optimizer(
        shards, OptimizerConfig(lr=0.1, weight_decay=0.3, adam_eps=1e-3), Ops(), CPU
    )


def logits_of(model: Toy, seed: int) -> torch.Tensor:
    return model(*inputs(seed)[:2])


def backward(model: Toy, seed: int) -> None:
    F.cross_entropy(
        logits_of(model, seed).flatten(0, 1), inputs(seed)[2].flatten(), reduction="sum"
    ).backward()


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, angles, targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, 5), generator=generator)
    return tokens, torch.rand(5, 1, generator=generator), targets


def by_name(model: Toy, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        piece.name: piece.tensor
        for p, t in zip(model.parameters(), tensors, strict=True)
        for piece in layout_of(p).pieces(t)
    }


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Sums of some ten fp32 numbers in another order."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@MESHES
def test_shards_hold_each_element_of_the_model_once(ranks, shards):
    weights = assemble(run_ranks(ranks, initial_masters, shards=shards))
    model = Toy()
    expected = by_name(model, [p.detach() for p in model.parameters()])
    assert weights.keys() == expected.keys() and all(
        weights[name].equal(expected[name]) for name in expected
    )


def initial_masters(mesh: Mesh) -> list[Held]:
    return held(cut_toy(mesh, torch.float32)[1], lambda shard: shard.pieces(shard.masters))


@MESHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_summed_in_fp32_over_ranks_and_micro_batches(ranks, shards, dtype):
    """The gradient of one micro-batch is rounded to the working dtype, as in one process; the sums
    are not.
    """
    found = run_ranks(ranks, gradients_of_rank, dtype, shards=shards)
    model = Toy()
    model.to(dtype)
    total = [torch.zeros(p.shape) for p in model.parameters()]
    for seed in range(2 * ranks):
        model.zero_grad()
        backward(model, seed)
        total = [t + p.grad.float() for t, p in zip(total, model.parameters(), strict=True)]
    expected = by_name(model, total)
    assert_close(assemble([pieces for pieces, _ in found]), expected)
    squared = sum(g.double().square().sum().item() for g in expected.values())
    assert sum(share for _, share in found) == pytest.approx(squared, rel=1e-5)


def gradients_of_rank(mesh: Mesh, dtype: torch.dtype) -> tuple[list[Held], float]:
    """This rank's gradients of two micro-batches, after an update of others, and its share of their
    squared norm.
    """
    model, optimizer = cut_toy(mesh, dtype)
    optimizer.begin(1)
    backward(model, 99)
    optimizer.begin(2)
    for micro_batch in range(2):
        backward(model, 2 * mesh.rank + micro_batch)
    optimizer.reduce()
    return held(optimizer, lambda shard: shard.pieces(shard.gradients)), squared_norm(
        optimizer.buckets, CPU, Ops()
    ).item()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_a_unit_is_whole_only_while_it_runs_and_its_input_keeps_its_dtype(grad):
    for dtypes, own, earlier, later in run_ranks(2, memory_of_units, grad, shards=2):
        assert dtypes == {(torch.bfloat16, torch.float32)}
        assert own == 2 * WIDTH * WIDTH and earlier == 0
        assert later == [0, 0, 0] if grad else [0, 0, 2 * (VOCABULARY + 1) * WIDTH]


def memory_of_units(mesh: Mesh, grad: bool) -> tuple[set, int, int, list[int]]:
    """Dtypes of the units' inputs; bytes of the first unit's weight while it runs and when the
    second one does; of all weights after the pass.
    """
    model, _ = cut_toy(mesh, torch.bfloat16)
    first, second = model.units
    earlier = []
    second.register_forward_pre_hook(
        lambda *_: earlier.append(first.weights[-1].untyped_storage().nbytes())
    )
    if grad:
        backward(model, 0)
    else:
        with torch.no_grad():
            logits_of(model, 0)
    later = [module.weights[-1].untyped_storage().nbytes() for module in (first, second, model)]
    return {*first.dtypes, *second.dtypes}, first.bytes[0], earlier[0], later


@MESHES
def test_loaded_weights_are_used_after_an_evaluation_too(ranks, shards):
    """An evaluation leaves the embedding whole."""
    for logits in run_ranks(ranks, logits_with_loaded_weights, shards=shards):
        model = Toy()
        for parameter in model.parameters():
            parameter.data *= 1.5
        assert torch.equal(logits, logits_of(model, 0))


@torch.no_grad()
def logits_with_loaded_weights(mesh: Mesh) -> torch.Tensor:
    model, optimizer = cut_toy(mesh, torch.float32)
    logits_of(model, 0)
    for shard in optimizer.buckets:
        shard.masters.mul_(1.5)
    optimizer.masters_loaded()
    return logits_of(model, 0)


@MESHES
def test_an_update_is_that_of_one_process_and_a_skipped_one_is_none(ranks, shards):
    """Two updates by AdamW, with another in between that is skipped; its decay leaves the scales
    alone.
    """
    found = run_ranks(ranks, weights_after_updates, shards=shards)
    model = Toy()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in ((2, 0.3), (1, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-3)
    for update in range(2):
        optimizer.zero_grad()
        for rank in range(ranks):
            backward(model, 10 * update + rank)
        optimizer.step()
    expected = by_name(model, [p.detach() for p in model.parameters()])
    weights = assemble([pieces for pieces, _ in found])
    for name, tensor in expected.items():
        # An error d of a gradient moves AdamW's update by at most lr d / (4 eps): 2.5e-5 for d =
        # 1e-6, where a gradient is as small as eps.
        assert (weights[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    for _, logits in found:
        assert (logits - logits_of(model, 0)).norm() <= 1e-5 * logits.norm()


def weights_after_updates(mesh: Mesh) -> tuple[list[Held], torch.Tensor]:
    model, optimizer = cut_toy(mesh, torch.float32)
    for update, skip in enumerate((False, True, False)):
        optimizer.begin(1)
        backward(model, 10 * (update // 2) + mesh.rank)
        optimizer.reduce()
        optimizer.update(0.1, torch.tensor(float("nan") if skip else 1.0), torch.tensor(skip))
    with torch.no_grad():
        return held(optimizer, lambda shard: shard.pieces(shard.masters)), logits_of(model, 0)


@MESHES
def test_a_parameter_that_no_micro_batch_used_has_a_gradient_of_zeros(ranks, shards):
    """The head and the embedding are used, the units are not: only decay moves their weights."""
    found = assemble(run_ranks(ranks, update_without_units, shards=shards))
    decayed = 1 - 0.1 * 0.3
    for name, before in by_name(Toy(), [p.detach() for p in Toy().parameters()]).items():
        if name.endswith("weight"):
            assert torch.equal(found[name], before * decayed)
        elif name.endswith("scale"):
            assert torch.equal(found[name], before)
        else:
            assert not torch.equal(found[name], before * decayed)


def update_without_units(mesh: Mesh) -> list[Held]:
    model, optimizer = cut_toy(mesh, torch.float32)
    model.skips = {0, 1}
    optimizer.begin(1)
    backward(model, mesh.rank)
    optimizer.reduce()
    assert torch.isfinite(squared_norm(optimizer.buckets, CPU, Ops()))
    optimizer.update(0.1, torch.tensor(1.0), torch.tensor(False))
    return held(optimizer, lambda shard: shard.pieces(shard.masters))


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"),
    reason="fully_shard of this torch needs all ranks to use the same parameters",
)
def test_a_rank_may_leave_out_what_another_one_uses():
    """A unit runs on all ranks, or none: its weights are gathered. But it may leave one out.

    In the second of two micro-batches rank 1 does not use the scale of the first unit.
    """
    found = assemble(run_ranks(2, gradients_with_a_skip, shards=2))
    model = Toy()
    for rank in range(2):
        for micro_batch in range(2):
            model.units[0].scales = not rank == micro_batch == 1
            backward(model, 2 * rank + micro_batch)
    assert_close(found, by_name(model, [p.grad for p in model.parameters()]))


def gradients_with_a_skip(mesh: Mesh) -> list[Held]:
    model, optimizer = cut_toy(mesh, torch.float32)
    optimizer.begin(2)
    for micro_batch in range(2):
        model.units[0].scales = not mesh.rank == micro_batch == 1
        backward(model, 2 * mesh.rank + micro_batch)
    optimizer.reduce()
    return held(optimizer, lambda shard: shard.pieces(shard.gradients))


RUN = (
    f"{SMALL}{LLAMA} --attention-dropout 0 --hidden-dropout 0.1 --clip-grad 0.3 --eval-iters 0"
    " --train-iters 8"
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return f"{RUN} --data-path {write_data(tmp_path_factory.mktemp('data') / 'small')}"


def test_a_checkpoint_goes_through_any_cut_bit_for_bit(arguments, tmp_path):
    """Written by one process, loaded and written again by 2 x 2 cut ones: weights and moments."""
    train(f"{arguments} --save {tmp_path}/one --exit-interval 2")
    run_ranks(
        4,
        save_again,
        f"{arguments} {ZERO3} --tensor-model-parallel-size 2",
        tmp_path / "one",
        tmp_path / "four",
        tp=2,
        shards=2,
    )
    one, four = (opened(tmp_path / name, world=Axis("world")) for name in ("one", "four"))
    assert one.names() == four.names() and any(
        name.startswith("optim.exp_avg_sq.") for name in one.names()
    )
    assert all(one.read(name).equal(four.read(name)) for name in one.names())


opened = partial(open_checkpoint, ckpt_step=None, device=CPU)


def save_again(mesh: Mesh, arguments: str, source: Path, target: Path) -> None:
    config = resolve(flags.parse(arguments.split()).config, mesh.world_size)
    optimizer = build_optimizer(
        config, mesh, build_passes(config, 97, mesh, Ops(), CPU, eod=96), Ops()
    )
    assert all(isinstance(shard, ShardedParameter) for shard in optimizer.buckets)
    checkpoint = opened(source, world=mesh.world)
    checkpoint.read_into([*optimizer.weight_pieces(), *optimizer.moment_pieces()])
    pieces = [
        piece
        for pieces in (optimizer.weight_pieces(), optimizer.moment_pieces())
        for piece in pieces
        if piece.primary
    ]
    save(
        target,
        2,
        pieces,
        state=checkpoint.state,
        config_yaml=checkpoint.config_yaml,
        world=mesh.world,
        device=CPU,
    )


def test_a_run_goes_on_under_another_strategy(arguments, tmp_path):
    """Three iterations cut over 2 ranks, two in one process, three cut over 4: losses equal to
    rounding.
    """
    train(f"{arguments} --save {tmp_path}/whole")
    parts = f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts"
    train(f"{parts} {ZERO3} --exit-interval 3", 2)
    train(f"{parts} --exit-interval 5")
    train(f"{parts} {ZERO3}", 4)
    whole, found = (
        [row["lm_loss"] for row in rows_of(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    )
    assert found == pytest.approx(whole, rel=1e-5) and len(found) == 8


@pytest.mark.parametrize(
    "chunks",
    ["--num-virtual-stages-per-pipeline-rank 2", "--num-layers-per-virtual-pipeline-stage 1"],
)
def test_several_model_chunks_are_refused(arguments, chunks):
    with pytest.raises(ConfigError, match="optim_grads_params"):
        train(f"{arguments} {ZERO3} {chunks}", 2)
