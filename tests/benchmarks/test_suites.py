"""The benchmark measures what it says: bytes by hand-worked sums, layouts that compute the same."""

import argparse
import json
import math
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import benchmark
import pytest
import torch
import torch.distributed as dist

import benchmarks.checkpoint as checkpoints
import benchmarks.generate as generation
import benchmarks.parallel as bench
import benchmarks.peers as peers
import benchmarks.scaling as scaling
import benchmarks.train as train
from benchmarks.side_by_side import Candidate, Failure, Memory, Turns, Update
from trivium import launch, ops
from trivium.config import flags, resolve
from trivium.train.build import build_trainer

SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --attention-dropout 0 --hidden-dropout 0 --seq-length 16 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 100 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 95 --make-vocab-size-divisible-by 8"
)
ACTIVATION = 16 * 32 * 4  # bytes of the hidden states of a micro-batch
AGREED = 4 * 8  # loss, count, wish and norm in float64


def gradient_bytes() -> int:
    config = resolve(flags.parse(SMALL.split()).config, 1)
    process = launch.Process()
    trainer = build_trainer(
        config, launch.plan_mesh(config, process), torch.device("cpu"), ops.Ops(), 96, 95
    )
    return sum(bucket.size * 4 for bucket in trainer.optimizer.buckets)


@pytest.fixture(scope="module")
def one():
    return bench.run_layout(1, SMALL, 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", lambda gradients: {"all-reduce": gradients + AGREED}),
        (
            "--use-distributed-optimizer",
            lambda gradients: {
                "reduce-scatter": gradients // 2,
                "all-gather": gradients // 2,
                "all-reduce": AGREED,
            },
        ),
        # rank 0 sends 4 micro-batches on; the tied weight's gradient [96, 32] goes between the two ends
        (
            "--pipeline-model-parallel-size 2",
            lambda gradients: {"send": 4 * ACTIVATION, "all-reduce": 96 * 32 * 4 + AGREED},
        ),
    ],
    ids=["dp2", "zero1", "pp2"],
)
def test_bytes_sent_are_those_worked_out_by_hand(given, expected, one):
    found = bench.run_layout(2, f"{SMALL} {given}", 1)
    assert found.sent == expected(gradient_bytes())
    assert found.loss == pytest.approx(one.loss, rel=1e-5)
    assert len(found.seconds) == 1 and found.seconds[0] > 0


def test_one_process_sends_nothing(one):
    assert one.sent == {}


def test_estimated_memory_is_the_layouts():
    """A parameter takes 4 bytes of weights, which are the fp32 masters too, 4 of gradient and 8 of moments; two shards have half of the moments."""
    plain, zero = (
        bench.estimated_memory(1, SMALL),
        bench.estimated_memory(2, f"{SMALL} {bench.ZERO}"),
    )
    assert plain - zero == gradient_bytes() // 4 * 8 // 2
    assert bench.estimated_memory(1, f"{SMALL} --recompute-granularity full") < plain


def test_summary_is_the_median_with_its_quartiles():
    runs = [
        bench.Measurement([1.0, 2.0, 9.0, 3.0], {"send": 5}, 7, 0.5),
        bench.Measurement([2.0, 2.0, 2.0, 3.0], {"send": 5}, 8, 0.5),
    ]
    assert bench.summary(runs) == {
        "milliseconds": 2000.0,
        "spread": 0.25,
        "sent": {"send": 5},
        "memory": 8,
        "loss": 0.5,
    }


def test_every_candidate_of_the_checkpoint_suite_saves_and_loads_the_same_state(
    tmp_path, monkeypatch
):
    """What is compared is the same work: after each load every tensor is what it was before the saves."""
    monkeypatch.setattr(checkpoints, "MODEL", SMALL)
    with checkpoints.one_rank(tmp_path):
        run = checkpoints.built()
        before = {name: tensor.clone() for name, tensor in run.tensors.items()}
        assert any(name.startswith("optim.") and tensor.any() for name, tensor in before.items())
        for stall, total in (save() for save in checkpoints.saves(run, tmp_path / "work").values()):
            assert 0 < stall <= total
        for load in checkpoints.loads(run, tmp_path / "work").values():
            for tensor in run.tensors.values():
                tensor.fill_(-1)
            load()
            assert all(torch.equal(run.tensors[name], tensor) for name, tensor in before.items())


TINY = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --vocab-size 511"
TINY += " --micro-batch-size 4 --global-batch-size 4 --lr 1e-3"
TINY_LINES = {"gpt": f"{train.GPT} {TINY}", "llama": f"{train.LLAMA} {TINY} --ffn-hidden-size 176"}
BUILDERS = {
    "PyTorch": peers.plain,
    "megatron-core": peers.megatron,
    "transformers": peers.transformers_llama,
}
CPU = torch.device("cpu")


