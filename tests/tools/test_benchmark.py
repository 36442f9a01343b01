"""The benchmark measures what it says: bytes by hand-worked sums, layouts that compute the same."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import _bench_checkpoint as checkpoints
import _bench_parallel as bench

from trivium import flags, launch, ops
from trivium.config import resolve
from trivium.train.build import build_trainer

SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --attention-dropout 0 --hidden-dropout 0 --seq-length 16 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 100 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 95 --make-vocab-size-divisible-by 8"
)
ACTIVATION = 16 * 32 * 4  # bytes of the hidden states of a micro-batch
AGREED = 4 * 8  # loss, count, wish and norm in float64


def gradient_bytes() -> int:
    config = resolve(flags.parse(SMALL.split()).config, 1)
    place = launch.Place()
    trainer = build_trainer(config, launch.plan_mesh(config, place), torch.device("cpu"), ops.Ops(), 96, 95)
    return sum(bucket.size * 4 for bucket in trainer.optimizer.buckets)


@pytest.fixture(scope="module")
def one():
    return bench.run_layout(1, SMALL, 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", lambda gradients: {"all-reduce": gradients + AGREED}),
        ("--use-distributed-optimizer", lambda gradients: {"reduce-scatter": gradients // 2, "all-gather": gradients // 2, "all-reduce": AGREED}),
        # rank 0 sends 4 micro-batches on; the tied weight's gradient [96, 32] goes between the two ends
        ("--pipeline-model-parallel-size 2", lambda gradients: {"send": 4 * ACTIVATION, "all-reduce": 96 * 32 * 4 + AGREED}),
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
    plain, zero = bench.estimated_memory(1, SMALL), bench.estimated_memory(2, f"{SMALL} {bench.ZERO}")
    assert plain - zero == gradient_bytes() // 4 * 8 // 2
    assert bench.estimated_memory(1, f"{SMALL} --recompute-granularity full") < plain


def test_summary_is_the_median_with_its_quartiles():
    runs = [bench.Measurement([1.0, 2.0, 9.0, 3.0], {"send": 5}, 7, 0.5), bench.Measurement([2.0, 2.0, 2.0, 3.0], {"send": 5}, 8, 0.5)]
    assert bench.summary(runs) == {"milliseconds": 2000.0, "spread": 0.25, "sent": {"send": 5}, "memory": 8, "loss": 0.5}


def test_every_candidate_of_the_checkpoint_suite_saves_and_loads_the_same_state(tmp_path, monkeypatch):
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
