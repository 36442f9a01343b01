"""The train suite: updates of Trivium beside those of its peers on the same model, weights and tokens, each engine in turn."""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import benchmarks.peers as peers
from benchmarks.limits import CUBE, PEAK_SECONDS, Peaks, matrix_peaks
from benchmarks.side_by_side import Candidate, Turns, take_turns
from trivium.config import Config
from trivium.estimate.flops import flops_per_token

COMMON = (
    "--micro-batch-size 16 --global-batch-size 16 --seq-length 256 --max-position-embeddings 256 --num-layers 6 --hidden-size 384 "
    "--num-attention-heads 6 --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 31999 --train-iters 1000 --lr 3e-4 --lr-decay-style constant --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0"
)
GPT = f"{COMMON} --exact-gelu"
LLAMA = f"{COMMON} --normalization RMSNorm --swiglu --ffn-hidden-size 1024 --position-embedding-type rope --untie-embeddings-and-output-weights"
SHAPES = {"gpt": GPT, "llama": LLAMA}
# On a device: GPT-2's and as wide a Llama.
LARGER = "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024 --vocab-size 50303"
LARGER_FFN = {"gpt": "", "llama": "--ffn-hidden-size 2048"}
BF16 = "--bf16"

TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 5e-3,
}  # of a loss, relative; measured 2e-6 and 1.4e-3 over 12 updates, and 3e-2 where a layer is left out
TIME_LIMIT = 260.0  # seconds for the suite
VERDICTS = {
    True: "",
    False: "  DISAGREES: does not compute the same",
    None: "  NOT CHECKED: the reference had no time for its batch",
}
SHARE_OF_GPT = 0.72  # of them: it has twice the candidates, two of them compiled


def train_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds x steps updates of every candidate, or as many as the time limit has room for."""
    begin, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    peaks, measured = matrix_peaks(device, PEAK_SECONDS), {}

    def measure_peaks() -> None:
        """Whatever else runs on the machine does not run all the time."""
        for name, rate in matrix_peaks(device, PEAK_SECONDS / 5).items():
            peaks[name] = max(rate, peaks[name])

    print("\ntrain: measuring", *SHAPES)
    for shape, arguments in SHAPES.items():
        line = f"{arguments} {LARGER} {LARGER_FFN[shape]}" if device == "cuda" else arguments
        deadline = begin + TIME_LIMIT * (SHARE_OF_GPT if shape == "gpt" else 1.0)
        found, absent = choose_candidates(shape, line, peaks, options.peers)
        measured[shape] = (
            found[0].config(),
            measure(found, options.rounds * options.steps, deadline, between=measure_peaks),
            absent,
        )
    print(
        f"matrix peak, {CUBE[device]} cube: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items())
    )
    results: dict[str, Any] = {"peaks": peaks}
    for shape, (config, turns, absent) in measured.items():
        results[shape] = rows_of(turns, absent, peaks)
        report(shape, config, results[shape])
    results["seconds"] = time.monotonic() - begin
    print(f"\nthe suite took {results['seconds']:.0f} s")
    return results


def choose_candidates(
    shape: str, line: str, peaks: Peaks, with_peers: bool
) -> tuple[list[Candidate], dict[str, str]]:
    """Those to be measured, the reference of all losses first; and why others are not."""
    half, absent = f"{line} {BF16}", {}
    ours = [
        Candidate("Trivium fp32", peers.trivium, line),
        Candidate("Trivium bf16", peers.trivium, half),
    ]
    if not with_peers:
        return ours, {}
    if shape == "gpt":
        theirs = [
            Candidate("PyTorch fp32", peers.plain, line),
            *ours,
            Candidate("PyTorch fp32, compiled", peers.plain_compiled, line, probe=peers.plain),
            Candidate(
                "PyTorch bf16 autocast, compiled", peers.plain_compiled, half, probe=peers.plain
            ),
            Candidate("megatron-core fp32", peers.megatron, line, needs=peers.MEGATRON),
        ]
        weights_in_bf16 = Candidate(
            "megatron-core bf16", peers.megatron, half, needs=peers.MEGATRON
        )
    else:
        theirs = [
            Candidate(
                "transformers fp32", peers.transformers_llama, line, needs=peers.TRANSFORMERS
            ),
            *ours,
        ]
        weights_in_bf16 = Candidate(
            "transformers bf16", peers.transformers_llama, half, needs=peers.TRANSFORMERS
        )
    if peaks["bf16"] > peaks["fp32"]:
        theirs.append(weights_in_bf16)
    else:
        rates = f"{peaks['bf16'] / 1e9:.0f} GFLOP/s against {peaks['fp32'] / 1e9:.0f} in fp32"
        absent[weights_in_bf16.name] = f"PyTorch's bf16 products run at {rates} on this machine"
    return theirs, absent


def measure(
    candidates: Sequence[Candidate], rounds: int, deadline: float = math.inf, **settings: Any
) -> dict[str, Turns]:
    """take_turns from Trivium's initial weights."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        peers.write_weights(candidates[0].config(), weights)
        return take_turns(candidates, weights, rounds, deadline, **settings)


