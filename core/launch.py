"""Where this process stands: its rank, the number of processes, its device. Reads torchrun's or Slurm's variables, sets none but the rendezvous."""

import atexit
import contextlib
import os
import re
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from .config import Config, ConfigError, FlagError, key_value_copies, optimizer_shards
from .mesh import Mesh


@dataclass(frozen=True)
class Process:
    """One process of a job, as its launcher describes it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_environment(env: dict[str, str] | None = None) -> Process:
    """torchrun's RANK, WORLD_SIZE, LOCAL_RANK first; else the step that srun started; else a single process.

    A batch script itself also sees SLURM_PROCID, but belongs to no step: it is one process, whatever SLURM_NTASKS says.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        return Process(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        return Process(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", 0)),
        )
    return Process()


def threads_of_a_process(env: dict[str, str] | None = None, cores: int | None = None) -> int | None:
    """How many threads a process should compute with on a CPU, where that is not what it has: its share of the cores it may run on.

    torchrun gives each of several processes one thread unless OMP_NUM_THREADS is set, whatever number of cores that leaves idle. Any
    other OMP_NUM_THREADS is the user's word.
    """
    env = os.environ if env is None else env
    cores = (
        len(os.sched_getaffinity(0))
        if cores is None and hasattr(os, "sched_getaffinity")
        else cores or os.cpu_count() or 1
    )
    share = max(1, cores // int(env.get("LOCAL_WORLD_SIZE", 1)))
    launchers_default = env.get("OMP_NUM_THREADS") == "1" and "TORCHELASTIC_RUN_ID" in env
    if "LOCAL_WORLD_SIZE" not in env or ("OMP_NUM_THREADS" in env and not launchers_default):
        return None
    return share


def plan_mesh(config: Config, process: Process) -> Mesh:
    """The mesh of a validated configuration, without process groups."""
    parallel = config.parallel
    return Mesh.plan(
        process.world_size,
        process.rank,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
        shards=optimizer_shards(parallel, process.world_size),
        kv_copies=key_value_copies(config.model, parallel),
    )


def set_rendezvous(process: Process, env: dict[str, str] | None = None) -> None:
    """Under srun, name the meeting point that torchrun would have named: the first node of the step, a port made from the job id.

    Raises ConfigError where several processes have none.
    """
    env = os.environ if env is None else env
    if "SLURM_STEP_NODELIST" in env:
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if process.world_size > 1 and missing and not dist.is_initialized():
        raise ConfigError(
            [
                f"WORLD_SIZE is {process.world_size}, but {' and '.join(missing)} not set; start with torchrun, or export them"
            ]
        )


def missed_meeting(error: RuntimeError, process: Process) -> str | None:
    """What to tell the user if `error` is that the processes did not all find each other at the start; None for any other error."""
    said = " ".join(str(error).split()).split(", keys: ")[0]
    if not isinstance(error, dist.DistStoreError | dist.DistNetworkError) and not said.startswith(
        "Gloo connectFullMesh failed"
    ):
        return None
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"rank {process.rank}: the {process.world_size} processes did not all meet at {where}: {said.rstrip('.')}; "
        "start all of them where they reach that address, or raise --distributed-timeout-minutes"
    )


def leave(status: int, process: Process) -> NoReturn:
    """End this process. One of several at once: gloo's threads may still hold tensors, and an interpreter that goes down meanwhile aborts."""
    if process.world_size == 1:
        sys.exit(status)
    atexit._run_exitfuncs()  # the loader ends its processes, writers of logs write what they hold
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[003-010,17],login1` gives `gpu003`."""
    head = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if not head:
        raise ValueError(f"SLURM_STEP_NODELIST {nodelist!r} names no host")
    name, ranges, rest = head.groups()
    return name + (re.split(r"[-,]", ranges)[0] if ranges else "") + (rest or "")


def choose_device(requested: str, local_rank: int) -> torch.device:
    """The device of this process for `--device {auto,cpu,cuda}`; a ROCm build of torch answers to cuda as well.

    Raises ConfigError where there is none for any process, FlagError where there is none for this one.
    """
    available = torch.cuda.is_available()
    if requested == "cpu" or (requested == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(
            [
                "--device cuda, but torch sees no CUDA or ROCm device here; use --device cpu, or a torch built for your accelerator"
            ]
        )
    if local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise FlagError(
            f"--device {requested}: local rank {local_rank} has no device of its own; start at most {count} processes on this node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
