"""The promise of data parallelism: the run does not know how many processes it has."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import LLAMA, NO_DROPOUT, SMALL, rows_of, train, write_data

ROOT = Path(__file__).resolve().parents[2]
# Unequal masks (--eod-mask-loss), gradient accumulation (global batch 8 of micro-batches of 2), a
# clip that bites, an awkward vocabulary, hidden dropout in the same places.
AWKWARD = (
    SMALL
    + " --eod-mask-loss --attention-dropout 0 --hidden-dropout 0.1 --clip-grad 0.3"
    + " --eval-interval 10 --eval-iters 3 --split 80,20,0"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small")


@pytest.mark.parametrize(
    ("model", "ranks"), [("", 2), (LLAMA, 2), (LLAMA, 4)], ids=["gpt-dp2", "llama-dp2", "llama-dp4"]
)
def test_losses_and_norms_equal_one_process(data, tmp_path, model, ranks):
    """fp32, 20 updates: sums in another order stay within 1e-5 relative.

    A wrong mask or mean is off by 1e-2 here.
    """
    for n in (1, ranks):
        train(f"{AWKWARD}{model} --data-path {data} --metrics-jsonl {tmp_path}/{n}.jsonl", n)
    one, many = (rows_of(tmp_path / f"{n}.jsonl") for n in (1, ranks))
    assert len(one) == len(many) == 20
    for a, b in zip(one, many, strict=True):
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=1e-5), a["iteration"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), a["iteration"]
    assert one[-1]["lm_loss"] < 0.85 * one[0]["lm_loss"]
    for a, b in zip(*(rows_of(tmp_path / f"{n}.jsonl", "valid") for n in (1, ranks)), strict=True):
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=1e-5)


def test_micro_batch_size_does_not_matter(data, tmp_path):
    for micro in (1, 4, 8):
        train(
            f"{AWKWARD} --micro-batch-size {micro} --data-path {data} "
            f"--metrics-jsonl {tmp_path}/{micro}.jsonl"
        )
    one, *others = (rows_of(tmp_path / f"{micro}.jsonl") for micro in (1, 4, 8))
    for rows in others:
        assert [row["lm_loss"] for row in rows] == pytest.approx(
            [row["lm_loss"] for row in one], rel=1e-5
        )


def test_the_loss_is_the_masked_mean_over_the_global_batch(data, tmp_path):
    """The first loss is the mean over all unmasked labels of eight samples, computed here."""
    import numpy as np
    import torch

    from trivium import ops
    from trivium.config import flags, resolve
    from trivium.data.splits import build_datasets
    from trivium.model.gpt import GPT

    arguments = (
        f"{SMALL}{LLAMA}{NO_DROPOUT} --eod-mask-loss --split 100,0,0 --data-path {data} "
        f"--metrics-jsonl {tmp_path}/m.jsonl"
    )
    train(arguments, 2)
    config = resolve(flags.parse(arguments.split()).config, 1)
    samples = build_datasets([str(data)], "100,0,0", 32, 1234, (160, 0, 0)).train
    ids = torch.from_numpy(np.stack([samples.sample(k).ids for k in range(8)]))
    model = GPT(config.model, 97, ops=ops.Ops(), seed=1234)
    mask = ids[:, :-1] != 96
    _, losses = model(ids[:, :-1], targets=(ids[:, 1:], mask))
    assert 0.9 < mask.float().mean() < 1
    assert rows_of(tmp_path / "m.jsonl")[0]["lm_loss"] == pytest.approx(
        (losses[mask].sum() / mask.sum()).item(), rel=1e-6
    )


def test_torchrun_gives_the_losses_of_one_process(data, tmp_path):
    """Through the launcher that users use, with workers that read ahead."""
    arguments = f"{AWKWARD}{LLAMA} --num-workers 1 --data-path {data}".split()
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "pretrain_gpt.py"),
    ]
    result = subprocess.run(
        [*launcher, *arguments, "--metrics-jsonl", f"{tmp_path}/2.jsonl"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    train(" ".join([*arguments, "--metrics-jsonl", f"{tmp_path}/1.jsonl"]))
    one, two = ([row["lm_loss"] for row in rows_of(tmp_path / f"{n}.jsonl")] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5) and len(two) == 20


@pytest.mark.parametrize("kernels", ["torch", "native", "triton"])
def test_kernels_do_not_change_the_losses(data, tmp_path, kernels):
    """Triton in its interpreter; fp32 sums in another order."""
    few = f"{AWKWARD}{LLAMA} --train-iters 4 --eval-iters 0 --data-path {data}"
    train(f"{few} --kernels torch --metrics-jsonl {tmp_path}/reference.jsonl")
    train(
        f"{few} --kernels {kernels} --metrics-jsonl {tmp_path}/{kernels}.jsonl",
        1 if kernels == "triton" else 2,
    )
    reference, found = (
        [row["lm_loss"] for row in rows_of(tmp_path / f"{name}.jsonl")]
        for name in ("reference", kernels)
    )
    assert found == pytest.approx(reference, rel=1e-5)
