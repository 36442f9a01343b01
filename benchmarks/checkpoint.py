"""The checkpoint suite: how long training waits for a save, how long saves and loads take.

Peers are torch.save and torch.distributed.checkpoint on the same tensors, in turn with ours. All of
them end with the data on the disk: torch.save is synced by hand, as the others do by themselves.
Files are read back from the page cache by all alike. Conversions are in benchmarks/conversion.py.
"""

import os
import shutil
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

from benchmarks.candidate import parse_config
from benchmarks.conversion import conversion
from benchmarks.engine import Updates, random_batches
from benchmarks.table import Column, Row, Table, number
from trivium import launch
from trivium.checkpoint.background import Background
from trivium.checkpoint.load import open_checkpoint
from trivium.checkpoint.save import save
from trivium.mesh import Axis

MODEL = (
    "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --swiglu --normalization RMSNorm"
    " --position-embedding-type rope --disable-bias-linear"
    " --attention-dropout 0 --hidden-dropout 0"
    " --seq-length 128 --micro-batch-size 1 --global-batch-size 1 --train-iters 1000 --lr 1e-3"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 32767"
)
STATE = {
    "iteration": 1,
    "consumed_samples": 0,
    "consumed_tokens": 0,
    "optimizer_steps": 1,
    "vocab_size": 32768,
    "random": {"seed": 0},
    "loss_scale": {"dynamic": False, "scale": 1.0, "good_updates": 0, "bad_updates_left": 0},
    "fingerprints": {"tokenizer": "", "data": ""},
}


@dataclass(frozen=True)
class Run:
    """A trained state and a step that goes on with it.

    tensors: by name; their memory is the optimizer's
    pieces: makes the pieces that a save writes and a load fills
    step: does one update
    """

    tensors: dict[str, torch.Tensor]
    pieces: Callable[[], Iterator]
    step: Callable[[], float]
    world: Axis
    device: torch.device


@dataclass(frozen=True)
class Timed:
    """The seconds of a save or load: until training could go on, and until all was done."""

    stall: float
    total: float


