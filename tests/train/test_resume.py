"""A run that was stopped and resumed is the run that was not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import LLAMA, NO_DROPOUT, SMALL, exact, rows_of, train, write_data

import pretrain_gpt
from trivium.checkpoint import background, publish
from trivium.launch import Process
from trivium.mesh import Mesh
from trivium.testing import run_ranks
from trivium.train import step
from trivium.train.resume import RunState

ROOT = Path(__file__).resolve().parents[2]
RUN = SMALL + LLAMA + " --eval-interval 6 --eval-iters 2 --split 80,20,0 --save-interval 4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small")


@pytest.mark.parametrize(
    "precision",
    [
        "--hidden-dropout 0.1 --attention-dropout 0.1",
        "--bf16" + NO_DROPOUT,
        "--fp16 --initial-loss-scale 65536 --loss-scale-window 5" + NO_DROPOUT,
    ],
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
        whole, parts = (
            rows_of(tmp_path / name / "metrics.jsonl", split) for name in ("whole", "parts")
        )
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
    assert [row["lm_loss"] for row in parts] == pytest.approx(
        [row["lm_loss"] for row in whole], rel=1e-5
    )


def test_batches_of_another_size_go_on_where_the_data_was(data, tmp_path):
    """From 8 to 4 samples a batch after 9 iterations: sample 72 comes next, and the data lasts."""
    arguments = f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --load {tmp_path}"
    train(f"{arguments} --exit-interval 9")
    train(f"{arguments} --global-batch-size 4")
    assert [row["consumed_samples"] for row in rows_of(tmp_path / "metrics.jsonl")] == [
        *range(8, 73, 8),
        *range(76, 117, 4),
    ]


def test_one_rank_asked_to_stop_stops_all(data, tmp_path):
    """Both ranks end after the same iteration, and the checkpoint is whole.

    The request travels with the step's own reduction.
    """
    reached = run_ranks(
        2,
        stopped_on_rank_one,
        f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --exit-signal-handler",
    )
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
        pretrain_gpt.main(arguments.split(), Process(mesh.rank, mesh.world_size, mesh.rank))
    finally:
        step.Trainer.step = honest
    return seen[-1]


def test_finetune_takes_the_weights_alone(data, tmp_path):
    train(f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path}/a")
    train(
        f"{RUN}{NO_DROPOUT} --data-path {data} --load {tmp_path}/a --finetune "
        f"--save {tmp_path}/b --exit-interval 2"
    )
    before, after = rows_of(tmp_path / "a/metrics.jsonl"), rows_of(tmp_path / "b/metrics.jsonl")
    assert [row["iteration"] for row in after] == [1, 2]
    assert (
        after[0]["consumed_samples"] == 8
        and after[0]["learning_rate"] == before[0]["learning_rate"]
    )
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
    train(
        f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --save-interval 2 "
        "--save-keep-last 2 --save-retain-interval 6"
    )
    assert publish.published_iterations(tmp_path) == [6, 12, 18, 20]


@pytest.mark.parametrize("way", ["", "--async-save"])
def test_the_best_by_validation_loss_stay_and_the_newest(data, tmp_path, way):
    evaluated = (
        "--eval-interval 2 --save-interval 2 --lr 0.1"  # so high that the loss goes up and down
    )
    train(
        f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} {evaluated} "
        f"--save-keep-best 2 {way}"
    )
    losses = {
        row["iteration"]: row["lm_loss"] for row in rows_of(tmp_path / "metrics.jsonl", "valid")
    }
    best = sorted(losses, key=losses.get)[:2]
    assert publish.published_iterations(tmp_path) == sorted({*best, 20}) and len(losses) == 10
    for n in best:
        state = json.loads((tmp_path / publish.folder_name(n) / "state.json").read_text())
        assert state["validation_loss"] == losses[n] and state["persistent"]


def test_a_checkpoint_tells_the_validation_loss_of_its_own_iteration_or_none(data, tmp_path):
    train(
        f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --eval-interval 4 "
        "--save-interval 2 --train-iters 9"
    )
    losses = {
        row["iteration"]: row["lm_loss"] for row in rows_of(tmp_path / "metrics.jsonl", "valid")
    }
    told = {
        n: json.loads((folder / "state.json").read_text())["validation_loss"]
        for n, folder in publish.published_folders(tmp_path).items()
    }
    assert told == {2: None, 4: losses[4], 6: None, 8: losses[8], 9: losses[9]}


STATE = (
    "iteration consumed_samples consumed_tokens data_samples optimizer_steps loss_scale random"
    " vocab_size fingerprints validation_loss persistent"
).split()


def test_state_json_holds_every_item_in_its_place(data, tmp_path):
    train(f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --exit-interval 2")
    state = json.loads((tmp_path / publish.folder_name(2) / "state.json").read_text())
    assert list(state) == STATE
    counts = {"iteration": 2, "consumed_samples": 16, "consumed_tokens": 16 * 32}
    assert counts.items() <= state.items()
    assert (state["data_samples"], state["optimizer_steps"]) == (160, 2)


@pytest.mark.parametrize("way", ["", "--async-save"])
def test_a_non_persistent_checkpoint_is_there_until_the_next_one(data, tmp_path, way, monkeypatch):
    seen, honest = [], RunState.save

    def save(self, *args, **kwargs):
        honest(self, *args, **kwargs)
        self.finish()
        seen.append(publish.published_iterations(tmp_path))

    monkeypatch.setattr(RunState, "save", save)
    train(
        f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --save-interval 6 "
        f"--non-persistent-save-interval 2 --exit-interval 14 {way}"
    )
    assert seen == [[2], [4], [6], [6, 8], [6, 10], [6, 12], [6, 12, 14]]
    persistent = [
        json.loads((tmp_path / publish.folder_name(n) / "state.json").read_text())["persistent"]
        for n in (6, 12, 14)
    ]
    assert persistent == [True] * 3, (
        "where both are due, and where the run ends, the checkpoint stays"
    )
    train(
        f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --load {tmp_path} "
        f"--non-persistent-save-interval 3 --train-iters 16 {way}"
    )
    assert seen[7:] == [[6, 12, 14, 15], [6, 12, 14, 16]]


def test_a_run_ends_when_the_save_in_flight_is_published(data, tmp_path, monkeypatch):
    """The last checkpoint's writer is stopped for a second."""
    honest = background.subprocess.Popen

    def stopped(*args, **kwargs):
        process = honest(*args, **kwargs)
        process.send_signal(signal.SIGSTOP)
        threading.Timer(1.0, process.send_signal, [signal.SIGCONT]).start()
        return process

    monkeypatch.setattr(background.subprocess, "Popen", stopped)
    begun = time.monotonic()
    train(f"{RUN}{NO_DROPOUT} --data-path {data} --save {tmp_path} --save-interval 20 --async-save")
    assert publish.published_iterations(tmp_path) == [20] and time.monotonic() - begun > 1


def start(arguments: str, log: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "pretrain_gpt.py", *arguments.split()]
    return subprocess.Popen(
        command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment
    )


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    """Until the run has written `text`, or has ended."""
    deadline = time.monotonic() + 60
    while text not in log.read_text() and process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step(data, tmp_path, number):
    endless = "--train-iters 100000 --save-interval 100000 --num-workers 2 --exit-signal-handler"
    process = start(
        f"{RUN}{NO_DROPOUT} --data-path {data} {endless} --save {tmp_path}", tmp_path / "log"
    )
    wait_for("\n iteration ", tmp_path / "log", process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    saved = publish.tracked_iteration(tmp_path)
    assert saved is not None and len(rows_of(tmp_path / "metrics.jsonl")) == saved
    assert number.name in (tmp_path / "log").read_text()
