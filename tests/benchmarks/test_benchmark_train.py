"""The train suite compares engines that do the same work, and says so where one does not."""

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import peers, train, train_table
from benchmarks.candidate import Candidate, Failure, Memory, Result, Update, parse_config
from benchmarks.models import BF16, GPT, LLAMA
from benchmarks.peer_megatron import megatron
from benchmarks.peer_plain import PlainGPT, plain, plain_weights
from benchmarks.side_by_side import Limits

TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32"
    " --max-position-embeddings 32 --vocab-size 511"
    " --micro-batch-size 4 --global-batch-size 4 --lr 1e-3"
)
TINY_FLAGS = {"gpt": f"{GPT} {TINY}", "llama": f"{LLAMA} {TINY} --ffn-hidden-size 176"}
BUILDERS = {
    "PyTorch": plain,
    "megatron-core": megatron,
    "transformers": peers.transformers_llama,
}
NEEDS = {"megatron-core": "megatron.core", "transformers": "transformers"}
CPU = torch.device("cpu")
PEAKS = {"fp32": 1e11, "bf16": 1e10}


def a_layer_short(config, weights, device):
    """Build an engine that would win: it leaves the last layer out."""
    model = PlainGPT(config)
    model.load_state_dict(plain_weights(config, peers.read_weights(weights)))
    model.blocks = nn.ModuleList(list(model.blocks)[:-1])
    return peers.training_step(config, model, device, model)


@pytest.fixture
def no_groups_left() -> Iterator[None]:
    """Destroy megatron-core's process groups, which it keeps for good."""
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
    """fp32: 64-term sums in another order, 5e-7 of each.

    Four AdamW updates of 1e-3 move the loss by 1, so 1e-5 of it is ample.
    """
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    arguments = f"{TINY_FLAGS[shape]} {BF16 if precision == 'bf16' else ''}"
    config = parse_config(arguments)
    weights = tmp_path / "weights.pt"
    peers.write_weights(config, weights)
    ours = peers.trivium(config, weights, CPU)
    theirs = BUILDERS[name](config, weights, CPU)
    losses = [(ours(), theirs()) for _ in range(4)]
    assert losses[0][0] - losses[-1][0] > 0.3
    tolerance = 1e-5 if precision == "fp32" else train_table.TOLERANCE["bf16"]
    for mine, other in losses:
        assert other == pytest.approx(mine, rel=tolerance)


def test_who_computes_less_is_flagged_and_who_is_not_there_is_named(capsys):
    arguments = TINY_FLAGS["gpt"]
    candidates = [
        Candidate("PyTorch fp32", plain, arguments),
        Candidate("Trivium fp32", peers.trivium, arguments),
        Candidate("a layer short", a_layer_short, arguments),
        Candidate("absent", plain, arguments, needs="no_such_engine"),
    ]
    results = train.measure(candidates, Limits(rounds=2, probe=False))
    assert [len(found.timed) for found in results.values()] == [2, 2, 2, 0]
    rows = train_table.rows_of(results, {"slow": "for a reason"}, PEAKS)
    assert rows["PyTorch fp32"]["agrees"]
    assert rows["Trivium fp32"]["agrees"]
    assert not rows["a layer short"]["agrees"]
    assert "no_such_engine" in rows["absent"]["left_out"]
    assert rows["slow"] == {"left_out": "for a reason"}
    assert rows["Trivium fp32"]["trivium_is_faster"] == 1
    assert all(rows[name]["own_memory"] > 0 for name in ("PyTorch fp32", "Trivium fp32"))
    train_table.report("gpt", candidates[0].config(), rows)
    out = capsys.readouterr().out
    (flagged,) = [line for line in out.splitlines() if "DISAGREES" in line]
    assert flagged.startswith("a layer short") and "a layer short beyond 0.0001 in fp32" in out
    assert "no_such_engine" in out and "left out: for a reason" in out


def test_a_candidate_too_slow_for_the_batch_gets_fewer_sequences_and_the_losses_of_those(
    monkeypatch, capsys
):
    monkeypatch.setattr("benchmarks.side_by_side.BUDGET", 1e-9)
    candidates = [
        Candidate("PyTorch fp32", plain, TINY_FLAGS["gpt"]),
        Candidate("Trivium fp32", peers.trivium, TINY_FLAGS["gpt"]),
    ]
    results = train.measure(candidates, Limits(rounds=3))
    rows = train_table.rows_of(results, {}, PEAKS)
    for row in rows.values():
        assert row["batch"] == row["updates"] == 1 and row["agrees"]
        assert row["tokens_per_second"] == pytest.approx(32 / row["milliseconds"] * 1e3)
    train_table.report("gpt", candidates[0].config(), rows)
    assert "fewer sequences an update" in capsys.readouterr().out


def test_utilization_is_that_worked_out_by_hand():
    """N: 2 layers of 12 x 64^2 and a head of 512 x 64 make 131,072.

    Attention adds 12 x 2 x 64 x 32 a token, its causal half 24,576.
    """
    config = parse_config(TINY_FLAGS["gpt"])
    full = train_table.utilization(config, 1000, 1e9, causal=False)
    causal = train_table.utilization(config, 1000, 1e9, causal=True)
    assert full == pytest.approx((6 * 131_072 + 49_152) / 1e6)
    assert causal == pytest.approx((6 * 131_072 + 24_576) / 1e6)


def test_a_row_is_made_of_medians_and_the_peak_of_its_precision():
    config = parse_config(TINY_FLAGS["gpt"])
    timed = [Update(2.0, 5, 6.0), Update(1.0, 9, 5.5), Update(4.0, 7, 5.0)]
    first = Update(9.0, 99, 6.5)
    result = Result(config, 4, first, timed, Memory(30, 20), "x", [6.5, 6.0, 5.5, 4.0])
    row = train_table.row_of(result, {"fp32": 1e9, "bf16": 2e9})
    expected = {
        "milliseconds": 2000,
        "tokens_per_second": 64,
        "page_faults": 7,
        "spread": 0.75,
        "memory": 30,
        "own_memory": 20,
        "deviation": 0.25,
        "agrees": False,
    }
    assert {key: row[key] for key in expected} == expected
    assert row["mfu_full"] == pytest.approx(64 * 835_584 / 1e9)
    in_bf16 = replace(result, config=parse_config(f"{TINY_FLAGS['gpt']} --bf16"))
    half = train_table.row_of(in_bf16, {"fp32": 2e9, "bf16": 1e9})
    assert half["mfu_full"] == pytest.approx(row["mfu_full"] / 2)


def test_a_loss_that_is_no_number_deviates_and_a_failure_is_all_there_is():
    config = parse_config(TINY_FLAGS["gpt"])
    result = Result(config, 4, Update(1, 1, math.nan), [], None, "x", [1.0])
    assert math.isnan(result.deviation)
    failed = Result(config, failure=Failure("why"))
    assert train_table.row_of(failed, {}) == {"left_out": "why"}