def a_layer_short(config, weights, device):
    """An engine that would win: it leaves the last layer out."""
    model = peers.PlainGPT(config)
    model.load_state_dict(peers.plain_weights(config, peers.read_weights(weights)))
    model.blocks = model.blocks[:-1]
    return peers.loop(config, model, device, model)


@pytest.fixture
def no_groups_left():
    """megatron-core keeps its process groups for good."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        import_module("megatron.core.parallel_state").destroy_model_parallel()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "shape"), [("PyTorch", "gpt"), ("megatron-core", "gpt"), ("transformers", "llama")]
)
def test_a_peer_learns_from_the_same_weights_as_trivium_does(
    name, shape, precision, tmp_path, no_groups_left
):
    """fp32: 64-term sums in another order, 5e-7 of each; four AdamW updates of 1e-3 move the loss by 1, so 1e-5 of it is ample."""
    for module in {"megatron-core": ["megatron.core"], "transformers": ["transformers"]}.get(
        name, []
    ):
        pytest.importorskip(module)
    line = f"{TINY_LINES[shape]} {train.BF16 if precision == 'bf16' else ''}"
    config = Candidate(name, BUILDERS[name], line).config()
    peers.write_weights(config, tmp_path / "weights.pt")
    ours, theirs = (
        build(config, tmp_path / "weights.pt", CPU) for build in (peers.trivium, BUILDERS[name])
    )
    losses = [(ours(), theirs()) for _ in range(4)]
    assert losses[0][0] - losses[-1][0] > 0.3
    for mine, other in losses:
        assert other == pytest.approx(
            mine, rel=1e-5 if precision == "fp32" else train.TOLERANCE["bf16"]
        )


def test_who_computes_less_is_flagged_and_who_is_not_there_is_named(capsys):
    line = TINY_LINES["gpt"]
    candidates = [
        Candidate("PyTorch fp32", peers.plain, line),
        Candidate("Trivium fp32", peers.trivium, line),
        Candidate("a layer short", a_layer_short, line),
        Candidate("absent", peers.plain, line, needs="no_such_engine"),
    ]
    turns = train.measure(candidates, rounds=2, probe=False)
    assert [len(found.timed) for found in turns.values()] == [2, 2, 2, 0]
    rows = train.rows_of(turns, {"slow": "for a reason"}, {"fp32": 1e11, "bf16": 1e10})
    assert (
        rows["PyTorch fp32"]["agrees"]
        and rows["Trivium fp32"]["agrees"]
        and not rows["a layer short"]["agrees"]
    )
    assert "no_such_engine" in rows["absent"]["left_out"] and rows["slow"] == {
        "left_out": "for a reason"
    }
    assert rows["Trivium fp32"]["trivium_is_faster"] == 1
    assert all(rows[name]["own_memory"] > 0 for name in ("PyTorch fp32", "Trivium fp32"))
    train.report("gpt", candidates[0].config(), rows)
    out = capsys.readouterr().out
    (flagged,) = [line for line in out.splitlines() if "DISAGREES" in line]
    assert flagged.startswith("a layer short") and "a layer short beyond 0.0001 in fp32" in out
    assert "no_such_engine" in out and "left out: for a reason" in out


def test_a_candidate_too_slow_for_the_batch_gets_fewer_sequences_and_the_losses_of_those(
    monkeypatch, capsys
):
    monkeypatch.setattr("benchmarks.side_by_side.BUDGET", 1e-9)
    candidates = [
        Candidate("PyTorch fp32", peers.plain, TINY_LINES["gpt"]),
        Candidate("Trivium fp32", peers.trivium, TINY_LINES["gpt"]),
    ]
    rows = train.rows_of(train.measure(candidates, rounds=3), {}, {"fp32": 1e11, "bf16": 1e10})
    for row in rows.values():
        assert row["batch"] == row["updates"] == 1 and row["agrees"]
        assert row["tokens_per_second"] == pytest.approx(32 / row["milliseconds"] * 1e3)
    train.report("gpt", candidates[0].config(), rows)
    assert "fewer sequences an update" in capsys.readouterr().out


def test_utilization_is_that_worked_out_by_hand():
    """N: 2 layers of 12 x 64^2 and a head of 512 x 64 make 131,072; attention adds 12 x 2 x 64 x 32 a token, its causal half 24,576."""
    config = Candidate("", peers.trivium, TINY_LINES["gpt"]).config()
    assert train.utilization(config, 1000, 1e9) == pytest.approx(
        ((6 * 131_072 + 49_152) / 1e6, (6 * 131_072 + 24_576) / 1e6)
    )


def test_a_row_is_made_of_medians_and_the_peak_of_its_precision():
    config = Candidate("", peers.trivium, TINY_LINES["gpt"]).config()
    updates = [
        Update(seconds, faults, loss)
        for seconds, faults, loss in ((2.0, 5, 6.0), (1.0, 9, 5.5), (4.0, 7, 5.0))
    ]
    turns = Turns(
        config, 4, Update(9.0, 99, 6.5), updates, Memory(30, 20), "x", [6.5, 6.0, 5.5, 4.0]
    )
    row = train.row(turns, {"fp32": 1e9, "bf16": 2e9})
    assert (row["milliseconds"], row["tokens_per_second"], row["page_faults"], row["spread"]) == (
        2000,
        64,
        7,
        0.75,
    )
    assert (row["memory"], row["own_memory"], row["deviation"], row["agrees"]) == (
        30,
        20,
        0.25,
        False,
    )
    assert row["mfu_full"] == pytest.approx(64 * 835_584 / 1e9)
    half = replace(
        turns, config=Candidate("", peers.trivium, f"{TINY_LINES['gpt']} --bf16").config()
    )
    assert train.row(half, {"fp32": 2e9, "bf16": 1e9})["mfu_full"] == pytest.approx(
        row["mfu_full"] / 2
    )
    assert math.isnan(Turns(config, 4, Update(1, 1, math.nan), [], None, "x", [1.0]).deviation)
    assert train.row(Turns(config, failure=Failure("why")), {}) == {"left_out": "why"}


def test_the_file_holds_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "SHAPES", {"gpt": TINY_LINES["gpt"]})
    monkeypatch.setattr(train, "matrix_peaks", lambda device, seconds: {"fp32": 1e11, "bf16": 1e10})
    benchmark.main(
        [
            "--suite",
            "train",
            "--rounds",
            "1",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "results.json"),
        ]
    )
    out, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert results["machine"] and results["train"]["peaks"] == {"fp32": 1e11, "bf16": 1e10}
    assert (
        "gpt: 2 layers, 64 wide, 4 heads, feed-forward 256, vocabulary 512, 4 sequences of 32 tokens"
        in out
    )
    for name, row in results["train"]["gpt"].items():
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert row["updates"] == 2 and row["agrees"] and len(row["losses"]) == 3
        for printed in (
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['mfu_full']:.1%}",
            f"{row['losses'][-1]:.4f}",
        ):
            assert printed in line.split()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("train,checkpoint", ["train", "checkpoint"]), ("all", list(benchmark.SUITES))],
)
def test_suites_are_named_with_commas(given, expected):
    assert benchmark.suites(given) == expected


def test_an_unknown_suite_is_refused_with_the_names_there_are():
    with pytest.raises(
        argparse.ArgumentTypeError, match="'trian' is no suite; choose from train, ops"
    ):
        benchmark.suites("train,trian")


def test_both_engines_generate_the_same_tokens(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(generation, "NEW", 8)
    config = Candidate("", peers.trivium, TINY_LINES["llama"]).config()
    engines, absent = generation.build_engines(config, CPU, torch.float32, with_peers=True)
    found = generation.compare(engines, torch.arange(12).view(2, 6), rounds=1)
    op_by_op = (
        ["Trivium, op by op"]
        if ops.select_ops("auto", CPU, torch.float32).implementations["block_step"] == "native"
        else []
    )
    assert not absent and list(found) == ["Trivium", *op_by_op, "transformers"]
    assert all(row["same_tokens"] and row["tokens_per_second"] > 0 for row in found.values())


def test_scaling_tells_the_ratio_and_what_memory_is_too_little_for(monkeypatch, capsys):
    options = argparse.Namespace(rounds=1, steps=1, peers=True)
    found = scaling.compare("sizes", {"tiny": scaling.shaped((1, 64, 4, 512), 2, 16)}, options)[
        "tiny"
    ]
    # one layer of 12 x 64^2, two norms and the last of 2 x 64, 512 words and 16 positions of 64
    assert found["parameters"] == 12 * 64**2 + 6 * 64 + (512 + 16) * 64
    for shape, peer in (("gpt", "PyTorch"), ("llama", "transformers")):
        pair = found[shape]
        assert pair["Trivium"]["deviation"] == 0
        if "left_out" not in pair[peer]:
            assert pair[peer]["deviation"] < 1e-5
            assert (
                pair["trivium_is_faster"]
                == pair["Trivium"]["tokens_per_second"] / pair[peer]["tokens_per_second"]
            )
    monkeypatch.setattr(scaling, "missing_memory", lambda parameters, engines: 2e9)
    assert (
        scaling.compare("sizes", {"tiny": scaling.shaped((1, 64, 4, 512), 2, 16)}, options)["tiny"][
            "left_out"
        ]
        == "2.0 GB of memory too little"
    )
    assert "tiny" in capsys.readouterr().out
