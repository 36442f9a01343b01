"""Any layout is one process: losses, norms, evaluation, every gradient, every update."""

import pytest
import torch
from runs import CP, PP, SCHEDULE, SP, STRATEGY, TP, ZERO1

from parity.cases import CASES, OVERLAP, TWO, V2, Case
from parity.harness import MODELS, SGD, differences

CORE = [case if case.core else pytest.param(case, marks=pytest.mark.parity) for case in CASES]


def worst(differences: dict[str, float]) -> str:
    name = max(differences, key=differences.get)
    return f"{name}: {differences[name]:.3g} times its tolerance"


@pytest.mark.parametrize("case", CORE, ids=str)
def test_layout_matches_one_process(case, run, reference, record_property):
    """Under AdamW with a large epsilon for 20 updates and SGD for 3: Adam alone divides a gradient by itself, SGD alone has no second moment."""
    largest: dict[str, float] = {}
    for extra in ("", SGD):
        found = differences(run(case, extra), reference(case.model, extra))
        assert max(found.values()) <= 1, worst(found)
        for name, value in found.items():
            kind = name.split(" of ")[0]
            largest[kind] = max(largest.get(kind, 0.0), float(value))
    record_property(str(case), largest)  # in units of the tolerance


@pytest.mark.parametrize("model", MODELS)
def test_reference_learns(model, reference):
    """What is compared is a run that clips, masks and learns, in which no part has a gradient that is all zero but for key biases."""
    found = reference(model)
    assert found.losses[-1] < 0.95 * found.losses[0]
    assert min(found.norms) > 0.3
    total, count = (
        sum(value(g) for g in found.gradients.values())
        for value in (lambda g: g.square().sum().item(), torch.Tensor.numel)
    )
    silent = [
        n for n, g in found.gradients.items() if g.square().sum() / g.numel() < 1e-6 * total / count
    ]
    assert all(name.endswith("attention.k.bias") for name in silent), silent


@pytest.mark.parametrize(
    "case",
    [Case(2, ZERO1), Case(4, f"{TP} 2 {SP} {ZERO1}"), Case(2, f"{STRATEGY} optim_grads")],
    ids=str,
)
def test_overlap_changes_no_bit(case, run):
    plain, overlapped = run(case, "--ddp-bucket-size 3000"), run(case, OVERLAP)
    assert (
        plain.losses == overlapped.losses
        and plain.norms == overlapped.norms
        and plain.valid == overlapped.valid
    )
    assert all(plain.updates[name].equal(overlapped.updates[name]) for name in plain.updates)


BF16_CASES = [
    Case(2, f"{TP} 2 {SP}"),
    Case(2, f"{CP} 2"),
    Case(2, f"{TWO} {SCHEDULE} zb-h1"),
    Case(4, f"{V2} {SCHEDULE} zb-v {ZERO1}"),
    Case(4, f"{TP} 2 {SP} {STRATEGY} optim_grads_params"),
]


@pytest.mark.parity
@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16_is_as_near_to_fp32_as_one_process_in_bf16(case, run, reference):
    """Rounding to 8 bits differs with every order of sums: no parity, but the distance from fp32 must not grow. Gradients of the whole model."""

    def error(found):
        return (
            sum(
                (found.gradients[name] - g).square().sum().item()
                for name, g in truth.gradients.items()
            )
            ** 0.5
        )

    truth = reference(case.model, SGD)
    assert error(run(case, f"{SGD} --bf16")) <= 1.5 * error(reference(case.model, f"{SGD} --bf16"))


def test_fp16_scale_is_agreed_by_all_ranks(run, reference):
    """From 2^40 the scale must come down on every rank at once, whichever stage overflows; then the losses are those of one process in fp16."""
    dynamic = "--fp16 --initial-loss-scale 1e12 --hysteresis 1"
    one, four = (
        reference("llama", dynamic),
        run(Case(4, f"{TP} 2 {PP} 2 --decoder-first-pipeline-num-layers 2"), dynamic),
    )
    assert four.losses == pytest.approx(one.losses, rel=5e-3)
    skipped = [a == b for a, b in zip(four.norms, one.norms, strict=True)]
    assert four.norms.count(None) == one.norms.count(None) > 0, skipped
