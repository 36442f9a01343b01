"""The scaling suite: one process against two on the same cores, and Trivium beside its peers over model size and sequence length."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import benchmarks.peers as peers
from benchmarks.parallel import run_layout, summary
from benchmarks.train import GPT, LLAMA, measure
from benchmarks.side_by_side import Candidate
from trivium.estimate.flops import total_parameters

# name: processes, flags. Each has the micro-batch that suits it: a pipeline needs several.
LAYOUTS = {
    "one process": (1, ""),
    "dp2": (2, "--micro-batch-size 8"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 2"),
}
LAYOUT_STEPS = 2  # timed in each round
# layers, width, heads, vocabulary
SIZES = {
    "2M": (4, 128, 4, 8192),
    "10M": (6, 256, 4, 16384),
    "25M": (6, 384, 6, 32000),
    "100M": (12, 768, 12, 32000),
    "300M": (24, 1024, 16, 32000),
}
SEQUENCES = 4
LENGTH = 256  # tokens of each, so that an update has 1,024
LENGTHS = (256, 512, 1024, 2048, 4096)  # one sequence an update
LAYOUT_ROUNDS, PAIR_ROUNDS = 2, 8  # at the most
PAIR_SECONDS, PATIENCE = (
    25.0,
    300.0,
)  # after which a pair begins no further update, and for which the largest is waited for all the same
BYTES_PER_PARAMETER = (
    20  # of one engine at the most: weights, gradients, two moments, and a copy while it is built
)


def scaling_suite(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"layouts": layouts(min(options.rounds, LAYOUT_ROUNDS))}
    rows = {name: shaped(size, SEQUENCES, LENGTH) for name, size in SIZES.items()}
    results["sizes"] = compare(
        f"model size, {SEQUENCES} sequences of {LENGTH} tokens an update", rows, options
    )
    rows = {f"{length} tokens": shaped(SIZES["25M"], 1, length) for length in LENGTHS}
    results["lengths"] = compare("25M, one sequence an update", rows, options)
    return results


def layouts(rounds: int) -> dict[str, Any]:
    """The gpt shape on all cores: one process with a thread for each, and two that share them."""
    measured: dict[str, list] = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        for name, (processes, given) in LAYOUTS.items():
            measured[name].append(run_layout(processes, f"{GPT} {given}", LAYOUT_STEPS))
    results = {name: summary(runs) for name, runs in measured.items()}
    one = results["one process"]["milliseconds"]
    print(
        f"\n{'scaling, gpt shape':<28}{'ms/update':>11}{'spread':>9}{'x one':>8}{'MB sent/rank':>14}{'loss':>10}"
    )
    for name, found in results.items():
        found["ratio"] = found["milliseconds"] / one
        sent = sum(found["sent"].values()) / 1e6
        print(
            f"{name:<28}{found['milliseconds']:>11.1f}{found['spread']:>9.1%}{found['ratio']:>8.2f}{sent:>14.1f}{found['loss']:>10.5f}"
        )
    return results


def shaped(size: tuple[int, int, int, int], sequences: int, length: int) -> str:
    """The flags that differ from those of the train suite."""
    layers, width, heads, vocabulary = size
    return (
        f"--num-layers {layers} --hidden-size {width} --num-attention-heads {heads} --vocab-size {vocabulary - 1} --seq-length {length} "
        f"--max-position-embeddings {length} --micro-batch-size {sequences} --global-batch-size {sequences}"
    )


def compare(title: str, lines: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """tokens/s of both families of shapes, each with its peer, in fp32."""
    results: dict[str, Any] = {}
    print(
        f"\n{title}\n{'':<12}{'parameters':>12}{'gpt':>10}{'PyTorch':>10}{'Trivium x':>11}{'llama':>10}{'transformers':>14}{'Trivium x':>11}"
    )
    for name, line in lines.items():
        gpt = [
            Candidate("Trivium", peers.trivium, f"{GPT} {line}"),
            Candidate("PyTorch", peers.plain, f"{GPT} {line}"),
        ]
        wide = f"{LLAMA} {line} --ffn-hidden-size {feed_forward(gpt[0])}"
        llama = [
            Candidate("Trivium", peers.trivium, wide),
            Candidate("transformers", peers.transformers_llama, wide, needs=peers.TRANSFORMERS),
        ]
        config = gpt[0].config()
        parameters = total_parameters(config.model, peers.vocabulary(config))
        results[name] = {"parameters": parameters}
        if (short := missing_memory(parameters, 2 if options.peers else 1)) > 0:
            results[name]["left_out"] = f"{short / 1e9:.1f} GB of memory too little"
            print(f"{name:<12}left out: {results[name]['left_out']}")
            continue
        rounds = min(options.rounds * options.steps, PAIR_ROUNDS)
        for shape, pair in (("gpt", gpt), ("llama", llama)):
            results[name][shape] = pair_of(pair if options.peers else pair[:1], rounds)
        columns = "".join(
            f"{cells(results[name][shape], width)}" for shape, width in (("gpt", 10), ("llama", 14))
        )
        print(f"{name:<12}{parameters / 1e6:>11.1f}M{columns}", flush=True)
    return results


def feed_forward(candidate: Candidate) -> int:
    """8/3 of the width, as SwiGLU has it, to the next 64."""
    return -(-candidate.config().model.hidden_size * 8 // 3 // 64) * 64


def pair_of(pair: list[Candidate], rounds: int) -> dict[str, Any]:
    turns = measure(pair, rounds, time.monotonic() + PAIR_SECONDS, probe=False, patience=PATIENCE)
    found: dict[str, Any] = {
        name: {"left_out": one.failure.reason}
        if one.failure
        else {
            "tokens_per_second": one.tokens_per_second,
            "spread": one.spread,
            "updates": len(one.timed),
            "deviation": one.deviation,
        }
        for name, one in turns.items()
    }
    rates = [one["tokens_per_second"] for one in found.values() if "tokens_per_second" in one]
    return found | ({"trivium_is_faster": rates[0] / rates[1]} if len(rates) == 2 else {})


def cells(found: dict[str, Any], width: int) -> str:
    """Trivium's tokens/s, its peer's, and the ratio; what is missing says so."""
    rates = [
        f"{one['tokens_per_second']:.0f}" if "tokens_per_second" in one else one["left_out"]
        for one in found.values()
        if isinstance(one, dict)
    ]
    ratio = f"{found['trivium_is_faster']:.2f}" if "trivium_is_faster" in found else "-"
    return f"{rates[0]:>10}{(rates[1:] or ['-'])[0]:>{width}}{ratio:>11}"


def missing_memory(parameters: int, engines: int) -> float:
    """Bytes short of what so many engines of this size need at once; 0 where there is enough, or no telling."""
    needed = parameters * BYTES_PER_PARAMETER * engines
    if torch.cuda.is_available():
        return max(0.0, needed - torch.cuda.mem_get_info()[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return 0.0
    return max(0.0, needed - int(lines["MemAvailable"].split()[0]) * 1024)
