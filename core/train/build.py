"""From a configuration to this rank's part of the model and its optimizer."""

import torch

from ..config import Config, ConfigError
from ..gradients import Deferral
from ..mesh import Mesh
from ..model.gpt import GPT
from ..model.recompute import Recompute
from ..ops import Ops, keep_freed_memory
from ..optim.buckets import Reduction, make_buckets
from ..optim.fully_sharded import cut_parameters
from ..optim.optimizer import Optimizer
from ..parallel.sharding import Sharding
from ..pipeline.from_flags import placement_of, stage_specs
from ..pipeline.plan import make_plan
from ..pipeline.runtime import MessageSpec, Runner
from ..precision import LossScaler, working_dtype
from .inputs import PrepareBatch
from .stages import Stages
from .step import Trainer


def build_trainer(
    config: Config, mesh: Mesh, device: torch.device, ops: Ops, vocab_size: int, eod: int
) -> Trainer:
    """Everything a step needs, with initial weights. eod: the token that ends a document."""
    if device.type == "cpu":
        keep_freed_memory()  # a step frees and asks for the same large temporaries again and again
    stages = build_stages(config, vocab_size, mesh, ops, device)
    optimizer = build_optimizer(config, mesh, stages, ops)
    return Trainer(
        config,
        mesh,
        device,
        stages,
        PrepareBatch(config, stages.sharding, device, eod),
        optimizer,
        LossScaler(config.precision, device),
    )


def build_stages(
    config: Config, vocab_size: int, mesh: Mesh, ops: Ops, device: torch.device
) -> Stages:
    """The model chunks of this rank with fp32 weights on `device`, and the plans for the micro-batches of an update.

    Parameters that are to be cut over data parallel stay on the CPU: the device need not have room for all of them.
    """
    parallel, batch = config.parallel, config.batch
    sharding, recompute = Sharding.of(mesh, parallel), Recompute.of(parallel)
    placement, specs = (
        placement_of(parallel, config.model.num_layers),
        stage_specs(parallel, config.model.num_layers),
    )
    chunks: list[GPT] = []
    for chunk in range(placement.num_chunks):
        spec = specs[placement.stage(mesh.pp.rank, chunk)]
        model = GPT(
            config.model,
            vocab_size,
            ops=ops,
            seed=batch.seed,
            sharding=sharding,
            layers=spec.layers,
            embeds=spec.embeds,
            predicts=spec.predicts,
            tied_weight=chunks[0].embedding.weight
            if config.model.tied and chunks and chunks[0].embeds
            else None,
            recompute=recompute,
        )
        if parallel.compile:
            for block in model.layers:
                block.compile(dynamic=False)
        chunks.append(
            model if _cuts_parameters(config, mesh) else model.to_device(device, torch.float32)
        )
    tokens = batch.seq_length // mesh.cp.size // (mesh.tp.size if sharding.sequence_parallel else 1)
    message = MessageSpec(
        (batch.micro_batch_size, tokens, config.model.hidden_size),
        working_dtype(config.precision),
        device,
    )
    num_microbatches = batch.global_batch_size // (batch.micro_batch_size * mesh.dp.size)
    deferral = Deferral()

    def runner(forward_only: bool) -> Runner:
        plan = make_plan(
            placement.schedule,
            placement.num_ranks,
            num_microbatches,
            placement.num_chunks,
            forward_only=forward_only,
        )
        return Runner(plan, mesh.pp, message, deferral)

    return Stages(chunks, mesh, training=runner(False), evaluation=runner(True))


def build_optimizer(config: Config, mesh: Mesh, stages: Stages, ops: Ops) -> Optimizer:
    """The optimizer over the stages' parameters: views of flat buckets in the working dtype from now on, or cut over data parallel."""
    parallel, dtype, device = (
        config.parallel,
        working_dtype(config.precision),
        stages.training.message.device,
    )
    strategy = parallel.data_parallel_sharding_strategy
    reduction = Reduction(
        mesh.shards,
        mesh.copies,
        parallel.overlap_grad_reduce,
        strategy != "optim_grads",
        stages.training.deferral,
    )
    if _cuts_parameters(config, mesh):
        if len(stages.chunks) > 1:
            flag = "--data-parallel-sharding-strategy optim_grads_params"
            raise ConfigError(
                [
                    f"{flag} has one model chunk on each process, not {len(stages.chunks)}; use optim_grads"
                ]
            )
        model = stages.chunks[0]
        return Optimizer(
            cut_parameters(model, model.layers, dtype, device, reduction),
            config.optimizer,
            ops,
            device,
        )
    buckets = make_buckets(
        stages.parameters(), dtype, device, reduction, parallel.bucket_size(mesh.dp_cp.size)
    )
    return Optimizer(
        buckets, config.optimizer, ops, device, overlap_gather=parallel.overlap_param_gather
    )


def _cuts_parameters(config: Config, mesh: Mesh) -> bool:
    """Whether this rank holds a share of each parameter alone (ZeRO-3)."""
    return (
        config.parallel.data_parallel_sharding_strategy == "optim_grads_params"
        and mesh.shards.size > 1
    )
