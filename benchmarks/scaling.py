"""The scaling suite: two processes on the cores of one, and speed by model size and length.

Trivium runs beside its peers, over model size and over sequence length.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.candidate import Candidate, Result
from benchmarks.engine import vocabulary
from benchmarks.layouts import Job, Measurement, megabytes_sent, run_layout, summary
from benchmarks.models import GPT, LLAMA
from benchmarks.peer_plain import plain
from benchmarks.side_by_side import Limits
from benchmarks.table import Column, Row, Table, number, ratio, share
from benchmarks.train import measure
from trivium.estimate.parameters import total_parameters

# name: processes, flags. Each has the micro-batch that suits it: a pipeline needs several.
LAYOUTS = {
    "one process": (1, ""),
    "dp2": (2, "--micro-batch-size 8"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 2"),
}
LAYOUT_STEPS = 2  # timed in each round
LAYOUT_ROUNDS = 2  # at the most


@dataclass(frozen=True)
class Size:
    """The shape of a model."""

    layers: int
    width: int
    heads: int
    words: int


SIZES = {
    "2M": Size(4, 128, 4, 8192),
    "10M": Size(6, 256, 4, 16384),
    "25M": Size(6, 384, 6, 32000),
    "100M": Size(12, 768, 12, 32000),
    "300M": Size(24, 1024, 16, 32000),
}
SEQUENCES = 4
LENGTH = 256  # tokens of each sequence, so that an update has 1,024
LENGTHS = (256, 512, 1024, 2048, 4096)  # one sequence an update
PAIR_ROUNDS = 8  # at the most
PAIR_SECONDS = 25.0  # after which a pair begins no further update
PATIENCE = 300.0  # seconds that the largest model is waited for after that
# Of one engine at the most: weights, gradients, two moments, and a copy while it is built.
BYTES_PER_PARAMETER = 20


def scaling_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Measure layouts, model sizes and sequence lengths.

    options: rounds, steps, and whether peers take part
    """
    results: dict[str, Any] = {"layouts": layouts(min(options.rounds, LAYOUT_ROUNDS))}
    sizes = {name: shape_flags(size, SEQUENCES, LENGTH) for name, size in SIZES.items()}
    title = f"model size, {SEQUENCES} sequences of {LENGTH} tokens an update"
    results["sizes"] = compare(title, sizes, options)
    lengths = {f"{length} tokens": shape_flags(SIZES["25M"], 1, length) for length in LENGTHS}
    results["lengths"] = compare("25M, one sequence an update", lengths, options)
    return results


LAYOUT_TABLE = Table(
    "scaling, gpt shape",
    28,
    [
        Column("ms/update", 11, number("milliseconds", 1)),
        Column("spread", 9, share("spread", 1)),
        Column("x one", 8, ratio("ratio")),
        Column("MB sent/rank", 14, megabytes_sent),
        Column("loss", 10, number("loss", 5)),
    ],
)


def layouts(rounds: int) -> dict[str, Row]:
    """Measure the GPT on all cores: one process with a thread for each, and two that share them."""
    measured: dict[str, list[Measurement]] = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        for name, (processes, given) in LAYOUTS.items():
            job = Job(processes, f"{GPT} {given}", LAYOUT_STEPS)
            measured[name].append(run_layout(job))
    results = {name: summary(runs) for name, runs in measured.items()}
    one = results["one process"]["milliseconds"]
    print(f"\n{LAYOUT_TABLE.header()}")
    for name, row in results.items():
        row["ratio"] = row["milliseconds"] / one
        print(LAYOUT_TABLE.line(name, row))
    return results


def shape_flags(size: Size, sequences: int, length: int) -> str:
    """Return the flags that differ from those of the train suite."""
    return (
        f"--num-layers {size.layers} --hidden-size {size.width}"
        f" --num-attention-heads {size.heads} --vocab-size {size.words - 1}"
        f" --seq-length {length} --max-position-embeddings {length}"
        f" --micro-batch-size {sequences} --global-batch-size {sequences}"
    )


