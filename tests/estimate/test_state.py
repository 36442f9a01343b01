"""Parameters, gradients and optimizer state by formula against what is allocated, to the byte."""

import pytest
from runs import CHUNKS, CP, PP, STRATEGY, TP, ZERO1
from small_models import CPU, FAMILIES, GPT2, LLAMA, QK, VOCAB, config_of, preset, size_of

from trivium import ops
from trivium.config import Config
from trivium.estimate.memory import StateMemory, state_of
from trivium.estimate.parameters import (
    ModelChunk,
    layer_parameters,
    local_parameters,
    total_parameters,
)
from trivium.launch import Process, plan_mesh
from trivium.mesh import Mesh
from trivium.pipeline.from_flags import placement_of, stage_specs
from trivium.train.build import build_optimizer, build_passes


def count(parameters) -> int:
    return sum(parameter.numel for parameter in parameters)


# Parameters, by hand.


def test_llama3_8b_by_hand():
    """Per layer q and o 4096^2, k and v 4096 x 1024, three of 4096 x 14336, and two norms.

    Embedding and head are 128,256 x 4096, and there is a last norm.
    """
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    total = 32 * layer + 2 * 128256 * 4096 + 4096
    assert total == 8_030_261_248
    model = preset("llama3-8b", seq_length=8192).model
    assert total_parameters(model, 128256) == total
    assert count(local_parameters(model, 128256, 1, [ModelChunk(32)])) == total


@pytest.mark.parametrize(
    ("chunk", "tables"),
    [
        (ModelChunk(7, True, False), 1),
        (ModelChunk(8, False, False), 0),
        (ModelChunk(7, False, True), 1),
    ],
    ids=["first", "middle", "last"],
)
def test_llama3_405b_on_16_tensor_parallel_ranks_by_hand(chunk, tables):
    """8 key-value heads on 16 ranks: each holds a whole one. The vocabulary is padded."""
    model = preset("llama3.1-405b", seq_length=8192).model
    assert model.padded_vocabulary(128256, 16) == 129024
    matrices = 2 * 16384**2 // 16 + 2 * 16384 * 128 + 3 * 16384 * 53248 // 16
    layer = matrices + 2 * 16384
    words = 129024 * 16384 // 16
    expected = chunk.layers * layer + tables * words + 16384 * chunk.predicts
    assert count(local_parameters(model, 128256, 16, [chunk])) == expected


# State, by hand.

PARAMETERS = 8_030_261_248  # of Llama 3 8B


def llama3_8b_state(strategy: str) -> StateMemory:
    """Return the state of Llama 3 8B in bf16 on one of 8 ranks."""
    values = {"seq_length": 8192, "micro_batch_size": 1, "bf16": True}
    config = preset("llama3-8b", 8, data_parallel_sharding_strategy=strategy, **values)
    shards = 1 if strategy == "no_shard" else 8
    return state_of(config, 128256, [ModelChunk(32)], shards=shards, copies=8)


@pytest.mark.parametrize(
    ("strategy", "gradient_ranks", "optimizer_ranks"),
    [("no_shard", 1, 1), ("optim", 1, 8), ("optim_grads", 8, 8), ("optim_grads_params", 8, 8)],
)
def test_state_of_llama3_8b_on_8_ranks_by_hand(strategy, gradient_ranks, optimizer_ranks):
    """2 P of weights, 4 P of gradients, 4 P of masters and 8 P of moments, or a rank's share.

    Alignment adds less than a millionth.
    """
    state = llama3_8b_state(strategy)
    p = PARAMETERS
    assert state.gradients == pytest.approx(4 * p / gradient_ranks, rel=1e-6)
    assert state.optimizer == pytest.approx(12 * p / optimizer_ranks, rel=1e-6)
    if strategy != "optim_grads_params":
        assert state.weights == pytest.approx(2 * p, rel=1e-6)


def test_whole_gradients_and_gathered_weights_of_llama3_8b_by_hand():
    """ZeRO-2: embedding and head, each its own full bucket in fp32.

    ZeRO-3: 6 bytes of the gradient of what is outside the layers, which is more than a layer's;
    2 bytes of those weights and of two layers.
    """
    head = 128256 * 4096
    outside = 2 * head + 4096
    layer = (PARAMETERS - outside) // 32
    for strategy, transient in (
        ("no_shard", 0),
        ("optim", 0),
        ("optim_grads", 8 * head),
        ("optim_grads_params", 6 * outside),
    ):
        state = llama3_8b_state(strategy)
        assert state.transient == pytest.approx(transient, rel=0.01)
    assert state.weights == 2 * (outside + 2 * layer)


