"""Pretrain a GPT: configuration, mesh, data, model, optimizer, checkpoint, training. `python pretrain_gpt.py --help` lists the flags."""

import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

# Threads that wait asleep, before torch starts any: beside other busy processes, spinning ones make a CPU run several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from trivium import launch, logs, ops
from trivium.checkpoint.load import open_checkpoint
from trivium.checkpoint.manifest import CheckpointError
from trivium.comm import CommunicationError
from trivium.config import Config, ConfigError, FlagError, flags, resolve
from trivium.config.presets import PRESETS, published_vocabulary
from trivium.config.validate import validate
from trivium.data.dataset import Datasets, build_datasets
from trivium.data.errors import DataError
from trivium.data.loader import MicroBatches
from trivium.data.tokenizer import Tokenizer, build_tokenizer
from trivium.estimate.parameters import total_parameters
from trivium.interop import families
from trivium.interop.export import export_hf
from trivium.mesh import Mesh
from trivium.precision import working_dtype
from trivium.train.build import build_trainer
from trivium.train.load_modes import with_cooldown
from trivium.train.loop import Data, run
from trivium.train.report import Reporter
from trivium.train.resume import RunState, load_problems
from trivium.train.schedule import Progress

# Seconds, more than rank 0 may be behind on a busy machine: a launcher ends all ranks as soon as one has left, and so ends this wait too.
LAST_TO_LEAVE = 60.0


def main(argv: list[str], process: launch.Process) -> None:
    """One run, from the command line to the last checkpoint."""
    log = logs.setup(process.rank)
    request = flags.parse(argv, families.read_flags)
    if request.list_presets:
        list_presets()
        return
    config = checked(request.config, process.world_size)
    device, dtype = (
        launch.choose_device(config.parallel.device, process.local_rank),
        working_dtype(config.precision),
    )
    if device.type == "cpu" and (threads := launch.threads_of_a_process()):
        torch.set_num_threads(threads)
    run_ops = ops.select_ops(
        config.parallel.kernels, device, dtype, config.parallel.attention_backend
    )
    tokenizer = build_tokenizer(**config.data.tokenizer)
    announce(config, request.without_effect, run_ops, device)

    launch.set_rendezvous(process)
    if config.parallel.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    if (
        config.parallel.deterministic_mode != torch.are_deterministic_algorithms_enabled()
    ):  # to ask costs nothing, to set two seconds of imports
        torch.use_deterministic_algorithms(config.parallel.deterministic_mode)
    backend = config.parallel.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    mesh = launch.plan_mesh(config, process).connect(
        backend, config.parallel.distributed_timeout_minutes
    )

    trainer = build_trainer(config, mesh, device, run_ops, tokenizer.vocab_size, tokenizer.eod)
    state = RunState(trainer, tokenizer.fingerprint)
    progress = state.restore()
    num_samples = samples_needed(config, progress, state.data_samples)
    datasets = build_datasets_of(config, tokenizer, num_samples)
    state.read_from(datasets.fingerprint, num_samples)
    log.info(
        f" {total_parameters(config.model, tokenizer.vocab_size):,} parameters; training from iteration {progress.iteration}"
    )

    reporter = Reporter(config, mesh, device, tokenizer.vocab_size, progress.iteration)
    progress = run(
        trainer, data_of(config, datasets, tokenizer, mesh, device), state, reporter, progress
    )
    picture = reporter.close()
    if picture:
        log.info(f" loss curve: {picture}")
    if (
        config.checkpoint.save_hf
        and mesh.rank == 0
        and progress.iteration == config.batch.train_iters
    ):
        checkpoint = open_checkpoint(
            Path(config.checkpoint.save),
            ckpt_step=progress.iteration,
            world=Mesh.plan(1, 0).world,
            device=device,
        )
        export_hf(checkpoint, Path(config.checkpoint.save_hf), tokenizer.eod, tokenizer.files)
        log.info(f" Hugging Face export: {config.checkpoint.save_hf}")
    mesh.close()


def checked(config: Config, world_size: int) -> Config:
    """The resolved configuration; ConfigError with everything that is wrong with it."""
    config, problems = with_cooldown(resolve(config, world_size))
    problems += validate(config, world_size) + load_problems(config.model, config.checkpoint)
    if config.checkpoint.save_hf:
        problems += families.export_problems(config.model)
    if problems:
        raise ConfigError(problems)
    return config