def checkpoint_suite(rounds: int, steps: int) -> dict[str, Any]:
    """Measure saves and loads, updates beside a save, and one conversion each way.

    rounds: saves and loads of each candidate, in turn
    steps: updates beside a save in the background
    """
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, one_rank(Path(folder)):
        run = build_run()
        work = Path(folder) / "saves"
        results["saves"] = measure(saves(run, work), rounds)
        results["loads"] = measure(loads(run, work), rounds)
        results["bytes"] = sum(tensor.nbytes for tensor in run.tensors.values())
        results["updates"] = updates_beside_a_save(run, work, steps)
    report(results)
    results["conversion"] = conversion()
    return results


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """Make a process group: torch.distributed.checkpoint saves in the background only in one."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_run() -> Run:
    """Build the model and do one update."""
    config = parse_config(MODEL)
    device = launch.choose_device("auto", 0)
    mesh = launch.plan_mesh(config, launch.Process())
    updates = Updates(config, mesh, device, random_batches(config))
    optimizer = updates.trainer.optimizer

    def pieces() -> Iterator:
        yield from optimizer.weight_pieces()
        yield from optimizer.moment_pieces()

    updates.step()  # moments of zero would be easier to write than real ones
    tensors = {piece.name: piece.tensor for piece in pieces()}
    return Run(tensors, pieces, updates.step, mesh.world, device)


def saves(run: Run, work: Path) -> dict[str, Callable[[], Timed]]:
    """Return every way to save, each into its folder under `work`.

    run: whose tensors are saved
    """
    return foreground_saves(run, work) | background_saves(run, work)


def foreground_saves(run: Run, work: Path) -> dict[str, Callable[[], Timed]]:
    """Return the ways to save that training waits for."""

    def trivium_sync() -> Timed:
        folder = empty(work / "sync")
        return wait_for(
            lambda: save(
                folder,
                1,
                run.pieces(),
                world=run.world,
                device=run.device,
                state=STATE,
                config_yaml="",
            )
        )

    def torch_save() -> Timed:
        path = empty(work / "torch") / "state.pt"

        def write() -> None:
            with path.open("wb") as file:
                torch.save(run.tensors, file)
                file.flush()
                os.fsync(file.fileno())

        return wait_for(write)

    def dcp_save() -> Timed:
        folder = empty(work / "dcp")
        return wait_for(lambda: dcp.save(dict(run.tensors), checkpoint_id=folder))

    return {
        "save": trivium_sync,
        "save, torch.save": torch_save,
        "save, torch.distributed.checkpoint": dcp_save,
    }


def background_saves(run: Run, work: Path) -> dict[str, Callable[[], Timed]]:
    """Return the ways to save while training goes on."""
    background = Background(world=run.world, device=run.device)

    def trivium_async() -> Timed:
        folder = empty(work / "async")

        def start() -> None:
            background.start(folder, 1, run.pieces(), state=STATE, config_yaml="")

        return begin_and_wait(start, background.finish)

    def dcp_async() -> Timed:
        folder = empty(work / "dcp-async")
        futures = []

        def start() -> None:
            futures.append(dcp.async_save(dict(run.tensors), checkpoint_id=folder))

        return begin_and_wait(start, lambda: futures[0].result())

    return {
        "save --async-save": trivium_async,
        "save, torch.distributed.checkpoint async": dcp_async,
    }


def loads(run: Run, work: Path) -> dict[str, Callable[[], Timed]]:
    """Return every way to load into the run's own tensors.

    work: the folder that the saves wrote to

    Ours verifies every checksum; the others have none.
    """

    def trivium() -> None:
        opened = open_checkpoint(work / "sync", world=run.world, device=run.device)
        opened.read_into(run.pieces())

    def torch_load() -> None:
        loaded = torch.load(work / "torch" / "state.pt", weights_only=True)
        for name, tensor in loaded.items():
            run.tensors[name].copy_(tensor)

    def dcp_load() -> None:
        dcp.load(dict(run.tensors), checkpoint_id=work / "dcp")

    return {
        "load, verified": lambda: wait_for(trivium),
        "load, torch.load": lambda: wait_for(torch_load),
        "load, torch.distributed.checkpoint": lambda: wait_for(dcp_load),
    }


def empty(folder: Path) -> Path:
    """Make an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def measure(candidates: dict[str, Callable[[], Timed]], rounds: int) -> dict[str, Row]:
    """Return the median seconds of each candidate, over rounds in which each has its turn.

    rounds: how often each counts, after one that does not
    """
    found: dict[str, list[Timed]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, candidate in candidates.items():
            times = candidate()
            if turn:  # the first one finds memory and folders new
                found[name].append(times)
    rows: dict[str, Row] = {}
    for name, times in found.items():
        stall = median(one.stall for one in times)
        total = median(one.total for one in times)
        rows[name] = {"stall": stall, "total": total}
    return rows


def updates_beside_a_save(run: Run, work: Path, steps: int) -> dict[str, float]:
    """Return the median seconds of an update, alone and while saves are written beside it.

    steps: updates of each kind
    """
    alone = [wait_for(run.step).total for _ in range(steps)]
    background = Background(run.world, run.device)
    beside: list[float] = []
    while len(beside) < steps:
        shutil.rmtree(work / "beside", ignore_errors=True)
        background.start(work / "beside", 1, run.pieces(), state=STATE, config_yaml="")
        while is_writing(background) and len(beside) < steps:
            beside.append(wait_for(run.step).total)
        background.finish()
    return {"alone": median(alone), "beside a save": median(beside)}


def is_writing(background: Background) -> bool:
    """Return whether a save is still being written."""
    return background.published() is None and background.problem() is None


def wait_for(action: Callable[[], object]) -> Timed:
    """Time an action that training waits for."""
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return Timed(seconds, seconds)


def begin_and_wait(begin: Callable[[], object], wait: Callable[[], object]) -> Timed:
    """Time an action in the background: its beginning, and until `wait` returns."""
    start = time.perf_counter()
    begin()
    stall = time.perf_counter() - start
    wait()
    return Timed(stall, time.perf_counter() - start)


def report(results: dict[str, Any]) -> None:
    """Print saves and loads, and updates beside a save."""
    megabytes = results["bytes"] / 1e6
    table = Table(
        f"{megabytes:.0f} MB of weights and moments (medians)",
        44,
        [
            Column("stall ms", 13, number("stall", scale=1e3)),
            Column("total ms", 10, number("total", scale=1e3)),
            Column("MB/s", 8, lambda row: f"{megabytes / row['total']:.0f}"),
        ],
    )
    print(f"\n{table.header()}")
    for name, row in (results["saves"] | results["loads"]).items():
        print(table.line(name, row))
    alone = results["updates"]["alone"]
    beside = results["updates"]["beside a save"]
    print(
        f"an update takes {alone * 1e3:.0f} ms alone, {beside * 1e3:.0f} ms while a save is "
        f"written: {beside / alone:.2f} x"
    )
