"""A checkpoint written under one layout resumes under any other: weights, moments, loss scale and the place in the data."""

import shutil

import pytest
from ranks import run_ranks
from runs import CP, INSTANCES, SCHEDULE, SP, STRATEGY, TP, ZERO1, exact, rows_of

from parity.cases import CASES, OVERLAP, TWO, V2, Case
from parity.harness import MODELS, RUN, spied_run
from trivium.mesh import Mesh

ONE = Case(1, "")
PAIRS = [
    (ONE, Case(2, f"{TP} 2 {SP}")),
    (Case(4, f"{TP} 4"), Case(2, f"{V2} {SCHEDULE} zb-v")),
    (Case(4, f"{TP} 2 {SP} {TWO} {SCHEDULE} zb-h1"), Case(4, f"{ZERO1} {OVERLAP}")),
    (Case(4, f"{ZERO1} {INSTANCES} 2"), Case(4, f"{TP} 2 {SP} {STRATEGY} optim_grads_params")),
    (Case(2, f"{STRATEGY} optim_grads_params"), Case(4, f"{CP} 2 {STRATEGY} optim_grads --ddp-bucket-size 3000")),
    (Case(2, f"{V2} {SCHEDULE} zb-v {ZERO1}"), ONE),
]


def pretrain(case: Case, folder, arguments: str) -> None:
    arguments = f"{RUN} {MODELS[case.model]} --data-path {folder / 'data'} {case.arguments} {arguments}"
    if case.ranks == 1:
        spied_run(Mesh.plan(1, 0), arguments, None)
    else:
        run_ranks(case.ranks, spied_run, arguments, None, timeout=120)


CORE = [*PAIRS[:2], *(pytest.param(*pair, marks=pytest.mark.parity) for pair in PAIRS[2:])]


@pytest.mark.parametrize(("first", "second"), CORE, ids=str)
def test_resume_under_another_layout_goes_on_as_one_process(first, second, folder, tmp_path, reference):
    """10 updates under one, 10 under the other: all 20 losses are those of one process that never stopped, within 1e-5."""
    save = f"--save {tmp_path} --load {tmp_path}"
    pretrain(first, folder, f"{save} --exit-interval 10")
    pretrain(second, folder, save)
    rows, expected = rows_of(tmp_path / "metrics.jsonl"), reference(first.model)
    assert [row["lm_loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected.norms, rel=1e-5)


EXACT = [Case(4, f"{CP} 2 {ZERO1} {OVERLAP}"), pytest.param(Case(4, f"{TP} 2 {SP} {V2} {SCHEDULE} zb-v"), marks=pytest.mark.parity)]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_resume_under_the_same_layout_repeats_every_bit(case, folder, tmp_path):
    """Also across two runs: with --deterministic-mode nothing depends on which rank is first."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pretrain(case, folder, f"--deterministic-mode --save {whole}")
    pretrain(case, folder, f"--deterministic-mode --save {halves} --load {halves} --exit-interval 10")
    pretrain(case, folder, f"--deterministic-mode --save {halves} --load {halves}")
    assert exact(rows_of(whole / "metrics.jsonl")) == exact(rows_of(halves / "metrics.jsonl"))


@pytest.mark.parity
@pytest.mark.parametrize("case", [case for case in CASES if case.model == "llama" and case.ranks > 1], ids=str)
def test_every_layout_writes_what_one_process_reads(case, folder, tmp_path, reference):
    save = f"--save {tmp_path} --load {tmp_path} --eval-iters 0"
    pretrain(case, folder, f"{save} --exit-interval 4")
    pretrain(ONE, folder, f"{save} --exit-interval 4")
    losses = [row["lm_loss"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert losses == pytest.approx(reference("llama").losses[:8], rel=1e-5)
    shutil.rmtree(tmp_path)
