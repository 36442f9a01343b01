"""The generate suite: new tokens per second from a Llama with a key-value cache, beside transformers on the same weights."""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

import benchmarks.peers as peers
from benchmarks.train import LLAMA
from trivium import launch, ops
from trivium.config import Config, flags, resolve
from trivium.decode.generate import Sampling, generate
from trivium.model.gpt import GPT

BATCHES = (1, 16)
PROMPT, NEW = 32, 64  # tokens
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Generate = Callable[[torch.Tensor], torch.Tensor]  # prompt [B, T] to the new tokens [B, N]


def generate_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy continuations of the same prompts, `rounds` of each engine in turn; in fp32 the tokens must be the same.

    In a process of its own whose waiting threads do as they do by default, as in tools/generate.py: it has the cores to itself.
    """
    policy = os.environ.pop("OMP_WAIT_POLICY", None)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results = pool.submit(measure, options).result()
    finally:
        if policy is not None:
            os.environ["OMP_WAIT_POLICY"] = policy
    report(results)
    return results


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The results of every dtype and batch, or why an engine was left out."""
    config, device = resolve(flags.parse(LLAMA.split()).config, 1), launch.choose_device("auto", 0)
    results: dict[str, Any] = {}
    for dtype, word in DTYPES.items():
        engines, absent = build_engines(config, device, dtype, options.peers)
        results |= {name: {"left_out": why} for name, why in absent.items()}
        for batch in BATCHES:
            prompt = torch.randint(
                config.data.vocab_size,
                (batch, PROMPT),
                generator=torch.Generator().manual_seed(batch),
            ).to(device)
            results[f"{word}, batch {batch}"] = compare(engines, prompt, options.rounds)
    return results


def build_engines(
    config: Config, device: torch.device, dtype: torch.dtype, with_peers: bool
) -> tuple[dict[str, Generate], dict[str, str]]:
    """Trivium, also without a block's step in one call where it has that, and transformers where it is installed; else the reason."""
    kernels = ops.select_ops("auto", device, dtype)
    engines: dict[str, Generate] = {"Trivium": trivium(config, device, dtype, kernels)}
    if kernels.implementations["block_step"] == "native":
        engines["Trivium, op by op"] = trivium(
            config, device, dtype, ops.select_ops("auto,block_step=torch", device, dtype)
        )
    if with_peers:
        try:
            engines["transformers"] = transformers(config, device, dtype)
        except ImportError as error:
            return engines, {"transformers": str(error)}
    return engines, {}


def trivium(config: Config, device: torch.device, dtype: torch.dtype, kernels: ops.Ops) -> Generate:
    model = (
        GPT(config.model, peers.vocabulary(config), ops=kernels, seed=config.batch.seed)
        .to_device(device, dtype)
        .eval()
    )

    def new_tokens(prompt: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            list(generate(model, prompt, NEW, Sampling(temperature=0.0), torch.Generator())), dim=1
        )

    return new_tokens


def transformers(config: Config, device: torch.device, dtype: torch.dtype) -> Generate:
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        peers.write_weights(config, weights)
        model = peers.llama(config, peers.read_weights(weights)).to(device, dtype).eval()
    settings = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def new_tokens(prompt: torch.Tensor) -> torch.Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[
            :, prompt.shape[1] :
        ]

    return new_tokens


def compare(engines: dict[str, Generate], prompt: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Each engine once untimed, then in turn; what it says is held against what the first one says."""
    said = {name: engine(prompt) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine(prompt).cpu()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(engines))
    return {
        name: {
            "tokens_per_second": prompt.shape[0] * NEW / median(seconds[name]),
            "trivium_is_faster": median(seconds[name]) / median(seconds[first]),
            "same_tokens": torch.equal(said[name], said[first]),
        }
        for name in engines
    }


def report(results: dict[str, Any]) -> None:
    print(
        f"\ngenerate, greedy, prompt of {PROMPT} tokens, {NEW} new ones{'new tokens/s':>18}{'Trivium x':>11}"
    )
    for title, rows in results.items():
        if "left_out" in rows:
            print(f"{title:<16}left out: {rows['left_out']}")
            continue
        for name, found in rows.items():
            # In bf16 two orders of sums may choose another token, and then go different ways.
            verdict = (
                ""
                if found["same_tokens"]
                else "  other tokens"
                if "bf16" in title
                else "  OTHER TOKENS"
            )
            print(
                f"{title:<16}{name:<46}{found['tokens_per_second']:>12.1f}{found['trivium_is_faster']:>11.2f}{verdict}"
            )
