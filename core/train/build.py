"""Build this rank's part of the model and its optimizer from a configuration."""

import torch

from ..config import Config, ConfigError
from ..mesh import Mesh
from ..model.gpt import GPT
from ..model.recompute import Recompute
from ..ops import Ops, keep_freed_memory
from ..optim.buckets import Reduction, make_buckets, reductions_over
from ..optim.fully_sharded import cut_parameters
from ..optim.optimizer import Optimizer
from ..optim.order import BackwardPasses
from ..parallel.sharding import Sharding
from ..pipeline.actions import Backward, BackwardWeight
from ..pipeline.from_flags import placement_of, stage_specs
from ..pipeline.plan import make_plan
from ..precision import LossScaler, working_dtype
from .passes import Passes, PrepareBatch
from .schedule import BatchSchedule, Progress
from .step import Trainer


def build_trainer(
    config: Config, mesh: Mesh, device: torch.device, ops: Ops, vocab_size: int, eod: int
) -> Trainer:
    """Build everything that a step needs, with initial weights.

    vocab_size: ids of the tokenizer, the end of document included.
    eod: the id that ends a document.
    """
    if device.type == "cpu":
        keep_freed_memory()  # a step frees and asks for the same large temporaries all the time
    schedule = BatchSchedule(config.batch, mesh.dp.size)
    passes = build_passes(config, vocab_size, mesh, ops, device, eod)
    for forward_only in (False, True):  # a plan takes a while to make: not in the first step
        passes.runner(schedule.batch_at(Progress()), forward_only=forward_only)
    optimizer = build_optimizer(config, mesh, passes, ops)
    scaler = LossScaler(config.precision, device)
    return Trainer(config, mesh, device, schedule, passes, optimizer, scaler)


def build_passes(
    config: Config, vocab_size: int, mesh: Mesh, ops: Ops, device: torch.device, eod: int
) -> Passes:
    """Build the model chunks of this rank, with fp32 weights on `device`, and what runs them.

    Parameters that will be cut over data parallel stay on the CPU: the device may not have room
    for all of them.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    sharding = Sharding.of(mesh, parallel)
    recompute = Recompute.of(parallel)
    placement = placement_of(parallel, num_layers)
    specs = stage_specs(parallel, num_layers)
    chunks: list[GPT] = []
    for chunk in range(placement.num_chunks):
        spec = specs[placement.stage(mesh.pp.rank, chunk)]
        # Where embedding and head are chunks of one rank (as in zb-v), they share one
        # parameter; else each end has its own copy, and their gradients are summed.
        tied_weight = None
        embedding = chunks[0].embedding if chunks else None
        if config.model.tied and embedding is not None:
            tied_weight = embedding.weight
        model = GPT(
            config.model,
            vocab_size,
            ops=ops,
            seed=config.batch.seed,
            sharding=sharding,
            layers=spec.layers,
            embeds=spec.embeds,
            predicts=spec.predicts,
            tied_weight=tied_weight,
            recompute=recompute,
        )
        if parallel.compile:
            # Block by block: what passes between ranks, and into gradients, stays outside.
            for block in model.layers:
                block.compile(dynamic=False)
        # Chunk by chunk, so that the CPU never holds more than one of them.
        if not _cuts_parameters(config, mesh):
            model.to_device(device, torch.float32)
        chunks.append(model)
    prepare = PrepareBatch(config, sharding, device, eod)
    return Passes(config, mesh, device, chunks, placement, prepare)


def build_optimizer(config: Config, mesh: Mesh, passes: Passes, ops: Ops) -> Optimizer:
    """Build the optimizer over the parameters of `passes`.

    From now on these are views of flat buckets in the working dtype, or cut over data parallel.
    """
    parallel, device = config.parallel, passes.device
    dtype = working_dtype(config.precision)
    reduction = Reduction(
        mesh.shards,
        mesh.copies,
        parallel.overlap_grad_reduce,
        parallel.data_parallel_sharding_strategy != "optim_grads",
        passes.deferral,
    )
    if _cuts_parameters(config, mesh):
        if len(passes.chunks) > 1:
            flag = "--data-parallel-sharding-strategy optim_grads_params"
            count = len(passes.chunks)
            problem = f"{flag} has one model chunk on each process, not {count}; use optim_grads"
            raise ConfigError([problem])
        model = passes.chunks[0]
        shards = cut_parameters(model, model.layers, dtype, device, reduction)
        return Optimizer(shards, config.optimizer, ops, device)
    size = parallel.bucket_size(mesh.dp_cp.size)
    reductions = reductions_over(mesh, reduction)
    backward = _backward_passes(passes, mesh)
    buckets = make_buckets(passes.parameters(), dtype, device, reductions, size, backward)
    overlap = parallel.overlap_param_gather
    return Optimizer(buckets, config.optimizer, ops, device, overlap_gather=overlap)


def _backward_passes(passes: Passes, mesh: Mesh) -> BackwardPasses:
    """Return the order in which the pipeline's plan lets this rank's chunks run backward."""
    placement = passes.placement

    def order(num_microbatches: int) -> list[int]:
        plan = make_plan(
            placement.schedule, placement.num_ranks, num_microbatches, placement.num_chunks
        )
        actions = plan.actions[mesh.pp.rank]
        return [a.chunk for a in actions if isinstance(a, (Backward, BackwardWeight))]

    return BackwardPasses([list(chunk.parameters()) for chunk in passes.chunks], order)


def _cuts_parameters(config: Config, mesh: Mesh) -> bool:
    """Return whether this rank holds only a share of each parameter (ZeRO-3)."""
    strategy = config.parallel.data_parallel_sharding_strategy
    return strategy == "optim_grads_params" and mesh.shards.size > 1
