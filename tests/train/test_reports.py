"""What a run prints and writes, as users and their scripts read it."""

import math
import re

import pytest
from runs import LLAMA, NO_DROPOUT, SMALL, rows_of, train, write_data

RUN = SMALL + LLAMA + NO_DROPOUT + " --eval-interval 10 --eval-iters 2 --split 80,10,10"
MEGATRON_LINE = re.compile(
    r"^ iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| elapsed time per iteration \(ms\): ([\d.]+) \| learning rate: (\S+) \| "
    r"global batch size: +(\d+) \| lm loss: (\S+) \| loss scale: ([\d.]+) \| grad norm: ([\d.]+) \| number of skipped iterations: +(\d+) \| "
    r"number of nan iterations: +(\d+) \|",
    re.MULTILINE,
)
FIELDS = (
    "iteration consumed_samples consumed_tokens lm_loss grad_norm learning_rate global_batch_size iteration_ms tokens_per_second "
    "tflops_per_device mfu mfu_causal loss_scale skipped memory_bytes"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small", documents=120)


def test_lines_rows_and_files_agree(data, tmp_path, capsys):
    train(f"{RUN} --data-path {data} --save {tmp_path} --tensorboard-dir {tmp_path}/tb --log-throughput")
    out, rows = capsys.readouterr().out, rows_of(tmp_path / "metrics.jsonl")
    lines = MEGATRON_LINE.findall(out)
    assert [int(line[0]) for line in lines] == [5, 10, 15, 20]
    for i, line in enumerate(lines):
        block = rows[5 * i : 5 * i + 5]
        assert float(line[6]) == pytest.approx(sum(row["lm_loss"] for row in block) / 5, rel=1e-6)
        assert float(line[4]) == pytest.approx(block[-1]["learning_rate"], rel=1e-6)
        assert (int(line[2]), float(line[8])) == (block[-1]["consumed_samples"], round(block[-1]["grad_norm"], 3))
    assert out.count("tokens per second") == 4 and "MFU" not in out  # no peak is known for a CPU
    assert [list(row) for row in rows] == [FIELDS] * 20
    assert [row["iteration"] for row in rows] == list(range(1, 21))
    assert rows[2]["consumed_tokens"] == 3 * 8 * 32 and rows[0]["learning_rate"] == 0.0 and rows[0]["mfu"] is None
    assert all(row["tokens_per_second"] == pytest.approx(8 * 32 / row["iteration_ms"] * 1000) for row in rows)
    for split, name, at in (("valid", "validation", [10, 20]), ("test", "test", [20])):
        found = rows_of(tmp_path / "metrics.jsonl", split)
        assert [row["iteration"] for row in found] == at
        for row in found:
            assert row["ppl"] == pytest.approx(math.exp(row["lm_loss"]))
            assert f" {name} loss at iteration {row['iteration']} | lm loss value: {row['lm_loss']:.6E} | lm loss PPL: {row['ppl']:.6E} |" in out
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    check_tensorboard(tmp_path / "tb", rows)


def check_tensorboard(folder, rows):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"lm loss", "learning-rate", "grad-norm", "loss-scale", "batch-size", "lm loss validation"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lm loss")] == list(range(1, 21))
    assert [event.value for event in events.Scalars("lm loss")] == pytest.approx([row["lm_loss"] for row in rows], rel=1e-6)


def test_zero_width_split_and_no_iterations_mean_no_validation(data, tmp_path, capsys):
    for change in ("--split 100,0,0", "--eval-iters 0"):
        train(f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl {change} --exit-interval 10")
        assert rows_of(tmp_path / "m.jsonl", "valid") == []
        assert "validation loss" not in capsys.readouterr().out


def test_validation_is_the_same_whatever_was_trained_before(data, tmp_path):
    """At a learning rate of almost zero the model stands still: two evaluations of the same samples give the same loss."""
    train(f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl --lr 1e-30 --lr-warmup-iters 0 --lr-decay-style constant")
    first, second = rows_of(tmp_path / "m.jsonl", "valid")
    assert first["lm_loss"] == second["lm_loss"]


def test_without_save_or_path_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(f"{RUN} --data-path {data} --data-cache-path {tmp_path}/cache --exit-interval 1")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_fresh_run_puts_the_rows_of_an_earlier_one_aside(data, tmp_path):
    for _ in range(2):
        train(f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl --exit-interval 3")
    assert len(rows_of(tmp_path / "m.jsonl")) == len(rows_of(tmp_path / "m.previous.jsonl")) == 3