def rows_of(
    turns: dict[str, Turns], absent: dict[str, str], peaks: Peaks
) -> dict[str, dict[str, Any]]:
    """What is known of each candidate, and how many times faster Trivium is in the same number format."""
    rows = {name: row(found, peaks) for name, found in turns.items()} | {
        name: {"left_out": why} for name, why in absent.items()
    }
    for found in rows.values():
        ours = rows.get(f"Trivium {found.get('precision')}", {})
        if "tokens_per_second" in found and "tokens_per_second" in ours:
            found["trivium_is_faster"] = ours["tokens_per_second"] / found["tokens_per_second"]
    return rows


def row(turns: Turns, peaks: Peaks) -> dict[str, Any]:
    """Everything about one candidate. A machine whose bf16 products are the slower ones computes them in fp32: the faster peak counts."""
    if turns.failure is not None:
        return {"left_out": turns.failure.reason}
    precision = "bf16" if turns.config.precision.bf16 else "fp32"
    peak = max(peaks.values()) if precision == "bf16" else peaks["fp32"]
    full, causal = utilization(turns.config, turns.tokens_per_second, peak)
    deviation = turns.deviation
    return {
        "precision": precision,
        "batch": turns.batch,
        "updates": len(turns.timed),
        "milliseconds": turns.seconds * 1e3,
        "spread": turns.spread,
        "seconds": [update.seconds for update in turns.timed],
        "tokens_per_second": turns.tokens_per_second,
        "mfu_full": full,
        "mfu_causal": causal,
        "memory": turns.memory.total,
        "own_memory": turns.memory.own,
        "page_faults": sorted(update.faults for update in turns.timed)[len(turns.timed) // 2],
        "losses": turns.losses,
        "held_against": turns.reference,
        "deviation": deviation,
        "agrees": deviation <= TOLERANCE[precision] if turns.expected else None,
    }


def utilization(config: Config, tokens_per_second: float, peak: float) -> tuple[float, float]:
    """Share of the peak that the model's own operations are: with full attention (6N + 12LhT a token), with its causal half (6N + 6LhT)."""
    full, causal = (
        flops_per_token(
            config.model, peers.vocabulary(config), config.batch.seq_length, causal=half
        )
        for half in (False, True)
    )
    return tokens_per_second * full / peak, tokens_per_second * causal / peak


def report(shape: str, config: Config, rows: dict[str, dict[str, Any]]) -> None:
    model, batch = config.model, config.batch
    print(
        f"\n{shape}: {model.num_layers} layers, {model.hidden_size} wide, {model.num_attention_heads} heads, feed-forward {model.ffn_hidden_size}, "
        f"vocabulary {peers.vocabulary(config)}, {batch.global_batch_size} sequences of {batch.seq_length} tokens"
    )
    print(
        f"{'':<32}{'batch':>6}{'updates':>8}{'ms/update':>11}{'spread':>8}{'tokens/s':>10}{'Trivium x':>10}{'MFU':>7}{'causal':>8}"
        f"{'MB':>7}{'total':>7}{'faults':>9}{'loss':>9}{'off by':>9}"
    )
    whole = [found for found in rows.values() if found.get("batch") == batch.global_batch_size]
    common = min((len(found["losses"]) for found in whole), default=1)
    for name, found in rows.items():
        if "left_out" in found:
            print(f"{name:<32}left out: {found['left_out']}")
            continue
        ratio = f"{found['trivium_is_faster']:.2f}" if "trivium_is_faster" in found else "-"
        spread = f"{found['spread']:.1%}" if found["updates"] > 1 else "-"
        print(
            f"{name:<32}{found['batch']:>6}{found['updates']:>8}{found['milliseconds']:>11.1f}{spread:>8}"
            f"{found['tokens_per_second']:>10.0f}{ratio:>10}{found['mfu_full']:>7.1%}{found['mfu_causal']:>8.1%}{found['own_memory'] / 1e6:>7.0f}"
            f"{found['memory'] / 1e6:>7.0f}{found['page_faults']:>9}{found['losses'][:common][-1]:>9.4f}{found['deviation']:>9.1e}"
            + VERDICTS[found["agrees"]]
        )
    smaller = [
        name
        for name, found in rows.items()
        if found.get("batch", batch.global_batch_size) < batch.global_batch_size
    ]
    if smaller:
        print(
            f"fewer sequences an update, since all of them would take too long here; tokens/s compare: {', '.join(smaller)}"
        )
    reference = next(found["held_against"] for found in rows.values() if "held_against" in found)
    print(
        "MB: highest memory of the process above what it held after its imports, and in total; faults: pages mapped in by an update"
    )
    print(
        f"loss: of update {common}; every loss was held against that of {reference} on the same sequences: {verdict(rows)}"
    )


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    wrong = [name for name, found in rows.items() if found.get("agrees") is False]
    limits = " and ".join(f"{limit:g} in {name}" for name, limit in TOLERANCE.items())
    return (
        f"{', '.join(wrong)} beyond {limits}" if wrong else f"all that were checked within {limits}"
    )
