"""The parallel suite counts bytes as hand-worked sums do, and its layouts compute the same."""

import pytest
import torch

from benchmarks.candidate import parse_config
from benchmarks.layouts import Job, Measurement, run_layout, summary
from benchmarks.parallel import LAYOUTS, ZERO, estimated_memory, without_overlap
from trivium import launch, ops
from trivium.train.build import build_trainer

SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4"
    " --attention-dropout 0 --hidden-dropout 0 --seq-length 16"
    " --micro-batch-size 1 --global-batch-size 4 --train-iters 100 --lr 1e-3"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 95 --make-vocab-size-divisible-by 8"
)
ACTIVATION = 16 * 32 * 4  # bytes of the hidden states of a micro-batch
AGREED = 4 * 8  # loss, count, wish and norm in float64
# The tied weight's gradient [96, 32] goes between the two ends of a pipeline.
TIED = 96 * 32 * 4


def gradient_bytes() -> int:
    """Return the bytes of all gradients of SMALL."""
    config = parse_config(SMALL)
    mesh = launch.plan_mesh(config, launch.Process())
    trainer = build_trainer(config, mesh, torch.device("cpu"), ops.Ops(), 96, 95)
    return sum(bucket.size * 4 for bucket in trainer.optimizer.buckets)


def job(processes: int, given: str) -> Job:
    """Return a run of SMALL with these flags."""
    return Job(processes, f"{SMALL} {given}", 1)


@pytest.fixture(scope="module")
def one() -> Measurement:
    """Return what one process measures."""
    return run_layout(job(1, ""))


def data_parallel(gradients: int) -> dict[str, int]:
    return {"all-reduce": gradients + AGREED}


def zero1(gradients: int) -> dict[str, int]:
    half = gradients // 2
    return {"reduce-scatter": half, "all-gather": half, "all-reduce": AGREED}


def pipeline(gradients: int) -> dict[str, int]:
    # Rank 0 sends 4 micro-batches on.
    return {"send": 4 * ACTIVATION, "all-reduce": TIED + AGREED}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", data_parallel),
        (ZERO, zero1),
        ("--pipeline-model-parallel-size 2", pipeline),
    ],
    ids=["dp2", "zero1", "pp2"],
)
def test_bytes_sent_are_those_worked_out_by_hand(given, expected, one):
    found = run_layout(job(2, given))
    assert found.sent == expected(gradient_bytes())
    assert found.loss == pytest.approx(one.loss, rel=1e-5)
    assert len(found.seconds) == 1 and found.seconds[0] > 0


def test_one_process_sends_nothing(one):
    assert one.sent == {}


def test_a_layout_that_fails_is_an_error_with_its_flags():
    with pytest.raises(ValueError, match="a process of 1 failed under the flags --no-such-flag"):
        run_layout(Job(1, "--no-such-flag", 1))


def test_estimated_memory_is_the_layouts():
    """A parameter takes 4 bytes of weights, 4 of gradient and 8 of moments.

    The weights are the fp32 masters too; two shards have half of the moments each.
    """
    plain = estimated_memory(job(1, ""))
    zero = estimated_memory(job(2, ZERO))
    assert plain - zero == gradient_bytes() // 4 * 8 // 2
    assert estimated_memory(job(1, "--recompute-granularity full")) < plain


def test_summary_is_the_median_with_its_quartiles():
    runs = [
        Measurement([1.0, 2.0, 9.0, 3.0], {"send": 5}, 7, 0.5),
        Measurement([2.0, 2.0, 2.0, 3.0], {"send": 5}, 8, 0.5),
    ]
    assert summary(runs) == {
        "milliseconds": 2000.0,
        "spread": 0.25,
        "sent": {"send": 5},
        "memory": 8,
        "loss": 0.5,
    }


def test_every_overlapped_layout_has_the_same_one_without_overlap():
    overlapped = [name for name in LAYOUTS if without_overlap(name) != name]
    assert len(overlapped) == 3
    assert all(without_overlap(name) in LAYOUTS for name in overlapped)
