"""Checks of the layout: what each parallel axis cuts must divide."""

from collections.abc import Iterator
from math import lcm

from ...pipeline.from_flags import placement_of, stage_specs
from ..defaults import data_parallel_size, model_parallel_size
from ..fields import Config, ModelConfig, ParallelConfig, flag_of
from .words import nearest_multiples, positive

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
_CHUNKS = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")


def check_parallel(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of the layout over processes."""
    layout = config.parallel
    yield from positive(
        layout,
        *_SIZES,
        "num_distributed_optimizer_instances",
        "ddp_bucket_size",
        "recompute_num_layers",
        *_CHUNKS,
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    )
    experts, minutes = layout.expert_model_parallel_size, layout.distributed_timeout_minutes
    if experts != 1:
        flag = f"--expert-model-parallel-size {experts}"
        yield f"{flag}: there are no experts in this version; use 1"
    if minutes <= 0:
        yield f"--distributed-timeout-minutes {minutes} must be above 0"
    if layout.device == "cpu" and layout.distributed_backend == "nccl":
        yield "--distributed-backend nccl cannot carry --device cpu; use gloo"
    counts = [getattr(layout, name) for name in (*_SIZES, *_CHUNKS)]
    counts.append(layout.num_distributed_optimizer_instances)
    if any(count is not None and count < 1 for count in counts):
        return  # the checks below divide by them
    yield from _world(layout, world_size)
    yield from _tensor(config.model, layout.tensor_model_parallel_size)
    yield from _sequence(config)
    if config.parallel.context_parallel_size > 1:
        yield from _context(config)
    yield from _pipeline(config)
    yield from _sharding(layout, world_size)


def _world(layout: ParallelConfig, world_size: int) -> Iterator[str]:
    sizes = {flag_of(name): getattr(layout, name) for name in _SIZES}
    per_model = model_parallel_size(layout)
    if world_size % per_model:
        unit = " x ".join(f"{flag} {size}" for flag, size in sizes.items())
        near = nearest_multiples(world_size, per_model)
        yield (
            f"{world_size} processes are not a multiple of {unit} = {per_model}; "
            f"start {near}, or change the sizes"
        )


def _tensor(model: ModelConfig, tp: int) -> Iterator[str]:
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    for name in ("num_attention_heads", "ffn_hidden_size"):
        value = getattr(model, name)
        if value and value % tp:
            yield (
                f"{flag_of(name)} {value} cannot be cut over --tensor-model-parallel-size {tp}; "
                f"use {nearest_multiples(value, tp)}, or another size"
            )
    # Heads that cannot be cut are told of above; groups divide heads, so once is enough.
    heads_fit = not heads or heads % tp == 0
    if heads_fit and kv_heads and kv_heads > 0 and kv_heads % tp and tp % kv_heads:
        yield (
            f"--num-query-groups {kv_heads} neither is a multiple of "
            f"--tensor-model-parallel-size {tp} nor divides it; change one of them"
        )


def _sequence(config: Config) -> Iterator[str]:
    """Yield the problems of cutting a sample by tokens."""
    layout, length = config.parallel, config.batch.seq_length
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    if not length:
        return
    # Each rank of context parallel has two chunks, one early and one late, so that all have the
    # same work under a causal mask.
    if cp > 1 and length % (2 * cp):
        yield (
            f"--seq-length {length} is not a multiple of 2 x --context-parallel-size {cp}; "
            f"use {nearest_multiples(length, 2 * cp)}"
        )
    elif layout.sequence_parallel and length // cp % tp:
        unit = f"--context-parallel-size {cp} x --tensor-model-parallel-size {tp}"
        near = nearest_multiples(length, tp if cp == 1 else lcm(2 * cp, cp * tp))
        yield f"--sequence-parallel: --seq-length {length} cannot be cut over {unit}; use {near}"


def _context(config: Config) -> Iterator[str]:
    """Yield what the way of --cp-comm-type cannot do."""
    model, layout = config.model, config.parallel
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    if layout.cp_comm_type == "p2p" and config.data.reset_attention_mask:
        yield (
            "--cp-comm-type p2p cannot keep attention inside documents (--reset-attention-mask); "
            "use --cp-comm-type allgather or a2a"
        )
    if layout.cp_comm_type == "p2p" and model.attention_dropout > 0:
        yield (
            "--cp-comm-type p2p has no attention dropout; "
            "give --attention-dropout 0, or use --cp-comm-type allgather or a2a"
        )
    # The exchange trades tokens for heads: a rank then has all tokens of heads / (tp x cp) heads.
    heads = model.num_attention_heads
    if layout.cp_comm_type == "a2a" and heads and heads % tp == 0 and heads // tp % cp:
        unit = f"--tensor-model-parallel-size {tp} x --context-parallel-size {cp} = {tp * cp}"
        yield (
            f"--cp-comm-type a2a: --num-attention-heads {heads} cannot be cut over {unit}; "
            "use --cp-comm-type p2p or allgather"
        )


def _pipeline(config: Config) -> Iterator[str]:
    layout, layers = config.parallel, config.model.num_layers
    if not layers or layers < 1:
        return
    try:
        placement = placement_of(layout, layers)
        stage_specs(layout, layers)
    except ValueError as error:
        yield str(error)
        return
    strategy, schedule = layout.data_parallel_sharding_strategy, placement.schedule
    if placement.num_stages > 1 and strategy == "optim_grads_params":
        stages = f"a pipeline of {placement.num_stages} stages"
        yield (
            f"--data-parallel-sharding-strategy {strategy} cannot be combined with {stages}; "
            "use optim_grads"
        )
    if schedule in ("zb-h1", "zb-v") and layout.recompute_granularity == "full":
        yield (
            f"--pipeline-schedule {schedule} defers weight gradients: "
            "not with --recompute-granularity full; use selective"
        )


def _sharding(layout: ParallelConfig, world_size: int) -> Iterator[str]:
    """Yield the problems of what data-parallel processes share out."""
    shares_nothing = layout.data_parallel_sharding_strategy == "no_shard"
    copies = data_parallel_size(layout, world_size) * layout.context_parallel_size
    instances = layout.num_distributed_optimizer_instances
    given = f"--num-distributed-optimizer-instances {instances}"
    if layout.use_distributed_optimizer and shares_nothing:
        yield (
            "--use-distributed-optimizer and --data-parallel-sharding-strategy no_shard "
            "exclude each other; give one"
        )
    if instances > 1 and shares_nothing:
        yield f"{given} needs --use-distributed-optimizer"
    elif copies % instances:
        yield f"{given} does not divide data parallel x context parallel = {copies}; use 1"
    if layout.overlap_param_gather and shares_nothing:
        yield (
            "--overlap-param-gather needs --use-distributed-optimizer: "
            "nothing is gathered without it"
        )
