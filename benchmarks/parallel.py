"""The parallel suite: time, traffic and memory of an update by layout, on the same cores as one process, and what overlap hides."""

import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from trivium import launch, ops
from trivium.config import flags, resolve
from trivium.data.loader import Batch
from trivium.estimate.candidate import Layout
from trivium.estimate.costs import Hardware
from trivium.precision import working_dtype
from trivium.train.build import build_trainer
from trivium.train.progress import Progress

MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 8 --group-query-attention --num-query-groups 4 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --seq-length 256 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 1000 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 4095"
)
# On a device: large enough that its own workspaces weigh little.
LARGER = (
    "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --micro-batch-size 4 --global-batch-size 32 --vocab-size 50303 "
    "--bf16"
)
TP, PP, CP, ZERO = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--use-distributed-optimizer",
)
STRATEGY, OVERLAP = (
    "--data-parallel-sharding-strategy",
    "--overlap-grad-reduce --ddp-bucket-size 1000000",
)

# name: processes, flags
LAYOUTS = {
    "one process": (1, ""),
    "dp2": (2, ""),
    "dp2, reduction overlapped": (2, OVERLAP),
    "dp2 ZeRO-1": (2, ZERO),
    "dp2 ZeRO-1, overlapped": (2, f"{ZERO} {OVERLAP} --overlap-param-gather"),
    "dp2 ZeRO-2": (2, f"{STRATEGY} optim_grads"),
    "dp2 ZeRO-2, overlapped": (2, f"{STRATEGY} optim_grads {OVERLAP}"),
    "dp2 ZeRO-3": (2, f"{STRATEGY} optim_grads_params"),
    "tp2": (2, f"{TP} 2"),
    "tp2 sequence parallel": (2, f"{TP} 2 --sequence-parallel"),
    "cp2 ring": (2, f"{CP} 2"),
    "cp2 all-gather": (2, f"{CP} 2 --cp-comm-type allgather"),
    "cp2 all-to-all": (2, f"{CP} 2 --cp-comm-type a2a"),
    "pp2 gpipe": (2, f"{PP} 2 --pipeline-schedule gpipe"),
    "pp2 1f1b": (2, f"{PP} 2"),
    "pp2 zb-h1": (2, f"{PP} 2 --pipeline-schedule zb-h1"),
    "pp2 interleaved, 2 chunks": (2, f"{PP} 2 --num-virtual-stages-per-pipeline-rank 2"),
    "pp2 zb-v": (2, f"{PP} 2 --pipeline-schedule zb-v"),
}
# On one device, which has nothing to share: what recompute saves.
RECOMPUTE = {
    "keep everything": "",
    "recompute attention": "--recompute-granularity selective",
    "recompute layers": "--recompute-granularity full",
}
WARM_UP = 2


@dataclass(frozen=True)
class Measurement:
    """Of one run: seconds of each update, bytes that one rank sends in an update, highest memory of a device (0 on a CPU), last loss."""

    seconds: list[float]
    sent: dict[str, int]
    memory: int
    loss: float


