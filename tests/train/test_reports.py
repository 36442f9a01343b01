"""What a run prints and writes, as users and their scripts read it."""

import gc
import math
import multiprocessing
import os
import re
import subprocess

import pytest
import torch
from runs import LLAMA, NO_DROPOUT, SMALL, rows_of, train, write_data, write_ends

from trivium import ops
from trivium.config import flags, resolve
from trivium.data.splits import build_datasets
from trivium.model.gpt import GPT
from trivium.train.passes import Passes

RUN = SMALL + LLAMA + NO_DROPOUT + " --eval-interval 10 --eval-iters 2 --split 80,10,10"
MEGATRON_LINE = re.compile(
    r"^ iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| elapsed time per iteration "
    r"\(ms\): ([\d.]+) \| learning rate: (\S+) \| "
    r"global batch size: +(\d+) \| lm loss: (\S+) \| loss scale: ([\d.]+) \| grad norm: ([\d.]+) "
    r"\| number of skipped iterations: +(\d+) \| "
    r"number of nan iterations: +(\d+) \|",
    re.MULTILINE,
)
FIELDS = (
    "iteration consumed_samples consumed_tokens lm_loss grad_norm learning_rate global_batch_size "
    "iteration_ms tokens_per_second "
    "tflops_per_device mfu mfu_causal loss_scale skipped memory_bytes"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small", documents=120)


def test_lines_rows_and_files_agree(data, tmp_path, capsys):
    train(
        f"{RUN} --data-path {data} --save {tmp_path} --tensorboard-dir {tmp_path}/tb "
        "--log-throughput"
    )
    out, rows = capsys.readouterr().out, rows_of(tmp_path / "metrics.jsonl")
    lines = MEGATRON_LINE.findall(out)
    assert [int(line[0]) for line in lines] == [5, 10, 15, 20]
    for i, line in enumerate(lines):
        block = rows[5 * i : 5 * i + 5]
        assert float(line[6]) == pytest.approx(sum(row["lm_loss"] for row in block) / 5, rel=1e-6)
        assert float(line[4]) == pytest.approx(block[-1]["learning_rate"], rel=1e-6)
        assert (int(line[2]), float(line[8])) == (
            block[-1]["consumed_samples"],
            round(block[-1]["grad_norm"], 3),
        )
    assert out.count("tokens per second") == 4 and "MFU" not in out  # no peak is known for a CPU
    assert [list(row) for row in rows] == [FIELDS] * 20
    assert [row["iteration"] for row in rows] == list(range(1, 21))
    assert (
        rows[2]["consumed_tokens"] == 3 * 8 * 32
        and rows[0]["learning_rate"] == 0.0
        and rows[0]["mfu"] is None
    )
    assert all(
        row["tokens_per_second"] == pytest.approx(8 * 32 / row["iteration_ms"] * 1000)
        for row in rows
    )
    for split, name, at in (("valid", "validation", [10, 20]), ("test", "test", [20])):
        found = rows_of(tmp_path / "metrics.jsonl", split)
        assert [row["iteration"] for row in found] == at
        for row in found:
            assert row["ppl"] == pytest.approx(math.exp(row["lm_loss"]))
            assert (
                f" {name} loss at iteration {row['iteration']} | lm loss value: "
                f"{row['lm_loss']:.6E} | lm loss PPL: {row['ppl']:.6E} |" in out
            )
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    check_tensorboard(tmp_path / "tb", rows)


def check_tensorboard(folder, rows):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert {
        "lm loss",
        "learning-rate",
        "grad-norm",
        "loss-scale",
        "batch-size",
        "lm loss validation",
    } <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lm loss")] == list(range(1, 21))
    assert [event.value for event in events.Scalars("lm loss")] == pytest.approx(
        [row["lm_loss"] for row in rows], rel=1e-6
    )


def test_an_evaluation_ends_its_worker_processes(data, monkeypatch):
    """Left to the garbage collector they pile up, and hold the run up for five seconds each."""
    counts, honest = [], Passes.mean_loss

    def mean_loss(*arguments):
        counts.append(len(multiprocessing.active_children()))
        return honest(*arguments)

    monkeypatch.setattr(Passes, "mean_loss", mean_loss)
    gc.disable()
    try:
        train(f"{RUN} --data-path {data} --train-iters 6 --eval-interval 2 --num-workers 1")
    finally:
        gc.enable()
    assert (
        counts == [counts[0]] * 4 and counts[0] >= 2
    )  # the training data's worker and the evaluation's own


def test_zero_width_split_and_no_iterations_mean_no_validation(data, tmp_path, capsys):
    for change in ("--split 100,0,0", "--eval-iters 0"):
        train(
            f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl {change} "
            "--exit-interval 10"
        )
        assert rows_of(tmp_path / "m.jsonl", "valid") == []
        assert "validation loss" not in capsys.readouterr().out


def test_validation_is_the_same_whatever_was_trained_before(data, tmp_path):
    """Two evaluations of the same samples give the same loss.

    The learning rate is almost zero, so that the model stands still.
    """
    train(
        f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl --lr 1e-30 "
        "--lr-warmup-iters 0 --lr-decay-style constant"
    )
    first, second = rows_of(tmp_path / "m.jsonl", "valid")
    assert first["lm_loss"] == second["lm_loss"]


def test_without_save_or_path_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(f"{RUN} --data-path {data} --data-cache-path {tmp_path}/cache --exit-interval 1")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_fresh_runs_put_the_rows_of_earlier_ones_aside(data, tmp_path):
    for count in (3, 2, 1):
        train(
            f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl --exit-interval {count}"
        )
    assert [len(rows_of(tmp_path / name)) for name in ("m.1.jsonl", "m.2.jsonl", "m.jsonl")] == [
        3,
        2,
        1,
    ]


def test_a_pipe_is_written_to_and_not_replaced(data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    train(f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/pipe --exit-interval 2")
    assert len(reader.communicate()[0].splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_an_evaluation_without_a_prediction_is_null(tmp_path):
    write_ends(tmp_path / "ends")
    train(
        f"{RUN} --eod-mask-loss --data-path {tmp_path}/ends --split 50,50,0 "
        f"--metrics-jsonl {tmp_path}/m.jsonl --train-iters 10"
    )
    assert [(row["lm_loss"], row["ppl"]) for row in rows_of(tmp_path / "m.jsonl", "valid")] == [
        (None, None)
    ]


def test_evaluation_is_the_masked_mean_of_the_first_samples_without_dropout(data, tmp_path):
    """Compare with a mean computed here.

    At a learning rate of almost zero the model is the initial one.
    """
    still = (
        "--lr 1e-30 --lr-warmup-iters 0 --lr-decay-style constant --attention-dropout 0.5 "
        "--hidden-dropout 0.5 --eod-mask-loss --eval-iters 3"
    )
    arguments = (
        f"{RUN} {still} --data-path {data} --split 60,40,0 --metrics-jsonl {tmp_path}/m.jsonl "
        "--exit-interval 10"
    )
    train(arguments, 4)
    samples = build_datasets([str(data)], "60,40,0", 32, 1234, (160, 24, 0)).valid
    ids = torch.stack([torch.from_numpy(samples.sample(k).ids) for k in range(24)])
    config = resolve(flags.parse(arguments.split()).config, 1)
    model = GPT(config.model, 97, ops=ops.Ops(), seed=1234).eval()
    mask = ids[:, :-1] != 96
    _, losses = model(ids[:, :-1], targets=(ids[:, 1:], mask))
    assert 0.9 < mask.float().mean() < 1
    assert rows_of(tmp_path / "m.jsonl", "valid")[0]["lm_loss"] == pytest.approx(
        (losses[mask].sum() / mask.sum()).item(), rel=1e-6
    )


@pytest.mark.parametrize("dropout", ["--attention-dropout 0.5", "--hidden-dropout 0.5"])
def test_dropout_is_drawn_anew_each_iteration_and_from_the_seed(data, tmp_path, dropout):
    """Train on one sample at a learning rate of almost zero: all that changes is the mask."""
    arguments = (
        f"{RUN} --lr 1e-30 --lr-warmup-iters 0 --lr-decay-style constant "
        f"--eval-iters 0 {dropout} --exit-interval 4 --data-path {data}"
    )
    losses = {}
    for name, more in (
        ("none", "--attention-dropout 0 --hidden-dropout 0"),
        ("a", ""),
        ("again", ""),
        ("seed", "--seed 7"),
    ):
        train(f"{arguments} {more} --metrics-jsonl {tmp_path}/{name}.jsonl")
        losses[name] = [row["lm_loss"] for row in rows_of(tmp_path / f"{name}.jsonl")]
    assert losses["a"] == losses["again"] != losses["seed"]
    offsets = [a - b for a, b in zip(losses["a"], losses["none"], strict=True)]
    assert len({round(offset, 7) for offset in offsets}) == 4
