"""The train suite: updates of Trivium beside those of its peers, on the same model and tokens.

Every engine starts from the same weights; engines take turns (benchmarks/side_by_side.py).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.candidate import Candidate, Result
from benchmarks.limits import CUBE, PEAK_SECONDS, Peaks, matrix_peaks
from benchmarks.models import BF16, SHAPES, shape_flags
from benchmarks.peer_megatron import MEGATRON, megatron
from benchmarks.peer_plain import plain, plain_compiled
from benchmarks.side_by_side import Limits, run_in_turn
from benchmarks.train_table import report, rows_of

TIME_LIMIT = 260.0  # seconds for the suite
SHARE_OF_GPT = 0.72  # of the time limit: it has twice the candidates, two of them compiled


def train_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Run rounds x steps updates of every candidate, or as many as the time limit has room for.

    options: rounds, steps, and whether peers take part
    Returns the peaks of the machine, a row for each candidate of each model, and the seconds.
    """
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks = matrix_peaks(device, PEAK_SECONDS)
    measured: dict[str, tuple[dict[str, Result], dict[str, str]]] = {}

    def measure_peaks() -> None:
        """Measure the peaks again: whatever else runs on the machine does not run all the time."""
        for name, rate in matrix_peaks(device, PEAK_SECONDS / 5).items():
            peaks[name] = max(rate, peaks[name])

    print("\ntrain: measuring", *SHAPES)
    for shape in SHAPES:
        share = SHARE_OF_GPT if shape == "gpt" else 1.0
        limits = Limits(options.rounds * options.steps, begin + TIME_LIMIT * share)
        arguments = shape_flags(shape, device)
        candidates, absent = choose_candidates(shape, arguments, peaks, options.peers)
        measured[shape] = (measure(candidates, limits, measure_peaks), absent)
    rates = [f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items()]
    print(f"matrix peak, {CUBE[device]} cube: {', '.join(rates)}")
    results: dict[str, Any] = {"peaks": peaks}
    for shape, (found, absent) in measured.items():
        results[shape] = rows_of(found, absent, peaks)
        first = next(iter(found.values()))
        report(shape, first.config, results[shape])
    results["seconds"] = time.monotonic() - begin
    print(f"\nthe suite took {results['seconds']:.0f} s")
    return results


def choose_candidates(
    shape: str, arguments: str, peaks: Peaks, with_peers: bool
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates, the reference of all losses first, and why others are absent.

    shape: gpt or llama
    arguments: flags of the model
    peaks: FLOP/s of a matrix product, by number format
    with_peers: whether other engines take part
    """
    in_bf16 = f"{arguments} {BF16}"
    ours = [
        Candidate("Trivium fp32", peers.trivium, arguments),
        Candidate("Trivium bf16", peers.trivium, in_bf16),
    ]
    if not with_peers:
        return ours, {}
    if shape == "gpt":
        candidates = gpt_candidates(ours, arguments)
        bf16_weights = Candidate("megatron-core bf16", megatron, in_bf16, needs=MEGATRON)
    else:
        peer = peers.transformers_llama
        needs = peers.TRANSFORMERS
        candidates = [Candidate("transformers fp32", peer, arguments, needs=needs), *ours]
        bf16_weights = Candidate("transformers bf16", peer, in_bf16, needs=needs)
    if peaks["bf16"] > peaks["fp32"]:
        return [*candidates, bf16_weights], {}
    in_bf16_rate = f"{peaks['bf16'] / 1e9:.0f} GFLOP/s"
    in_fp32_rate = f"{peaks['fp32'] / 1e9:.0f} in fp32"
    reason = f"PyTorch's bf16 products run at {in_bf16_rate} against {in_fp32_rate} on this machine"
    return candidates, {bf16_weights.name: reason}


def gpt_candidates(ours: list[Candidate], arguments: str) -> list[Candidate]:
    """Return the candidates for the GPT: a plain PyTorch loop, Trivium, and other engines."""
    in_bf16 = f"{arguments} {BF16}"
    return [
        Candidate("PyTorch fp32", plain, arguments),
        *ours,
        Candidate("PyTorch fp32, compiled", plain_compiled, arguments, probe=plain),
        Candidate("PyTorch bf16 autocast, compiled", plain_compiled, in_bf16, probe=plain),
        Candidate("megatron-core fp32", megatron, arguments, needs=MEGATRON),
    ]


def measure(
    candidates: Sequence[Candidate],
    limits: Limits,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Result]:
    """Run the candidates in turn from Trivium's initial weights.

    limits: how long and how often they run
    between: called once in each round
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        peers.write_weights(candidates[0].config(), weights)
        return run_in_turn(candidates, weights, limits, between)