def test_zero_3_holds_the_heads_gradient_beside_a_layers():
    """The loss made it: 2 bytes of 112 x 64 in bf16, beside 6 of a layer.

    The first of two stages has no head, and so those 6 alone.
    """
    config = config_of(f"{LLAMA}--bf16 {STRATEGY} optim_grads_params ", 2)
    layer = count(layer_parameters(config.model, 1))
    for chunk, head in ((ModelChunk(8), 2 * 112 * 64), (ModelChunk(4, True, False), 0)):
        state = state_of(config, VOCAB, [chunk], shards=2, copies=2)
        assert state.transient == 6 * layer + head > 6 * 2 * 112 * 64


# State, against the engine.

LAYOUTS = [
    (1, ""),
    (2, "--bf16"),
    (1, f"--optimizer sgd {CHUNKS} 2"),
    (4, f"{ZERO1} --bf16 --ddp-bucket-size 9000"),
    (4, f"{TP} 2"),
    (8, f"{TP} 4 {ZERO1} --bf16"),
    (8, f"{PP} 2 --bf16 {ZERO1} --num-distributed-optimizer-instances 2"),
    (4, f"{PP} 2 --pipeline-schedule zb-v --bf16 {STRATEGY} optim_grads"),
    (16, f"{PP} 4 {CHUNKS} 2 {CP} 2 {STRATEGY} optim_grads"),
]
IDS = [layout or "plain" for _, layout in LAYOUTS]


def allocated(config: Config, mesh: Mesh) -> StateMemory:
    """Return what the engine allocates on a rank before training."""
    passes = build_passes(config, VOCAB, mesh, ops.Ops(), CPU, eod=VOCAB - 1)
    optimizer = build_optimizer(config, mesh, passes, ops.Ops())
    weights = [bucket.weights for bucket in optimizer.buckets]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in weights}
    masters = []
    for bucket in optimizer.buckets:
        if bucket.masters.untyped_storage().data_ptr() not in addresses:
            masters.append(bucket.masters)
    return StateMemory(
        parameters=sum(parameter.numel() for parameter in passes.parameters()),
        weights=size_of(weights),
        gradients=size_of(bucket._sum for bucket in optimizer.buckets),
        masters=size_of(masters),
        moments=size_of(moment for held in optimizer.state for moment in held.values()),
    )


def counted(config: Config, mesh: Mesh) -> StateMemory:
    """Return what the formulas say of the same rank."""
    layers = config.model.num_layers
    placement, specs = placement_of(config.parallel, layers), stage_specs(config.parallel, layers)
    chunks = []
    for chunk in range(placement.num_chunks):
        spec = specs[placement.stage(mesh.pp.rank, chunk)]
        chunks.append(ModelChunk(len(spec.layers), spec.embeds, spec.predicts))
    return state_of(config, VOCAB, chunks, shards=mesh.shards.size, copies=mesh.dp_cp.size)


@pytest.mark.parametrize(
    "model",
    [GPT2, LLAMA, QK, FAMILIES["gemma"], FAMILIES["olmo"]],
    ids=["gpt2", "llama", "tied-qk", "gemma", "olmo"],
)
@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=IDS)
def test_state_is_what_is_allocated(world_size, layout, model):
    """To the byte, on the first and last rank of every stage.

    No process is started: nothing is communicated before training.
    """
    config = config_of(model + layout, world_size)
    stages = config.parallel.pipeline_model_parallel_size
    per_stage = world_size // stages
    for stage in range(stages):
        for place in {0, per_stage - 1}:
            rank = stage * per_stage + place
            mesh = plan_mesh(config, Process(rank, world_size))
            found, expected = allocated(config, mesh), counted(config, mesh)
            # What is transient exists during a pass alone.
            for name in ("parameters", "weights", "gradients", "masters", "moments"):
                assert getattr(expected, name) == getattr(found, name), name
