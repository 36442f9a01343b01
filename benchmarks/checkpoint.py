"""The checkpoint suite: how long training waits for a save and how long the save takes, loads, and the memory of a conversion, beside peers.

Peers are torch.save and torch.distributed.checkpoint on the same tensors, in turn with ours. All of them end with the data on the disk:
torch.save is synced by hand, as the others do by themselves. Files are read back from the page cache by all alike.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.parallel import random_batches
from trivium import launch, ops
from trivium.checkpoint.background import Background
from trivium.checkpoint.load import open_checkpoint
from trivium.checkpoint.save import save
from trivium.config import Config, flags, resolve
from trivium.config.presets import PRESETS, published_vocabulary
from trivium.interop.families import write_config
from trivium.interop.hf_folder import Outgoing, write_folder
from trivium.interop.hf_names import hf_places
from trivium.interop.name_map import their_shapes
from trivium.precision import working_dtype
from trivium.train.build import build_trainer
from trivium.train.progress import Progress

MODEL = (
    "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --seq-length 128 --micro-batch-size 1 --global-batch-size 1 "
    "--train-iters 1000 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 32767"
)
CONVERTED = "llama3.2-1b"
MAX_SHARD_BYTES = 1_000_000_000  # of the folder that is converted
TOOL = Path(__file__).resolve().parent / "convert_checkpoint.py"
# The highest resident memory of this program alone: what wait4 and getrusage tell begins with that of the process it was started by.
TOOL_AND_PEAK = """
import runpy, sys
from pathlib import Path
sys.argv, sys.path[0] = sys.argv[1:], str(Path(sys.argv[1]).parent)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
STATE = {
    "iteration": 1,
    "consumed_samples": 0,
    "consumed_tokens": 0,
    "optimizer_steps": 1,
    "vocab_size": 32768,
    "random": {"seed": 0},
}
STATE |= {
    "loss_scale": {"dynamic": False, "scale": 1.0, "good_updates": 0, "bad_updates_left": 0},
    "fingerprints": {"tokenizer": "", "data": ""},
}


@dataclass(frozen=True)
class Run:
    """A trained state: named tensors whose memory is the optimizer's, and a step that goes on with it."""

    tensors: dict[str, torch.Tensor]
    pieces: Callable[[], Iterator]
    step: Callable[[], None]
    world: Any
    device: torch.device


def checkpoint_suite(rounds: int, steps: int) -> dict[str, Any]:
    """Saves and loads `rounds` times in turn, `steps` updates beside a save in the background, and one conversion each way."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, one_rank(Path(folder)):
        run, work = built(), Path(folder) / "saves"
        size = sum(tensor.nbytes for tensor in run.tensors.values())
        for name, candidate in (("saves", saves), ("loads", loads)):
            results[name] = measured(candidate(run, work), rounds)
        results["bytes"] = size
        results["updates"] = beside_training(run, work, steps)
    report(results, size)
    results["conversion"] = conversion()
    return results


def report(results: dict[str, Any], size: int) -> None:
    print(
        f"\n{size / 1e6:.0f} MB of weights and moments (medians){'stall ms':>15}{'total ms':>10}{'MB/s':>8}"
    )
    for name, row in (*results["saves"].items(), *results["loads"].items()):
        print(
            f"{name:<44}{row['stall'] * 1e3:>13.0f}{row['total'] * 1e3:>10.0f}{size / 1e6 / row['total']:>8.0f}"
        )
    alone, beside = results["updates"]["alone"], results["updates"]["beside a save"]
    print(
        f"an update takes {alone * 1e3:.0f} ms alone, {beside * 1e3:.0f} ms while a save is written: {beside / alone:.2f} x"
    )


@contextmanager
def one_rank(folder: Path):
    """torch.distributed.checkpoint saves in the background only inside a process group."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def built() -> Run:
    config, process = resolve(flags.parse(MODEL.split()).config, 1), launch.Process()
    device = launch.choose_device("auto", 0)
    mesh = launch.plan_mesh(config, process)
    vocab_size = config.data.vocab_size + 1
    trainer = build_trainer(
        config,
        mesh,
        device,
        ops.select_ops("auto", device, working_dtype(config.precision)),
        vocab_size,
        vocab_size - 1,
    )
    batches = random_batches(config, 0, 1)

    def step() -> None:
        trainer.step(Progress(), batches, stop=False).grad_norm.item()

    def pieces() -> Iterator:
        yield from trainer.optimizer.weight_pieces()
        yield from trainer.optimizer.moment_pieces()

    step()  # moments of zero would be easier to write than real ones
    return Run({piece.name: piece.tensor for piece in pieces()}, pieces, step, mesh.world, device)


Timed = tuple[float, float]  # seconds until training could go on, seconds until all is done


