"""Any layout computes what one process does: losses, norms, evaluation, gradients, updates."""

import pytest
from runs import CP, PP, SCHEDULE, SP, STRATEGY, TP, ZERO1

from parity.cases import CASES, OVERLAP, TWO, V2, Case
from parity.harness import MODELS, SGD, Measured, differences

CORE = [case if case.core else pytest.param(case, marks=pytest.mark.parity) for case in CASES]


def worst(differences: dict[str, float]) -> str:
    """Return the part that differs most, and by how much."""
    name = max(differences, key=differences.get)
    return f"{name}: {differences[name]:.3g} times its tolerance"


@pytest.mark.parametrize("case", CORE, ids=str)
def test_layout_matches_one_process(case, run, reference, record_property):
    """Compare 20 updates of AdamW with a large epsilon, and 3 of SGD.

    Adam alone divides a gradient by itself; SGD alone has no second moment.
    """
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
    """The run that all are compared with clips, masks and learns.

    No part has a gradient that is all zero, except key biases.
    """
    found = reference(model)
    assert found.losses[-1] < 0.95 * found.losses[0]
    assert min(found.norms) > 0.3
    total = sum(g.square().sum().item() for g in found.gradients.values())
    count = sum(g.numel() for g in found.gradients.values())
    smallest = 1e-6 * total / count
    silent = []
    for name, g in found.gradients.items():
        if g.square().sum() / g.numel() < smallest:
            silent.append(name)
    assert all(name.endswith("attention.k.bias") for name in silent), silent


@pytest.mark.parametrize(
    "case",
    [Case(2, ZERO1), Case(4, f"{TP} 2 {SP} {ZERO1}"), Case(2, f"{STRATEGY} optim_grads")],
    ids=str,
)
def test_overlap_changes_no_bit(case, run):
    plain = run(case, "--ddp-bucket-size 3000")
    overlapped = run(case, OVERLAP)
    assert plain.losses == overlapped.losses
    assert plain.norms == overlapped.norms
    assert plain.valid == overlapped.valid
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
    """The distance from fp32 must not grow by more than half, over the gradients of the model.

    There is no parity: rounding to 8 bits differs with every order of sums.
    """

    def error(found: Measured) -> float:
        squares = 0.0
        for name, g in truth.gradients.items():
            squares += (found.gradients[name] - g).square().sum().item()
        return squares**0.5

    truth = reference(case.model, SGD)
    assert error(run(case, f"{SGD} --bf16")) <= 1.5 * error(reference(case.model, f"{SGD} --bf16"))


def test_fp16_scale_is_agreed_by_all_ranks(run, reference):
    """From 2^40 the scale must come down on every rank at once, whichever stage overflows.

    Then the losses are those of one process in fp16.
    """
    dynamic = "--fp16 --initial-loss-scale 1e12 --hysteresis 1"
    one = reference("llama", dynamic)
    four = run(Case(4, f"{TP} 2 {PP} 2 --decoder-first-pipeline-num-layers 2"), dynamic)
    assert four.losses == pytest.approx(one.losses, rel=5e-3)
    skipped = [a == b for a, b in zip(four.norms, one.norms, strict=True)]
    assert four.norms.count(None) == one.norms.count(None) > 0, skipped
