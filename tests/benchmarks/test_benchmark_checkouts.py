"""The comparison of two checkouts runs both as commands and reports the ratio of their times."""

import shutil
import sys
from pathlib import Path
from statistics import median

import benchmark
import pytest

from benchmarks import checkouts

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 16"
    " --micro-batch-size 2 --global-batch-size 4 --device cpu --num-workers 0"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 95 --lr 1e-3"
)


def test_a_checkout_against_itself_reports_every_round(monkeypatch, capsys):
    itself = checkouts.Checkout("other", ROOT, Path(sys.executable))
    monkeypatch.setattr(checkouts, "other_checkout", lambda folder: itself)
    monkeypatch.setattr(checkouts, "SHAPES", {"gpt": SMALL})
    monkeypatch.setattr(checkouts, "shape_flags", lambda shape, device: SMALL)
    benchmark.main(["--against", str(ROOT), "--rounds", "2", "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("gpt"))) :]
    assert table[0].split() == ["gpt", "this", "ms", "other", "ms", "this/other"]
    assert [line.split()[0] for line in table[1:]] == ["round", "round", "median"]
    for line in table[1:]:
        this, other, ratio = map(float, line.split()[-3:])
        assert this > 0 and other > 0 and ratio > 0


def test_runs_alternate_and_the_ratio_is_the_median_of_the_rounds(monkeypatch):
    ran = []
    times = {"this": iter([2.0, 3.0, 8.0]), "other": iter([1.0, 2.0, 2.0])}

    def iteration_ms(checkout, flags, steps):
        ran.append(checkout.name)
        return next(times[checkout.name])

    monkeypatch.setattr(checkouts, "iteration_ms", iteration_ms)
    python = Path(sys.executable)
    pair = (checkouts.Checkout("this", ROOT, python), checkouts.Checkout("other", ROOT, python))
    found = checkouts.compare_shape(pair, SMALL, rounds=3, steps=1)
    assert ran == ["this", "other", "other", "this", "this", "other"]
    assert found["ratios"] == [2.0, 1.5, 4.0] and found["ratio"] == median(found["ratios"])
    assert found["medians"] == {"this": 3.0, "other": 2.0}


def test_a_folder_without_an_environment_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"--against {tmp_path}: there is no .*pretrain_gpt.py"):
        checkouts.other_checkout(tmp_path)


def test_a_python_that_imports_another_checkout_is_refused(tmp_path):
    shutil.copy(ROOT / "pretrain_gpt.py", tmp_path)
    foreign = checkouts.Checkout("other", tmp_path, Path(sys.executable))
    with pytest.raises(ValueError, match=f"--against {tmp_path}: its Python .* imports"):
        foreign.verify()