PAIR_TABLE = Table(
    "",
    12,
    [
        Column("parameters", 12, lambda row: f"{row['parameters'] / 1e6:.1f}M"),
        Column("gpt", 10, lambda row: rate_of(row["gpt"], "Trivium")),
        Column("PyTorch", 10, lambda row: rate_of(row["gpt"], "PyTorch")),
        Column("Trivium x", 11, lambda row: ratio("trivium_is_faster")(row["gpt"])),
        Column("llama", 10, lambda row: rate_of(row["llama"], "Trivium")),
        Column("transformers", 14, lambda row: rate_of(row["llama"], "transformers")),
        Column("Trivium x", 11, lambda row: ratio("trivium_is_faster")(row["llama"])),
    ],
)


def rate_of(pair: Row, name: str) -> str:
    """Write an engine's tokens/s, or why there are none."""
    if name not in pair:
        return "-"
    found = pair[name]
    if "left_out" in found:
        return found["left_out"]
    return f"{found['tokens_per_second']:.0f}"


def compare(title: str, flags: dict[str, str], options: argparse.Namespace) -> dict[str, Row]:
    """Measure tokens/s of a GPT and a Llama of each shape, in fp32, each with its peer.

    title: what the table is called
    flags: the shapes by name
    options: rounds, steps, and whether peers take part
    """
    results: dict[str, Row] = {}
    print(f"\n{title}\n{PAIR_TABLE.header()}")
    engines = 2 if options.peers else 1
    rounds = min(options.rounds * options.steps, PAIR_ROUNDS)
    for name, given in flags.items():
        gpt = gpt_pair(given)[:engines]
        config = gpt[0].config()
        llama = llama_pair(given, feed_forward(config.model.hidden_size))[:engines]
        parameters = total_parameters(config.model, vocabulary(config))
        row: Row = {"parameters": parameters}
        results[name] = row
        missing = missing_memory(parameters, engines)
        if missing > 0:
            row["left_out"] = f"{missing / 1e9:.1f} GB of memory too little"
            print(f"{name:<12}left out: {row['left_out']}")
            continue
        row["gpt"] = measure_pair(gpt, rounds)
        row["llama"] = measure_pair(llama, rounds)
        print(PAIR_TABLE.line(name, row), flush=True)
    return results


def gpt_pair(given: str) -> list[Candidate]:
    """Return Trivium and its peer for a GPT.

    given: flags of the shape
    """
    arguments = f"{GPT} {given}"
    return [
        Candidate("Trivium", peers.trivium, arguments),
        Candidate("PyTorch", plain, arguments),
    ]


def llama_pair(given: str, feed_forward_width: int) -> list[Candidate]:
    """Return Trivium and its peer for a Llama.

    given: flags of the shape
    """
    arguments = f"{LLAMA} {given} --ffn-hidden-size {feed_forward_width}"
    needs = peers.TRANSFORMERS
    return [
        Candidate("Trivium", peers.trivium, arguments),
        Candidate("transformers", peers.transformers_llama, arguments, needs=needs),
    ]


def feed_forward(width: int) -> int:
    """Return 8/3 of the width, as SwiGLU has it, rounded up to a multiple of 64."""
    return -(-width * 8 // 3 // 64) * 64


def measure_pair(pair: list[Candidate], rounds: int) -> Row:
    """Run one or two engines in turn; Trivium is the first.

    rounds: timed updates of each
    """
    deadline = time.monotonic() + PAIR_SECONDS
    limits = Limits(rounds, deadline, probe=False, patience=PATIENCE)
    found: Row = {}
    rates: list[float] = []
    for name, result in measure(pair, limits).items():
        found[name] = describe(result)
        if result.failure is None:
            rates.append(result.tokens_per_second)
    if len(rates) == 2:
        found["trivium_is_faster"] = rates[0] / rates[1]
    return found


def describe(result: Result) -> Row:
    """Return what the results file holds of one engine."""
    if result.failure:
        return {"left_out": result.failure.reason}
    return {
        "tokens_per_second": result.tokens_per_second,
        "spread": result.spread,
        "updates": len(result.timed),
        "deviation": result.deviation,
    }


def missing_memory(parameters: int, engines: int) -> float:
    """Return the bytes short of what engines need at once; 0 if unknown or enough.

    parameters: of the model
    engines: how many hold it at the same time
    """
    needed = parameters * BYTES_PER_PARAMETER * engines
    if torch.cuda.is_available():
        free_on_device, _ = torch.cuda.mem_get_info()
        return max(0.0, needed - free_on_device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    facts = dict(line.split(":") for line in lines)
    available = int(facts["MemAvailable"].split()[0]) * 1024
    return max(0.0, needed - available)
