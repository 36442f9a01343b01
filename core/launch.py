"""This process among those of its job: its rank, its device, how it meets the others and leaves.

Reads the variables of torchrun or Slurm, and sets none but the meeting point.
"""

import atexit
import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from .config import Config, ConfigError, FlagError, key_value_copies, optimizer_shards
from .mesh import Mesh

# The variables of torchrun, and of a step that srun started: rank, processes, rank on the node.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
# The newest version of PyTorch (major, minor) that the tests run with.
TESTED_TORCH = (2, 13)
# Seconds, more than rank 0 may be behind on a busy machine. A launcher ends all ranks as soon as
# one has left, and so ends this wait too.
LAST_TO_LEAVE = 60.0


@dataclass(frozen=True)
class Process:
    """One process of a job, as its launcher describes it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_environment(env: Mapping[str, str] | None = None) -> Process:
    """Return this process: as torchrun says, else as srun's step says, else a single one.

    A Slurm batch script itself also sees SLURM_PROCID, but belongs to no step: it is one process,
    whatever SLURM_NTASKS says.
    """
    env = os.environ if env is None else env
    for rank, world_size, local_rank in LAUNCHERS:
        if rank in env and world_size in env:
            local = int(env.get(local_rank, 0))
            return Process(int(env[rank]), int(env[world_size]), local)
    return Process()


def threads_of_a_process(
    env: Mapping[str, str] | None = None, cores: int | None = None
) -> int | None:
    """Return how many threads a process should compute with on a CPU; None to leave it as it is.

    That is its share of the cores it may run on. torchrun gives each of several processes one
    thread unless OMP_NUM_THREADS is set, whatever number of cores that leaves idle. Any other
    OMP_NUM_THREADS is the user's word.
    """
    env = os.environ if env is None else env
    if "LOCAL_WORLD_SIZE" not in env:
        return None
    given = env.get("OMP_NUM_THREADS")
    torchruns_default = given == "1" and "TORCHELASTIC_RUN_ID" in env
    if given is not None and not torchruns_default:
        return None
    cores = _usable_cores() if cores is None else cores
    return max(1, cores // int(env["LOCAL_WORLD_SIZE"]))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def untested_torch(version: str = torch.__version__) -> str | None:
    """Return a warning if `version` of PyTorch is newer than the tested ones; else None."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return None
    running = int(numbers[1]), int(numbers[2])
    if running <= TESTED_TORCH:
        return None
    tested = ".".join(map(str, TESTED_TORCH))
    return f"torch {version} is newer than {tested}, the newest that Trivium is tested with"


def plan_mesh(config: Config, process: Process) -> Mesh:
    """Return the mesh of a validated configuration, without process groups."""
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


def set_rendezvous(process: Process, env: MutableMapping[str, str] | None = None) -> None:
    """Name the meeting point of srun's processes, as torchrun would have named it.

    That is the first node of the step, and a port made from the job id. Raises ConfigError where
    several processes have no meeting point.
    """
    env = os.environ if env is None else env
    if "SLURM_STEP_NODELIST" in env:
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        # Another port for another job of the node, the same one for all processes of a job.
        job = int(env.get("SLURM_JOB_ID", 0))
        env.setdefault("MASTER_PORT", str(20000 + job % 20000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if process.world_size == 1 or not missing or dist.is_initialized():
        return
    names = " and ".join(missing)
    problem = f"WORLD_SIZE is {process.world_size}, but {names} not set"
    raise ConfigError([f"{problem}; start with torchrun, or export them"])


def missed_meeting(error: RuntimeError, process: Process) -> str | None:
    """Return what to tell the user if the processes did not all find each other at the start.

    None if `error` is any other one.
    """
    said = " ".join(str(error).split()).split(", keys: ")[0]
    of_the_store = isinstance(error, dist.DistStoreError | dist.DistNetworkError)
    if not of_the_store and not said.startswith("Gloo connectFullMesh failed"):
        return None
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"rank {process.rank}: the {process.world_size} processes did not all meet at {where}: "
        f"{said.rstrip('.')}; start all of them where they reach that address, "
        "or raise --distributed-timeout-minutes"
    )


def wait_to_leave() -> None:
    """Wait until rank 0 has told the error that all ranks have found, and has ended the job.

    A rank that left first would have its own exit reported by the launcher, and no message.
    """
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(LAST_TO_LEAVE)


def leave(status: int, process: Process) -> NoReturn:
    """End this process with an exit status.

    One of several ends at once, without the interpreter's own clean-up: gloo's threads may still
    hold tensors, and an interpreter that goes down meanwhile aborts. What must not be left undone
    is done here: loaders end their worker processes, and written lines reach their files.
    """
    if process.world_size == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: gpu003 of `gpu[003-010,17],login1`."""
    head = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if not head:
        raise ValueError(f"SLURM_STEP_NODELIST {nodelist!r} names no host")
    name, ranges, rest = head.groups(default="")
    first = re.split(r"[-,]", ranges)[0]
    return name + first + rest


def choose_device(requested: str, local_rank: int) -> torch.device:
    """Return the device of this process for `--device {auto,cpu,cuda}`.

    A ROCm build of torch answers to cuda as well. Raises ConfigError where no process has such a
    device, and FlagError where there is none left for this one.
    """
    available = torch.cuda.is_available()
    if requested == "cpu" or (requested == "auto" and not available):
        return torch.device("cpu")
    if not available:
        problem = "--device cuda, but torch sees no CUDA or ROCm device here"
        remedy = "use --device cpu, or a torch built for your accelerator"
        raise ConfigError([f"{problem}; {remedy}"])
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise FlagError(
            f"--device {requested}: local rank {local_rank} has no device of its own; "
            f"start at most {count} processes on this node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
