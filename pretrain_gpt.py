"""Pretrain a GPT: configuration, mesh, data, model, optimizer, checkpoint, training. `python pretrain_gpt.py --help` lists the flags."""

import sys
from dataclasses import replace

import torch

from trivium import flags, launch, logs, ops
from trivium.checkpoint.manifest import CheckpointError
from trivium.config import Config, ConfigError, resolve
from trivium.data.dataset import Datasets, build_datasets
from trivium.data.errors import DataError
from trivium.data.loader import loader
from trivium.data.tokenizer import Tokenizer, build_tokenizer
from trivium.mesh import Mesh
from trivium.model import families
from trivium.model.flops import total_parameters
from trivium.model.gpt import GPT
from trivium.optim.adamw import AdamW
from trivium.optim.buckets import make_buckets
from trivium.precision import LossScaler, working_dtype
from trivium.presets import PRESETS, published_vocabulary
from trivium.train.export import export
from trivium.train.loop import Data, run
from trivium.train.report import Reporter
from trivium.train.resume import RunState, load_problems
from trivium.train.step import Trainer
from trivium.validate import validate


def main(argv: list[str], place: launch.Place) -> None:
    """One run, from the command line to the last checkpoint."""
    log = logs.setup(place.rank)
    request = flags.parse(argv)
    if request.list_presets:
        return list_presets()
    config = checked(request.config, place.world_size)
    device = launch.choose_device(config.parallel.device, place.local_rank)
    dtype = working_dtype(config.precision)
    run_ops = ops.choose(config.parallel.kernels, device, dtype, config.parallel.attention_backend)
    tokenizer = build_tokenizer(config.data)
    log.info(flags.write_config(config).rstrip())
    announce(config, request.without_effect, run_ops, device, dtype)

    launch.set_rendezvous()
    torch.use_deterministic_algorithms(config.parallel.deterministic_mode)
    backend = config.parallel.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    mesh = Mesh.plan(place.world_size, place.rank).connect(backend, config.parallel.distributed_timeout_minutes)
    datasets = build_datasets(config.data, config.batch, config.logging, tokenizer.vocab_size)
    model = GPT(config.model, tokenizer.vocab_size, tp=mesh.tp, ops=run_ops, seed=config.batch.seed).place(device, torch.float32)
    optimizer = AdamW(make_buckets(model.parameters(), dtype, device), config.optimizer, run_ops)
    trainer = Trainer(config, mesh, device, model, optimizer, LossScaler(config.precision, device))
    state = RunState(trainer, {"tokenizer": tokenizer.fingerprint, "data": datasets.fingerprint})
    progress = state.restore()
    reporter = Reporter(config, mesh, device, tokenizer.vocab_size, progress.iteration)
    log.info(f" {total_parameters(config.model, tokenizer.vocab_size):,} parameters; training from iteration {progress.iteration}")
    progress = run(trainer, batches(config, datasets, tokenizer, mesh), state, reporter, progress)
    picture = reporter.close()
    if picture:
        log.info(f" loss curve: {picture}")
    if config.checkpoint.save_hf:
        export(trainer, tokenizer, config.checkpoint.save_hf)
    mesh.close()
