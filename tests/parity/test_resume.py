"""A checkpoint written under one layout resumes under any other.

Weights, moments, loss scale and the place in the data go on as in one process.
"""

import random
import shutil
from pathlib import Path

import pytest
from runs import CP, SCHEDULE, SP, TP, ZERO1, exact, rows_of

from parity.cases import CASES, OVERLAP, V2, Case
from parity.harness import MODELS, RUN, spied_run
from trivium.mesh import Mesh
from trivium.testing import run_ranks

ONE = Case(1, "")
UPDATES = 3  # under each of the two layouts


def pretrain(case: Case, folder: Path, arguments: str) -> None:
    """Run pretrain_gpt.py under a layout."""
    model = f"{RUN} {MODELS[case.model]} --data-path {folder / 'data'}"
    arguments = f"{model} {case.arguments} {arguments}"
    if case.ranks == 1:
        spied_run(Mesh.plan(1, 0), arguments, None)
    else:
        run_ranks(case.ranks, spied_run, arguments, None, timeout=120)


def pairs(count: int, seed: int, layouts: list[Case]) -> list:
    """Draw pairs of layouts of one model; every other checkpoint is saved in the background."""
    chance = random.Random(seed)
    drawn: list = []
    while len(drawn) < count:
        first, second = chance.sample(layouts, 2)
        if first.model == second.model:
            way = "--async-save" if len(drawn) % 2 else ""
            name = f"{first}-to-{second}{'-async' if way else ''}"
            drawn.append(pytest.param(first, second, way, id=name))
    return drawn


def goes_on(first: Case, second: Case, way: str, folder, save_dir, reference) -> None:
    """Do 3 updates under one layout and 3 under another.

    All 6 losses and norms are those of one process that never stopped, within 1e-5.
    """
    save = f"--save {save_dir} --load {save_dir} --eval-iters 0 {way}"
    pretrain(first, folder, f"{save} --exit-interval {UPDATES}")
    pretrain(second, folder, f"{save} --exit-interval {2 * UPDATES}")
    rows = rows_of(save_dir / "metrics.jsonl")
    expected = reference(first.model)
    losses = [row["lm_loss"] for row in rows]
    norms = [row["grad_norm"] for row in rows]
    assert [row["iteration"] for row in rows] == list(range(1, 2 * UPDATES + 1))
    assert losses == pytest.approx(expected.losses[: len(rows)], rel=1e-5)
    assert norms == pytest.approx(expected.norms[: len(rows)], rel=1e-5)


SMALL_LLAMAS = [case for case in [ONE, *CASES] if case.model == "llama" and case.ranks <= 4]


@pytest.mark.parametrize(
    ("first", "second", "way"),
    pairs(10, 1, SMALL_LLAMAS),
)
def test_resume_under_another_layout_goes_on_as_one_process(
    first, second, way, folder, tmp_path, reference
):
    goes_on(first, second, way, folder, tmp_path, reference)


@pytest.mark.soak
@pytest.mark.parametrize(("first", "second", "way"), pairs(200, 2, [ONE, *CASES]))
def test_resume_under_any_other_layout_goes_on_as_one_process(
    first, second, way, folder, tmp_path, reference
):
    goes_on(first, second, way, folder, tmp_path, reference)
    shutil.rmtree(tmp_path)


EXACT = [
    Case(4, f"{CP} 2 {ZERO1} {OVERLAP}"),
    pytest.param(Case(4, f"{TP} 2 {SP} {V2} {SCHEDULE} zb-v"), marks=pytest.mark.parity),
]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_resume_under_the_same_layout_repeats_every_bit(case, folder, tmp_path):
    """Also across two runs: with --deterministic-mode nothing depends on which rank is first."""
    whole = tmp_path / "whole"
    halves = tmp_path / "halves"
    exactly = "--deterministic-mode"
    pretrain(case, folder, f"{exactly} --save {whole} --exit-interval {2 * UPDATES}")
    for last in (UPDATES, 2 * UPDATES):
        pretrain(case, folder, f"{exactly} --save {halves} --load {halves} --exit-interval {last}")
    assert exact(rows_of(whole / "metrics.jsonl")) == exact(rows_of(halves / "metrics.jsonl"))


@pytest.mark.parity
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.model == "llama" and case.ranks > 1], ids=str
)
def test_every_layout_writes_what_one_process_reads(case, folder, tmp_path, reference):
    save = f"--save {tmp_path} --load {tmp_path} --eval-iters 0"
    pretrain(case, folder, f"{save} --exit-interval 4")
    pretrain(ONE, folder, f"{save} --exit-interval 4")
    losses = [row["lm_loss"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert losses == pytest.approx(reference("llama").losses[:8], rel=1e-5)
    shutil.rmtree(tmp_path)
