"""An update with a loss or a gradient that is not finite is skipped on every rank.

It is counted and named, and leaves no trace in the moments.
"""

import re

import pytest
from runs import LLAMA, NO_DROPOUT, SMALL, rows_of, train, write_data, write_ends

import pretrain_gpt
from trivium.launch import Process
from trivium.mesh import Mesh
from trivium.model.gpt import GPT
from trivium.testing import run_ranks
from trivium.train.passes import Passes

RUN = SMALL + LLAMA + NO_DROPOUT + " --eval-iters 0 --split 100,0,0"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "small")


def poisoned_run(mesh: Mesh, arguments: str, iteration: int, value: float, where: str) -> None:
    """Run with losses, or one gradient element, of `value` in one micro-batch of the last rank."""
    honest, honest_forward = Passes.run_chunk, GPT.forward

    def poisoned(model, x, context, *, targets):
        labels, weights = targets
        if where == "loss":
            total, losses = honest_forward(model, x, context, targets=(labels, weights * value))
            return total, losses * value
        if where == "gradient":
            weights = weights.clone()
            weights[0, 0] *= value  # of one token
        total, losses = honest_forward(model, x, context, targets=(labels, weights))
        return total, losses + value if where == "loss alone" else losses

    def call(self, state, chunk, index, x):
        here = state.iteration == iteration and index == 1 and mesh.rank == mesh.world_size - 1
        GPT.forward = poisoned if here else honest_forward
        return honest(self, state, chunk, index, x)

    Passes.run_chunk = call
    try:
        pretrain_gpt.main(arguments.split(), Process(mesh.rank, mesh.world_size, mesh.rank))
    finally:
        Passes.run_chunk, GPT.forward = honest, honest_forward


ZERO1 = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@pytest.mark.parametrize(
    ("layout", "where", "value"),
    [
        ("", "loss", float("nan")),
        ("", "loss", float("inf")),
        ("", "gradient", float("nan")),
        ("", "loss alone", float("inf")),
        (ZERO1, "gradient", float("nan")),
        (
            "--pipeline-model-parallel-size 2",
            "loss",
            float("nan"),
        ),  # which only the last stage sees
        ("--tensor-model-parallel-size 2 --sequence-parallel", "gradient", float("inf")),
    ],
)
def test_one_bad_micro_batch_on_one_rank_skips_the_update_everywhere(
    data, tmp_path, layout, where, value
):
    """The run goes on as if the bad batch had never been: the loss falls on."""
    run_ranks(
        2,
        poisoned_run,
        f"{RUN} {layout} --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl",
        6,
        value,
        where,
    )
    rows = rows_of(tmp_path / "m.jsonl")
    assert [row["iteration"] for row in rows if row["skipped"]] == [6]
    assert (rows[5]["lm_loss"] is None) == (where != "gradient") and (
        rows[5]["grad_norm"] is None
    ) == (where != "loss alone")
    assert (
        rows[6]["learning_rate"] != rows[5]["learning_rate"]
        and rows[6]["consumed_samples"] == 7 * 8
    )
    assert (
        all(row["lm_loss"] is not None for row in rows[6:])
        and rows[-1]["lm_loss"] < rows[4]["lm_loss"]
    )


def test_the_skipped_iteration_is_named_and_counted(data, tmp_path, capsys):
    poisoned_run(Mesh.plan(1, 0), f"{RUN} --data-path {data}", 6, float("nan"), "loss")
    out = capsys.readouterr().out
    assert "warning: iteration 6: the loss is nan; the update is skipped" in out
    assert re.search(
        r"iteration +10/ +20 .*number of skipped iterations: +1 \| number of nan iterations: +1 \|",
        out,
    )


def test_fp16_finds_its_scale_and_then_trains(data, tmp_path):
    """From a scale of 2^32, updates overflow and are skipped until gradients fit.

    Learning rate and samples go on all the same.
    """
    train(
        f"{RUN} --fp16 --hysteresis 1 --data-path {data} --metrics-jsonl {tmp_path}/m.jsonl "
        "--train-iters 60 --lr-decay-iters 60"
    )
    rows = rows_of(tmp_path / "m.jsonl")
    skipped = [row["iteration"] for row in rows if row["skipped"]]
    assert skipped[:4] == [1, 2, 3, 4] and len(skipped) < 30 and skipped[-1] < 30
    assert rows[-1]["loss_scale"] == 2.0 ** (32 - len(skipped))
    assert (
        rows[3]["learning_rate"] > rows[1]["learning_rate"] and rows[3]["consumed_samples"] == 4 * 8
    )
    assert rows[-1]["lm_loss"] < 0.8 * rows[0]["lm_loss"]


def test_bf16_and_fp16_follow_fp32(data, tmp_path):
    """Compare 20 losses with fp32's: within 1%, where no wrong scale or mean would leave them."""
    for name, flags in (
        ("fp32", ""),
        ("bf16", "--bf16"),
        ("fp16", "--fp16 --initial-loss-scale 4096"),
    ):
        train(f"{RUN} --data-path {data} --metrics-jsonl {tmp_path}/{name}.jsonl {flags}")
    reference = [row["lm_loss"] for row in rows_of(tmp_path / "fp32.jsonl")]
    for name in ("bf16", "fp16"):
        rows = rows_of(tmp_path / f"{name}.jsonl")
        assert not any(row["skipped"] for row in rows)
        assert [row["lm_loss"] for row in rows] == pytest.approx(reference, rel=0.01)


def test_a_batch_with_no_prediction_left_is_skipped_and_is_no_overflow(tmp_path, capsys):
    """N = 0 is neither a nan nor a reason to lower the loss scale."""
    write_ends(tmp_path / "ends")
    flags = "--eod-mask-loss --fp16 --initial-loss-scale 65536 --hysteresis 1 --train-iters 10"
    train(f"{RUN} --data-path {tmp_path}/ends {flags} --metrics-jsonl {tmp_path}/m.jsonl")
    assert [
        (row["skipped"], row["lm_loss"], row["loss_scale"]) for row in rows_of(tmp_path / "m.jsonl")
    ] == [(1, None, 65536)] * 10
    out = capsys.readouterr().out
    assert "iteration 1: its mask leaves no prediction; the update is skipped" in out
    assert re.search(r"number of skipped iterations: +5 \| number of nan iterations: +0", out)
