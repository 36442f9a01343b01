"""The parallel suite: time, traffic and memory of an update by layout, beside one process.

All layouts run on the same cores. The suite also tells how much of an update overlap hides.
"""

from typing import Any

import torch

from benchmarks.candidate import parse_config
from benchmarks.engine import vocabulary
from benchmarks.layouts import WARM_UP, Job, Measurement, megabytes_sent, run_layout, summary
from benchmarks.table import Column, Row, Table, number, ratio, share
from trivium.estimate.costs import Hardware
from trivium.estimate.run_plan import RunPlan

MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 8"
    " --group-query-attention --num-query-groups 4 --swiglu --normalization RMSNorm"
    " --position-embedding-type rope --disable-bias-linear"
    " --attention-dropout 0 --hidden-dropout 0"
    " --seq-length 256 --micro-batch-size 1 --global-batch-size 8"
    " --train-iters 1000 --lr 1e-3"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 4095"
)
# On a GPU: large enough that its own workspaces weigh little.
LARGER = (
    "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024"
    " --micro-batch-size 4 --global-batch-size 32 --vocab-size 50303 --bf16"
)
TP = "--tensor-model-parallel-size"
PP = "--pipeline-model-parallel-size"
CP = "--context-parallel-size"
ZERO = "--use-distributed-optimizer"
STRATEGY = "--data-parallel-sharding-strategy"
OVERLAP = "--overlap-grad-reduce --ddp-bucket-size 1000000"

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
OVERLAPPED = (", overlapped", ", reduction overlapped")  # ends of names
# On one GPU, which has nothing to share: what recompute saves.
RECOMPUTE = {
    "one device, keep everything": (1, ""),
    "one device, recompute attention": (1, "--recompute-granularity selective"),
    "one device, recompute layers": (1, "--recompute-granularity full"),
}


def parallel_suite(rounds: int, steps: int) -> dict[str, Any]:
    """Run every layout in turn, and return medians over all updates by layout.

    rounds: runs of each layout
    steps: timed updates of each run
    """
    jobs = jobs_for(torch.cuda.device_count(), steps)
    measured: dict[str, list[Measurement]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            measured[name].append(run_layout(job))
    results: dict[str, Row] = {}
    for name, runs in measured.items():
        results[name] = summary(runs) | {"estimated_memory": estimated_memory(jobs[name])}
    first = next(iter(results.values()))
    for row in results.values():
        row["ratio"] = row["milliseconds"] / first["milliseconds"]
    report(results, steps)
    return results


def jobs_for(devices: int, steps: int) -> dict[str, Job]:
    """Return the runs that suit a machine with so many GPUs.

    steps: timed updates of each run
    """
    layouts = RECOMPUTE if devices == 1 else LAYOUTS
    model = f"{MODEL} {LARGER}" if devices else MODEL
    jobs: dict[str, Job] = {}
    for name, (processes, given) in layouts.items():
        jobs[name] = Job(processes, f"{model} {given}", steps)
    return jobs


def estimated_memory(job: Job) -> int:
    """Return the bytes of rank 0 at its fullest, by the formulas of tools/plan.py."""
    config = parse_config(job.arguments, job.processes)
    return RunPlan(config, vocabulary(config), job.processes, Hardware()).memory[0].total


def peak_memory(row: Row) -> str:
    """Write the measured peak in GB; a CPU has none."""
    if not row["memory"]:
        return "-"
    return f"{row['memory'] / 1e9:.2f}"


TABLE = Table(
    "layout",
    28,
    [
        Column("ms/update", 11, number("milliseconds", 1)),
        Column("spread", 9, share("spread")),
        Column("x one", 8, ratio("ratio")),
        Column("MB sent/rank", 14, megabytes_sent),
        Column("GB estimated", 14, number("estimated_memory", 2, 1e-9)),
        Column("peak", 7, peak_memory),
    ],
)


def report(results: dict[str, Row], steps: int) -> None:
    """Print a line for each layout, what overlap hides, and how far the losses agree."""
    print(f"\n{TABLE.header()}   what is sent")
    for name, row in results.items():
        kinds: list[str] = []
        for kind, count in row["sent"].items():
            kinds.append(f"{kind} {count / 1e6:.1f}")
        print(f"{TABLE.line(name, row)}   {', '.join(kinds)}")
    for name, row in results.items():
        plain = without_overlap(name)
        if plain != name and plain in results:
            hidden = 1 - row["milliseconds"] / results[plain]["milliseconds"]
            print(f"{name}: {hidden:+.1%} of the update hidden")
    losses = {row["loss"] for row in results.values()}
    apart = max(losses) - min(losses)
    print(f"losses after {WARM_UP + steps} updates agree to {apart:.1e}")


def without_overlap(name: str) -> str:
    """Return the name of the same layout without overlap."""
    for ending in OVERLAPPED:
        name = name.removesuffix(ending)
    return name
