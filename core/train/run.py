"""One run, from a configuration to the last checkpoint; it reads from top to bottom.

This is what pretrain_gpt.py does after its flags, as a library call:

    from trivium import Config, pretrain

    config = Config.of({"num_layers": 2, "hidden_size": 64, "lr": 1e-3, ...})  # as the flags
    progress = pretrain(config)

OMP_WAIT_POLICY=passive, which pretrain_gpt.py sets, must be in the environment before torch is
imported; a program that calls `pretrain` on a CPU sets it itself.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import launch, logs, ops
from ..checkpoint.load import open_checkpoint
from ..config import Config, ConfigError, resolve
from ..config.flags import write_config
from ..config.validate import validate
from ..data.tokenizer import Tokenizer, build_tokenizer
from ..estimate.parameters import total_parameters
from ..interop.export import export_hf
from ..interop.families import export_problems
from ..launch import Process
from ..mesh import Mesh
from ..ops import Ops
from ..precision import working_dtype
from . import loop
from .build import build_trainer
from .data import build_data, samples_needed
from .load_modes import with_cooldown
from .load_problems import load_problems
from .report import Reporter
from .resume import RunState
from .schedule import Progress
from .sinks import open_sinks


def pretrain(
    config: Config, process: Process | None = None, *, without_effect: Sequence[str] = ()
) -> Progress:
    """Train as `config` says: build everything, resume, train, save, export.

    config: as the flags give it, not resolved.
    process: this process of the job; what torchrun or Slurm say, if not given.
    without_effect: flags that were given and do nothing here, to be named in the log.

    Returns how far the run came. Raises ConfigError with everything that is wrong with the
    configuration, before anything is started.
    """
    process = process or launch.read_environment()
    log = logs.setup(process.rank)
    # All that can be wrong with the configuration is found before anything is started.
    config = checked(config, process.world_size)
    device = launch.choose_device(config.parallel.device, process.local_rank)
    set_threads(device)
    run_ops = choose_ops(config, device)
    tokenizer = build_tokenizer(**config.data.tokenizer)
    announce(config, process, without_effect, run_ops, device)

    # From here on the processes work together.
    mesh = connect(config, process, device)
    trainer = build_trainer(config, mesh, device, run_ops, tokenizer.vocab_size, tokenizer.eod)
    state = RunState(trainer, tokenizer.fingerprint)
    progress = state.restore()
    # The order of the data is made when it is known how far the run has come.
    num_samples = samples_needed(config, trainer.schedule, progress, state.data_samples)
    data = build_data(config, trainer.schedule, tokenizer, mesh, device, num_samples)
    state.read_from(data.fingerprint, data.num_samples)
    parameters = total_parameters(config.model, tokenizer.vocab_size)
    log.info(f" {parameters:,} parameters; training from iteration {progress.iteration}")

    # Rank 0 reports; the others read their steps all the same, to learn when to stop.
    sinks = open_sinks(config, progress.iteration) if mesh.rank == 0 else []
    reporter = Reporter(config, mesh, device, tokenizer.vocab_size, sinks)
    progress = loop.run(trainer, data, state, reporter, progress)
    reporter.close()
    if mesh.rank == 0 and progress.iteration == config.batch.train_iters:
        export(config, progress, tokenizer, device)
    mesh.close()
    return progress


def checked(config: Config, world_size: int) -> Config:
    """Return the resolved configuration; raise ConfigError with everything wrong with it."""
    config, problems = with_cooldown(resolve(config, world_size))
    problems += validate(config, world_size)
    problems += load_problems(config.model, config.checkpoint)
    if config.checkpoint.save_hf:
        problems += export_problems(config.model)
    if problems:
        raise ConfigError(problems)
    return config


def set_threads(device: torch.device) -> None:
    """Give a process that computes on the CPU its share of the cores."""
    threads = launch.threads_of_a_process() if device.type == "cpu" else None
    if threads:
        torch.set_num_threads(threads)


def choose_ops(config: Config, device: torch.device) -> Ops:
    """Return the implementations of the fused operations that the flags ask for."""
    parallel, dtype = config.parallel, working_dtype(config.precision)
    return ops.select_ops(parallel.kernels, device, dtype, parallel.attention_backend)


def announce(
    config: Config,
    process: Process,
    without_effect: Sequence[str],
    run_ops: Ops,
    device: torch.device,
) -> None:
    """Log the configuration, what it runs on, and what the user should know about it."""
    log, parallel = logs.get_logger(), config.parallel
    untested = launch.untested_torch()
    if untested and process.rank == 0:  # a warning of any other rank would be seen as well
        log.warning(untested)
    log.info(write_config(config).rstrip())
    if without_effect:
        log.info(f"flags without effect here: {' '.join(without_effect)}")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    log.info(f"device {device}, {working_dtype(config.precision)}{threads}; {run_ops.describe()}")
    cuts_parameters = parallel.data_parallel_sharding_strategy == "optim_grads_params"
    if cuts_parameters and (parallel.overlap_grad_reduce or parallel.overlap_param_gather):
        log.info(
            "--overlap-grad-reduce, --overlap-param-gather: with optim_grads_params PyTorch "
            "overlaps both by itself"
        )
    if config.model.attention_dropout > 0:
        log.info(
            f"--attention-dropout {config.model.attention_dropout}: its masks depend on the "
            "layout; all else is the same under every layout"
        )
    if config.logging.eval_iters == 0:
        log.info("--eval-iters 0: no validation")


def connect(config: Config, process: Process, device: torch.device) -> Mesh:
    """Meet the other processes, and return the mesh with its process groups."""
    launch.set_rendezvous(process)
    parallel = config.parallel
    if parallel.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    # To ask costs nothing, to set two seconds of imports.
    if parallel.deterministic_mode != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(parallel.deterministic_mode)
    default = "nccl" if device.type == "cuda" else "gloo"
    backend = parallel.distributed_backend or default
    mesh = launch.plan_mesh(config, process)
    return mesh.connect(backend, parallel.distributed_timeout_minutes)


def export(config: Config, progress: Progress, tokenizer: Tokenizer, device: torch.device) -> None:
    """Export the last checkpoint as a Hugging Face folder, if --save-hf names one."""
    save, folder = config.checkpoint.save, config.checkpoint.save_hf
    if not folder or not save:
        return
    alone = Mesh.plan(1, 0).world  # the other ranks need not take part
    checkpoint = open_checkpoint(
        Path(save), ckpt_step=progress.iteration, world=alone, device=device
    )
    export_hf(checkpoint, Path(folder), tokenizer.eod, tokenizer.files)
    logs.get_logger().info(f" Hugging Face export: {folder}")