def saves(run: Run, work: Path) -> dict[str, Callable[[], Timed]]:
    background, ours = Background(run.world, run.device), {"state": STATE, "config_yaml": ""}

    def fresh(name: str) -> Path:
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
        return work / name

    def trivium_sync() -> Timed:
        folder = fresh("sync")
        return same(
            lambda: save(folder, 1, run.pieces(), world=run.world, device=run.device, **ours)
        )

    def trivium_async() -> Timed:
        folder = fresh("async")
        return split(lambda: background.start(folder, 1, run.pieces(), **ours), background.finish)

    def torch_save() -> Timed:
        path = fresh("torch") / "state.pt"

        def write() -> None:
            with path.open("wb") as file:
                torch.save(run.tensors, file)
                file.flush()
                os.fsync(file.fileno())

        return same(write)

    def dcp_save() -> Timed:
        folder = fresh("dcp")
        return same(lambda: dcp.save(dict(run.tensors), checkpoint_id=folder))

    def dcp_async() -> Timed:
        folder, futures = fresh("dcp-async"), []
        return split(
            lambda: futures.append(dcp.async_save(dict(run.tensors), checkpoint_id=folder)),
            lambda: futures[0].result(),
        )

    return {
        "save": trivium_sync,
        "save, torch.save": torch_save,
        "save, torch.distributed.checkpoint": dcp_save,
        "save --async-save": trivium_async,
        "save, torch.distributed.checkpoint async": dcp_async,
    }


def loads(run: Run, work: Path) -> dict[str, Callable[[], Timed]]:
    """Into the run's own tensors; ours with every checksum verified, which the others have none of."""

    def trivium() -> None:
        open_checkpoint(work / "sync", world=run.world, device=run.device).read_into(run.pieces())

    def torch_load() -> None:
        for name, tensor in torch.load(work / "torch" / "state.pt", weights_only=True).items():
            run.tensors[name].copy_(tensor)

    def dcp_load() -> None:
        dcp.load(dict(run.tensors), checkpoint_id=work / "dcp")

    candidates = {
        "load, verified": trivium,
        "load, torch.load": torch_load,
        "load, torch.distributed.checkpoint": dcp_load,
    }
    return {
        name: lambda candidate=candidate: same(candidate) for name, candidate in candidates.items()
    }


def measured(
    candidates: dict[str, Callable[[], Timed]], rounds: int
) -> dict[str, dict[str, float]]:
    found: dict[str, list[Timed]] = {name: [] for name in candidates}
    for round in range(rounds + 1):
        for name, candidate in candidates.items():
            times = candidate()
            if round:  # the first one finds memory and folders new
                found[name].append(times)
    return {
        name: {
            "stall": median(stall for stall, _ in times),
            "total": median(total for _, total in times),
        }
        for name, times in found.items()
    }


def beside_training(run: Run, work: Path, steps: int) -> dict[str, float]:
    """Seconds of an update (medians), alone and while a save in the background is written over and over."""
    alone = median(same(run.step)[1] for _ in range(steps))
    background, beside = Background(run.world, run.device), []
    while len(beside) < steps:
        shutil.rmtree(work / "beside", ignore_errors=True)
        background.start(work / "beside", 1, run.pieces(), state=STATE, config_yaml="")
        while (
            background.published() is None and background.problem() is None and len(beside) < steps
        ):
            beside.append(same(run.step)[1])
        background.finish()
    return {"alone": alone, "beside a save": median(beside)}


def conversion() -> dict[str, Any]:
    """A random model of a billion parameters in bf16, into a checkpoint of ours and back: seconds and the highest resident memory."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        hf, ours, back = (Path(folder) / name for name in ("hf", "ours", "back"))
        write_random(hf)
        largest = max(path.stat().st_size for path in hf.glob("*.safetensors"))
        print(
            f"\n{CONVERTED}, shards of at most {largest / 1e9:.2f} GB{'seconds':>12}{'peak GB':>10}{'limit GB':>10}"
        )
        for name, way in (
            ("hf to trivium", ("hf", "trivium", hf, ours)),
            ("trivium to hf", ("trivium", "hf", ours, back)),
        ):
            words = [
                str(word)
                for pair in zip(("--from", "--to", "--load", "--save"), way, strict=True)
                for word in pair
            ]
            start = time.perf_counter()
            ended = subprocess.run(
                [sys.executable, "-c", TOOL_AND_PEAK, str(TOOL), *words],
                stdout=subprocess.PIPE,
                text=True,
            )
            if ended.returncode:
                raise ValueError(f"the conversion {name} failed; its own message is above")
            shards = hf if name.startswith("hf") else back
            limit = 1.5 * max(path.stat().st_size for path in shards.glob("*.safetensors")) + 1e9
            found[name] = {
                "seconds": time.perf_counter() - start,
                "peak": int(ended.stdout.split()[-1]) * 1024,
                "limit": limit,
            }
            row = found[name]
            print(
                f"{name:<44}{row['seconds']:>8.1f}{row['peak'] / 1e9:>10.2f}{row['limit'] / 1e9:>10.2f}"
            )
    return found


def write_random(folder: Path) -> None:
    """A folder of the preset's shape. Its numbers are uniform: a billion normal ones would take longer than what is measured."""
    model = resolve(Config.of(PRESETS[CONVERTED] | {"seq_length": 1024}), 1).model
    vocab_size = published_vocabulary(CONVERTED)
    tensors = [
        Outgoing(
            name,
            shape,
            torch.bfloat16,
            lambda shape=shape: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02),
        )
        for name, shape in their_shapes(hf_places(model, vocab_size)).items()
    ]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16"}
    write_folder(
        folder, tensors, write_config(model, vocab_size, ids), max_shard_bytes=MAX_SHARD_BYTES
    )


def same(action: Callable[[], object]) -> Timed:
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return seconds, seconds


def split(begin: Callable[[], object], wait: Callable[[], object]) -> Timed:
    start = time.perf_counter()
    begin()
    stall = time.perf_counter() - start
    wait()
    return stall, time.perf_counter() - start