def parallel_suite(rounds: int, steps: int) -> dict[str, Any]:
    """Every layout in turn, `rounds` times; medians over all updates, beside one process with all the cores."""
    devices = torch.cuda.device_count()
    layouts = (
        LAYOUTS
        if devices != 1
        else {f"one device, {name}": (1, given) for name, given in RECOMPUTE.items()}
    )
    lines = {
        name: (processes, f"{MODEL} {LARGER if devices else ''} {given}")
        for name, (processes, given) in layouts.items()
    }
    measured: dict[str, list[Measurement]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, line in lines.items():
            measured[name].append(run_layout(*line, steps))
    results = {
        name: summary(runs) | {"estimated_memory": estimated_memory(*lines[name])}
        for name, runs in measured.items()
    }
    base = next(iter(results.values()))["milliseconds"]
    print(
        f"\n{'layout':<28}{'ms/update':>11}{'spread':>9}{'x one':>8}{'MB sent/rank':>14}{'GB estimated':>14}{'peak':>7}   what is sent"
    )
    for name, row in results.items():
        row["ratio"] = row["milliseconds"] / base
        kinds = ", ".join(f"{kind} {count / 1e6:.1f}" for kind, count in row["sent"].items())
        total, peak = (
            sum(row["sent"].values()) / 1e6,
            f"{row['memory'] / 1e9:.2f}" if row["memory"] else "-",
        )
        columns = f"{row['milliseconds']:>11.1f}{row['spread']:>8.0%}{row['ratio']:>8.2f}{total:>14.1f}{row['estimated_memory'] / 1e9:>14.2f}"
        print(f"{name:<28}{columns}{peak:>7}   {kinds}")
    for name, row in results.items():
        plain = results.get(name.replace(", overlapped", "").replace(", reduction overlapped", ""))
        if plain is not row and plain is not None:
            print(
                f"{name}: {1 - row['milliseconds'] / plain['milliseconds']:+.1%} of the update hidden"
            )
    losses = {row["loss"] for row in results.values()}
    print(f"losses after {WARM_UP + steps} updates agree to {max(losses) - min(losses):.1e}")
    return results


def summary(runs: list[Measurement]) -> dict[str, Any]:
    """spread: half the distance between the quartiles, as a share of the median."""
    seconds = sorted(second for one in runs for second in one.seconds)
    quarter = len(seconds) // 4
    middle = median(seconds)
    spread = (seconds[-1 - quarter] - seconds[quarter]) / 2 / middle
    return {
        "milliseconds": middle * 1e3,
        "spread": spread,
        "sent": runs[0].sent,
        "memory": max(one.memory for one in runs),
        "loss": runs[0].loss,
    }


def estimated_memory(processes: int, arguments: str) -> int:
    """Bytes of rank 0 at its fullest, by the formulas of tools/plan.py."""
    config = resolve(flags.parse(arguments.split()).config, processes)
    return Layout(config, config.data.vocab_size + 1, processes, Hardware()).memory[0].total


def run_layout(processes: int, arguments: str, steps: int) -> Measurement:
    """One run on its own processes, which share this machine's cores evenly; what rank 0 measured."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # its server imports once, and starts no device
    context.set_forkserver_preload(["torch", "torch.distributed", "trivium.train.build"])
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        calls = [
            (
                launch.Process(rank, processes, rank),
                arguments,
                steps,
                str(Path(folder) / "store"),
                answers,
            )
            for rank in range(processes)
        ]
        workers = [context.Process(target=measure, args=call) for call in calls]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise ValueError(
            f"a process of the layout {arguments.removeprefix(MODEL).strip() or 'of one process'} failed; its own message is above"
        )
    return answers.get()


def measure(process: launch.Process, arguments: str, steps: int, store: str, answers) -> None:
    """A rank's updates on made-up tokens, the first of them not timed, one more to count what is sent."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    config = resolve(flags.parse(arguments.split()).config, process.world_size)
    device = launch.choose_device("auto", process.local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    mesh = launch.plan_mesh(config, process).connect(backend, 10, init_method=f"file://{store}")
    run_ops = ops.select_ops("auto", device, working_dtype(config.precision))
    trainer = build_trainer(
        config, mesh, device, run_ops, config.data.vocab_size + 1, config.data.vocab_size
    )
    batches, progress, seconds = random_batches(config, mesh.dp.rank, mesh.dp.size), Progress(), []
    for step in range(WARM_UP + steps):
        start = time.perf_counter()
        result = trainer.step(progress, batches, stop=False)
        progress, loss = (
            result.progress,
            (result.loss_sum / result.num_predictions).item(),
        )  # waits for the update
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    with Traffic() as traffic:
        trainer.step(progress, batches, stop=False).grad_norm.item()
    if process.rank == 0:
        answers.put(Measurement(seconds, traffic.sent, memory, loss))
    mesh.close()
    launch.leave(0, process)


def random_batches(config, rank: int, size: int):
    """Endless micro-batches of one data-parallel rank; over all ranks they are the same samples whatever the layout."""
    micro, length, sample = (
        config.batch.micro_batch_size,
        config.batch.seq_length,
        rank * config.batch.micro_batch_size,
    )
    while True:
        samples = torch.arange(sample, sample + micro)
        ids = torch.stack(
            [
                torch.randint(
                    config.data.vocab_size,
                    (length + 1,),
                    generator=torch.Generator().manual_seed(int(k)),
                )
                for k in samples
            ]
        )
        yield Batch(
            ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(micro, length), samples
        )
        sample += micro * size


# operation: its name, the argument that holds what is moved, its share in units of (n - 1) / n
KINDS = {
    "allreduce_": ("all-reduce", 0, 2),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "_allgather_base_": ("all-gather", 0, 1),
    "alltoall_base_": ("all-to-all", 0, 1),
    "send": ("send", 0, None),
}


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends, with collectives by their ring algorithms: (n - 1) / n of a tensor, twice that to all-reduce."""

    def __init__(self):
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and (kind := KINDS.get(func._opname)):
            name, position, shares = kind
            tensors = (
                args[position] if isinstance(args[position], list | tuple) else [args[position]]
            )
            size = sum(tensor.nbytes for tensor in tensors)
            if shares is not None:
                group = dist.ProcessGroup.unbox(
                    next(argument for argument in args if isinstance(argument, torch.ScriptObject))
                )
                n = group.size()
                size = size * shares * (n - 1) // n
            self.sent[name] = self.sent.get(name, 0) + size
        return func(*args, **(kwargs or {}))