def announce(
    config: Config, without_effect: tuple[str, ...], run_ops: ops.Ops, device: torch.device
) -> None:
    """What runs, and what the user should know about it."""
    log = logs.get_logger()
    log.info(flags.write_config(config).rstrip())
    if without_effect:
        log.info(f"flags without effect here: {' '.join(without_effect)}")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    log.info(f"device {device}, {working_dtype(config.precision)}{threads}; {run_ops.describe()}")
    parallel = config.parallel
    if parallel.data_parallel_sharding_strategy == "optim_grads_params" and (
        parallel.overlap_grad_reduce or parallel.overlap_param_gather
    ):
        log.info(
            "--overlap-grad-reduce, --overlap-param-gather: with optim_grads_params PyTorch overlaps both by itself"
        )
    if config.model.attention_dropout > 0:
        log.info(
            f"--attention-dropout {config.model.attention_dropout}: its masks depend on the layout; all else is the same under every layout"
        )
    if config.logging.eval_iters == 0:
        log.info("--eval-iters 0: no validation")


def samples_needed(config: Config, progress: Progress, ordered: int) -> int:
    """For how many samples the order of the training data is made: what the run needs, and not less than it was made for before (`ordered`).

    A run resumed with smaller batches has consumed more than its iterations now say; an order of fewer epochs is another order.
    """
    batch = config.batch
    planned = batch.train_samples or batch.train_iters * batch.global_batch_size
    return max(
        planned,
        ordered,
        progress.consumed_samples
        + (batch.train_iters - progress.iteration) * batch.global_batch_size,
    )


def build_datasets_of(config: Config, tokenizer: Tokenizer, num_samples: int) -> Datasets:
    """Training of `num_samples`, validation and test; the last two are one evaluation long."""
    data, batch = config.data, config.batch
    evaluated = config.logging.eval_iters * batch.global_batch_size
    return build_datasets(
        data.data_path,
        data.split,
        batch.seq_length,
        batch.seed,
        (num_samples, evaluated, evaluated),
        train_data_path=data.train_data_path,
        valid_data_path=data.valid_data_path,
        test_data_path=data.test_data_path,
        cache_path=data.data_cache_path,
        mock=data.mock_data,
        vocab_size=tokenizer.vocab_size,
    )


def data_of(
    config: Config, datasets: Datasets, tokenizer: Tokenizer, mesh: Mesh, device: torch.device
) -> Data:
    """The datasets as micro-batches of this rank."""
    batches = partial(
        MicroBatches,
        micro_batch_size=config.batch.micro_batch_size,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        eod_mask_loss=config.data.eod_mask_loss,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    evaluated = config.logging.eval_iters * config.batch.global_batch_size
    valid, test = (
        dataset and partial(batches, dataset, end=evaluated)
        for dataset in (datasets.valid, datasets.test)
    )
    return Data(lambda start: batches(datasets.train, start=start), valid, test)


def list_presets() -> None:
    """Every preset, with the parameters its shape really has at its published vocabulary."""
    for name, values in PRESETS.items():
        model, vocabulary = (
            resolve(Config.of(values | {"seq_length": 1024}), 1).model,
            published_vocabulary(name),
        )
        shape = f"{model.num_layers} layers, {model.hidden_size} wide, {model.num_attention_heads} heads"
        logs.get_logger().info(
            f"{name:15} {total_parameters(model, vocabulary):>15,} parameters with a vocabulary of {vocabulary:,}: {shape}"
        )


def cli(argv: list[str]) -> int:
    """Run, and turn what a user can mend into one clear message and an exit status: 2 for the configuration, 1 for everything else."""
    process = launch.read_environment()
    try:
        main(argv, process)
    except ConfigError as error:
        if process.rank > 0:  # every rank finds the same, and rank 0 tells it
            with suppress(KeyboardInterrupt):
                time.sleep(LAST_TO_LEAVE)
            return 2
        return fail(process, str(error), 2)
    except ValueError as error:
        if not isinstance(error, FlagError | CheckpointError | DataError):
            raise
        return fail(process, str(error), 2 if isinstance(error, FlagError) else 1)
    except OSError as error:
        return fail(
            process, f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}", 1
        )
    except CommunicationError as error:
        return fail(process, str(error), 1)
    except RuntimeError as error:
        problem = launch.missed_meeting(error, process)
        if problem is None:
            raise
        return fail(process, problem, 1)
    except KeyboardInterrupt:
        return fail(
            process,
            "interrupted; the same command with --load resumes from the last checkpoint",
            130,
        )
    return 0


def fail(process: launch.Process, message: str, status: int) -> int:
    """Say why on stderr; the exit status."""
    rank = f"[rank {process.rank}] " if process.rank else ""
    sys.stderr.write(f"{rank}pretrain_gpt.py: {message}\n")
    return status


if __name__ == "__main__":
    launch.leave(cli(sys.argv[1:]), launch.read_environment())
