"""Wrong inputs: one clear line each, the right exit status, and nothing started or written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import LLAMA, NO_DROPOUT, SMALL, train, write_data

import pretrain_gpt

ROOT = Path(__file__).resolve().parents[1]
RUN = SMALL + LLAMA + NO_DROPOUT + " --eval-iters 0 --split 100,0,0"


def write_foreign_index(prefix: Path) -> None:
    write_data(prefix)
    Path(f"{prefix}.idx").write_bytes(b"not an index at all, by any means")


def write_truncated_bin(prefix: Path) -> None:
    write_data(prefix)
    os.truncate(f"{prefix}.bin", 100)


def write_empty_dataset(prefix: Path) -> None:
    write_data(prefix, documents=0)


def write_large_id(prefix: Path) -> None:
    write_data(prefix, vocab_size=200)


def write_good(prefix: Path) -> None:
    write_data(prefix)


CASES = {
    "impossible batch": (
        write_good,
        "--global-batch-size 9",
        2,
        ["--global-batch-size 9", "--micro-batch-size 2", "8, 10"],
    ),
    "unknown flag": (
        write_good,
        "--hiden-size 3",
        2,
        ["--hiden-size", "did you mean --hidden-size?"],
    ),
    "not a number": (write_good, "--lr fast", 2, ["--lr 'fast' is not a finite number"]),
    "too few processes": (
        write_good,
        "--tensor-model-parallel-size 2",
        2,
        ["1 processes", "--tensor-model-parallel-size 2", "start 2"],
    ),
    "missing data": (None, "", 2, ["data.idx", "--data-path"]),
    "missing tokenizer": (
        write_good,
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model gone",
        2,
        ["gone: no such file"],
    ),
    "wrong --load": (
        write_good,
        "--load {folder}/elsewhere",
        2,
        ["--load", "elsewhere holds no published checkpoint"],
    ),
    "no data at all": (write_good, "--config {folder}/none.yaml", 2, ["none.yaml"]),
    "truncated .bin": (write_truncated_bin, "", 1, ["data.bin", "100"]),
    "foreign .idx": (write_foreign_index, "", 1, ["data.idx"]),
    "empty dataset": (write_empty_dataset, "", 1, ["data"]),
    "id outside the vocabulary": (
        write_large_id,
        "",
        1,
        ["data.bin, document", "offset", "outside the vocabulary of 97"],
    ),
    "export of another family": (
        write_good,
        "--normalization LayerNorm --save {folder}/s --save-hf {folder}/hf",
        2,
        ["--save-hf", "RMSNorm"],
    ),
    "export of nothing": (
        write_good,
        "--save-hf {folder}/hf",
        2,
        ["--save-hf", "needs --save FOLDER"],
    ),
    "kernels that cannot run": (
        write_good,
        "--kernels native --fp16",
        2,
        ["--kernels native", "float16"],
    ),
    "metrics in no folder": (
        write_good,
        "--metrics-jsonl {folder}/data.bin/m.jsonl",
        2,
        ["--metrics-jsonl", "data.bin is no folder"],
    ),
    "metrics in another's file": (
        write_good,
        "--metrics-jsonl {folder}/data.bin",
        2,
        ["--metrics-jsonl", "line 1 is no row of metrics"],
    ),
    "no dataset for the split": (
        write_good,
        "--split 0,100,0 --eval-iters 1",
        2,
        ["--split gives training no share"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_one_clear_line_and_status(case, tmp_path, capfd):
    make, flags, status, expected = case
    if make:
        make(tmp_path / "data")
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = (
        f"{RUN} --data-path {tmp_path}/data {flags.format(folder=tmp_path)} "
        f"--data-cache-path {tmp_path}/cache"
    )
    assert pretrain_gpt.cli(arguments.split()) == status
    error = capfd.readouterr().err
    message = error.splitlines()
    assert len(message) == (2 if "1 problem in the configuration" in error else 1), error
    assert message[0].startswith("pretrain_gpt.py: ")
    for text in expected:
        assert text in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before


def test_several_problems_are_told_at_once(tmp_path, capfd):
    assert (
        pretrain_gpt.cli("--preset tiny --micro-batch-size 0 --bf16 --fp16 --split x".split()) == 2
    )
    error = capfd.readouterr().err
    assert "problems in the configuration" in error
    for text in (
        "--micro-batch-size 0",
        "--bf16 and --fp16",
        "--split 'x'",
        "--lr is missing",
        "--seq-length is missing",
    ):
        assert text in error


def test_the_exit_status_reaches_the_shell(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "pretrain_gpt.py", "--lr", "x"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_damaged_checkpoint_falls_back_with_a_message(tmp_path, capfd, damage):
    write_data(tmp_path / "data")
    arguments = (
        f"{RUN} --data-path {tmp_path}/data --save {tmp_path}/run --load {tmp_path}/run "
        "--save-interval 5"
    )
    train(f"{arguments} --exit-interval 10")
    shard = tmp_path / "run/iter_0000010/shard_00000.safetensors"
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        shard.unlink()
    capfd.readouterr()
    train(arguments)
    out = capfd.readouterr().out
    assert "falling back to iteration 5" in out and "training from iteration 5" in out
    assert pretrain_gpt.cli(f"{arguments} --ckpt-step 7".split()) == 2
    assert "has no iteration 7; published: 5, 10, 15, 20" in capfd.readouterr().err


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, capfd):
    write_data(tmp_path / "data")
    train(f"{RUN} --data-path {tmp_path}/data --save {tmp_path}/run --exit-interval 1")
    assert (
        pretrain_gpt.cli(
            f"{RUN} --hidden-size 64 --data-path {tmp_path}/data --load {tmp_path}/run".split()
        )
        == 1
    )
    assert "is of another model: --hidden-size was 32, is 64" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        "--num-layers 1",
        "--num-attention-heads 8",
        "--rotary-base 100",
        "--position-embedding-type none",
        "--squared-relu --no-swiglu",
    ],
)
def test_a_checkpoint_of_another_model_is_refused_even_where_its_tensors_fit(
    tmp_path, capfd, change
):
    write_data(tmp_path / "data")
    train(f"{RUN} --data-path {tmp_path}/data --save {tmp_path}/run --exit-interval 1")
    assert (
        pretrain_gpt.cli(
            f"{RUN} {change} --data-path {tmp_path}/data --load {tmp_path}/run".split()
        )
        == 1
    )
    error = capfd.readouterr().err
    assert "is of another model" in error and change.split()[0] in error and error.count("\n") == 1


def test_a_first_launch_may_load_from_its_own_save_folder(tmp_path, capfd):
    write_data(tmp_path / "data")
    train(
        f"{RUN} --data-path {tmp_path}/data --save {tmp_path}/run --load {tmp_path}/run "
        "--exit-interval 1"
    )
    assert "no checkpoint in" in capfd.readouterr().out


def test_a_full_disk_loses_nothing_that_was_published(tmp_path):
    """The save fails in one line, and the checkpoint before it loads.

    A limit on the size of files stands in for the full disk.
    """
    write_data(tmp_path / "data")
    arguments = (
        f"{RUN} --data-path {tmp_path}/data --save {tmp_path}/run --load {tmp_path}/run "
        f"--metrics-jsonl {tmp_path}/small.jsonl"
    ).split()
    train(" ".join([*arguments, "--exit-interval", "4"]))
    limited = f"ulimit -f 64; exec {sys.executable} {ROOT}/pretrain_gpt.py {' '.join(arguments)}"
    result = subprocess.run(
        ["bash", "-c", limited],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "too large" in result.stderr or "No space" in result.stderr
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "4"
    train(" ".join([*arguments, "--exit-interval", "6"]))
    manifest = json.loads((tmp_path / "run/iter_0000006/manifest.json").read_text())
    assert "layers.0.attention.q.weight" in json.dumps(manifest)
    shutil.rmtree(tmp_path / "run")
