"""The generate suite: new tokens per second of a Llama with a key-value cache.

transformers runs beside it on the same weights.
"""

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

from benchmarks import peers
from benchmarks.candidate import parse_config
from benchmarks.engine import vocabulary
from benchmarks.models import LLAMA
from benchmarks.table import Column, Row, Table, number, ratio
from trivium import launch, ops
from trivium.config import Config
from trivium.decode.generate import generate
from trivium.decode.sampling import Sampling
from trivium.model.gpt import GPT

BATCHES = (1, 16)
PROMPT = 32  # tokens
NEW = 64  # tokens
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
GREEDY = Sampling(temperature=0.0)

Generate = Callable[[torch.Tensor], torch.Tensor]  # prompt [B, T] to the new tokens [B, NEW]


def generate_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Continue the same prompts greedily, `rounds` times with each engine in turn.

    The suite runs in a process of its own, whose waiting threads do as they do by default. So does
    tools/generate.py: it has the cores to itself.
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
    """Return the results of every dtype and batch, and why an engine was left out.

    options: rounds, and whether peers take part
    """
    config = parse_config(LLAMA)
    device = launch.choose_device("auto", 0)
    results: dict[str, Any] = {}
    for dtype, word in DTYPES.items():
        engines, absent = build_engines(config, device, dtype, options.peers)
        for name, reason in absent.items():
            results[name] = {"left_out": reason}
        for batch in BATCHES:
            prompt = random_prompt(config, batch).to(device)
            results[f"{word}, batch {batch}"] = compare(engines, prompt, options.rounds)
    return results


def random_prompt(config: Config, batch: int) -> torch.Tensor:
    """Return prompts [B, PROMPT]; the batch is also the seed."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(config.data.vocab_size, (batch, PROMPT), generator=generator)


def build_engines(
    config: Config, device: torch.device, dtype: torch.dtype, with_peers: bool
) -> tuple[dict[str, Generate], dict[str, str]]:
    """Return the engines, and why others are absent.

    Where one native call runs a whole block, Trivium runs a second time without it.
    """
    kernels = ops.select_ops("auto", device, dtype)
    engines = {"Trivium": trivium(config, device, dtype, kernels)}
    if kernels.implementations["block_step"] == "native":
        op_by_op = ops.select_ops("auto,block_step=torch", device, dtype)
        engines["Trivium, op by op"] = trivium(config, device, dtype, op_by_op)
    if not with_peers:
        return engines, {}
    try:
        engines["transformers"] = transformers(config, device, dtype)
    except ImportError as error:
        return engines, {"transformers": str(error)}
    return engines, {}


def trivium(config: Config, device: torch.device, dtype: torch.dtype, kernels: ops.Ops) -> Generate:
    """Build Trivium's generation.

    Its weights come from the seed, as those that transformers is given.
    """
    model = GPT(config.model, vocabulary(config), ops=kernels, seed=config.batch.seed)
    model = model.to_device(device, dtype).eval()

    def new_tokens(prompt: torch.Tensor) -> torch.Tensor:
        tokens = list(generate(model, prompt, NEW, GREEDY, torch.Generator()))
        return torch.stack(tokens, dim=1)

    return new_tokens


def transformers(config: Config, device: torch.device, dtype: torch.dtype) -> Generate:
    """Build transformers' generation with Trivium's weights.

    Raises ImportError if it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        peers.write_weights(config, weights)
        model = peers.llama(config, peers.read_weights(weights)).to(device, dtype).eval()
    settings = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def new_tokens(prompt: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(prompt)
        whole = model.generate(prompt, attention_mask=mask, **settings)
        return whole[:, prompt.shape[1] :]

    return new_tokens


def compare(engines: dict[str, Generate], prompt: torch.Tensor, rounds: int) -> dict[str, Row]:
    """Run each engine once untimed, then in turn; compare its tokens with the first engine's.

    engines: by name
    prompt: [B, PROMPT]
    rounds: timed runs of each engine
    """
    tokens = {name: engine(prompt) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine(prompt).cpu()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(each) for name, each in seconds.items()}
    first = next(iter(engines))
    return {
        name: {
            "tokens_per_second": prompt.shape[0] * NEW / medians[name],
            "trivium_is_faster": medians[name] / medians[first],
            "same_tokens": torch.equal(tokens[name], tokens[first]),
        }
        for name in engines
    }


TABLE = Table(
    f"generate, greedy, prompt of {PROMPT} tokens, {NEW} new ones",
    56,
    [
        Column("new tokens/s", 18, number("tokens_per_second", 1)),
        Column("Trivium x", 11, ratio("trivium_is_faster")),
    ],
)


def report(results: dict[str, Any]) -> None:
    """Print the table."""
    print(f"\n{TABLE.header()}")
    for title, rows in results.items():
        if "left_out" in rows:
            print(f"{title:<16}left out: {rows['left_out']}")
            continue
        for name, row in rows.items():
            print(TABLE.line(f"{title:<16}{name}", row) + verdict(title, row))


def verdict(title: str, row: Row) -> str:
    """Return a remark on an engine whose tokens are not the first one's.

    title: names the number format
    """
    if row["same_tokens"]:
        return ""
    # In bf16 two orders of sums may choose another token, and then go different ways.
    return "  other tokens" if "bf16" in title else "  OTHER TOKENS"
