"""A run that was stopped and resumed is the run that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from runs import LLAMA, NO_DROPOUT, SMALL, exact, rows_of, train, write_data

import pretrain_gpt
from trivium.checkpoint import publish
from trivium.launch import Place
from trivium.mesh import Mesh
from trivium.train import step

ROOT = Path(__file__).resolve().parents[2]
RUN = SMALL + LLAMA + " --eval-interval 6 --eval-iters 2 --split 80,20,0 --save-interval 4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small")


@pytest.mark.parametrize(
    "precision",
    ["--hidden-dropout 0.1 --attention-dropout 0.1", "--bf16" + NO_DROPOUT, "--fp16 --initial-loss-scale 65536 --loss-scale-window 5" + NO_DROPOUT],
    ids=["fp32-dropout", "bf16", "fp16"],
)
@pytest.mark.parametrize("stop", [7, 12])
def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path, precision, stop):
    """Also the validation losses, and the weights: the last losses depend on all of them."""
    arguments = f"{RUN} {precision} --data-path {data}"
    train(f"{arguments} --save {tmp_path}/whole")
    train(f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts --exit-interval {stop}")
    assert publish.tracked_iteration(tmp_path / "parts") == stop
    assert len(rows_of(tmp_path / "parts/metrics.jsonl")) == stop
    train(f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts")
    for split in (None, "valid"):
        whole, parts = (rows_of(tmp_path / name / "metrics.jsonl", split) for name in ("whole", "parts"))
        assert (exact(parts) == exact(whole)) if split is None else (parts == whole)
    assert len(parts) == 4 and publish.tracked_iteration(tmp_path / "parts") == 20


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 4)])
def test_resumes_on_another_number_of_processes(data, tmp_path, first, second):
    """The same samples in the same order; losses equal to rounding."""
    arguments = f"{RUN} --hidden-dropout 0.1 --attention-dropout 0 --data-path {data}"
    train(f"{arguments} --save {tmp_path}/whole")
    train(f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts --exit-interval 9", first)
    train(f"{arguments} --save {tmp_path}/parts --load {tmp_path}/parts", second)
    whole, parts = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [row["iteration"] for row in parts] == list(range(1, 21))
    assert [row["lm_loss"] for row in parts] == pytest.approx([row["lm_loss"] for row in whole], rel=1e-5)


def test_batches_of_another_size_go_on_where_the_data_was(data, tmp_path):
    """From 8 to 4 samples a batch after 9 iterations: sample 72 comes next, and the data lasts."""
    arguments = f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --load {tmp_path}"
    train(f"{arguments} --exit-interval 9")
    train(f"{arguments} --global-batch-size 4")
    assert [row["consumed_samples"] for row in rows_of(tmp_path / "metrics.jsonl")] == [*range(8, 73, 8), *range(76, 117, 4)]


def test_one_rank_asked_to_stop_stops_all(data, tmp_path):
    """The wish travels with the step's own reduction: both ranks end after the same iteration, and the checkpoint is whole."""
    reached = run_ranks(2, stopped_on_rank_one, f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --exit-signal-handler")
    assert reached[0] == reached[1] == publish.tracked_iteration(tmp_path) < 20


def stopped_on_rank_one(mesh: Mesh, arguments: str) -> int:
    """A run in which rank 1 gets a signal during its fifth step; the iteration it came to."""
    honest, seen = step.Trainer.step, []

    def signalled(self, progress, batches, stop):
        if mesh.rank == 1 and progress.iteration == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        seen.append(progress.iteration + 1)
        return honest(self, progress, batches, stop)

    step.Trainer.step = signalled
    try:
        pretrain_gpt.main(arguments.split(), Place(mesh.rank, mesh.world_size, mesh.rank))
    finally:
        step.Trainer.step = honest
    return seen[-1]


def test_finetune_takes_the_weights_alone(data, tmp_path):
    train(f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path}/a")
    train(f"{RUN}{NO_DROPOUT} --data-path {data} --load {tmp_path}/a --finetune --save {tmp_path}/b --exit-interval 2")
    before, after = rows_of(tmp_path / "a/metrics.jsonl"), rows_of(tmp_path / "b/metrics.jsonl")
    assert [row["iteration"] for row in after] == [1, 2]
    assert after[0]["consumed_samples"] == 8 and after[0]["learning_rate"] == before[0]["learning_rate"]
    assert after[0]["lm_loss"] < 0.8 * before[0]["lm_loss"]


def test_no_load_optim_keeps_the_place_and_forgets_the_moments(data, tmp_path):
    arguments = f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path}/a --load {tmp_path}/a"
    train(f"{arguments} --exit-interval 8")
    train(f"{arguments} --no-load-optim --save {tmp_path}/b")
    train(f"{arguments} --save {tmp_path}/c")
    without, exactly = rows_of(tmp_path / "b/metrics.jsonl"), rows_of(tmp_path / "c/metrics.jsonl")
    assert exact(without[:1]) == exact(exactly[:1])  # same weights, same samples
    assert without[2]["lm_loss"] != exactly[2]["lm_loss"]


def test_retention_keeps_what_was_asked(data, tmp_path):
    train(f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --save-interval 2 --save-keep-last 2 --save-retain-interval 6")
    assert publish.published_iterations(tmp_path) == [6, 12, 18, 20]


def start(arguments: str, log: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "pretrain_gpt.py", *arguments.split()]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    """Until the run has written `text`, or has ended."""
    deadline = time.monotonic() + 60
    while text not in log.read_text() and process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step(data, tmp_path, number):
    endless = "--train-iters 100000 --save-interval 100000 --num-workers 2 --exit-signal-handler"
    process = start(f"{RUN}{NO_DROPOUT} --data-path {data} {endless} --save {tmp_path}", tmp_path / "log")
    wait_for("\n iteration ", tmp_path / "log", process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    saved = publish.tracked_iteration(tmp_path)
    assert saved is not None and len(rows_of(tmp_path / "metrics.jsonl")) == saved
    assert number.name in (tmp_path / "log").read_text()


def kill_at_random_moments(data: Path, folder: Path, kills: int, seed: int) -> None:
    """Start, kill, start again until it ends by itself; the rows must be those of the run that was left alone."""
    arguments = f"{RUN}{NO_DROPOUT} --data-path {data} --train-iters 60 --save-interval 3 --num-workers 1"
    train(f"{arguments} --save {folder}/whole")
    moments = random.Random(seed)
    for i in range(kills):
        process = start(f"{arguments} --save {folder}/parts --load {folder}/parts", folder / f"log{i}")
        wait_for("training from iteration", folder / f"log{i}", process)
        time.sleep(moments.uniform(0, 1.0))
        process.kill()
        process.wait()
    train(f"{arguments} --save {folder}/parts --load {folder}/parts")
    assert exact(rows_of(folder / "parts/metrics.jsonl")) == exact(rows_of(folder / "whole/metrics.jsonl"))
    assert rows_of(folder / "parts/metrics.jsonl", "valid") == rows_of(folder / "whole/metrics.jsonl", "valid")


def test_killed_runs_end_up_with_the_losses_of_an_uninterrupted_one(data, tmp_path):
    kill_at_random_moments(data, tmp_path, kills=3, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_run_killed_fifty_times(data, tmp_path):
    kill_at_random_moments(data, tmp_path, kills=50, seed=2)
