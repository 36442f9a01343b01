"""A checkpoint that an earlier version wrote still resumes; how it was made: fixtures/README.md."""

from pathlib import Path

import pytest
from runs import TP, rows_of, train

FIXTURE = Path(__file__).parent / "fixtures" / "at_49a2c5b"
CONFIG = FIXTURE / "save" / "iter_0000008" / "config.yaml"
COUNTS = ("iteration", "consumed_samples", "consumed_tokens", "learning_rate", "skipped")
# Another processor, or a tensor cut in two, adds the same fp32 numbers in another order. Sums of
# up to 256 tokens x 96 logits = 2^15 terms then differ by sqrt(2^15) * 2^-24 = 1e-5 of their size,
# mostly by less. 12 updates add such differences to the weights: sqrt(12) * 1e-5 = 4e-5.
TOLERANCE = 1e-4


@pytest.mark.parametrize("ranks, layout", [(1, ""), (2, f"{TP} 2")], ids=["one process", "tp 2"])
def test_resumes_with_its_own_configuration(ranks, layout, tmp_path):
    """Its config.yaml is read as --config; what it names by path, and its end, are given anew."""
    metrics = tmp_path / "metrics.jsonl"
    places = f"--load {FIXTURE / 'save'} --save {tmp_path / 'save'} --metrics-jsonl {metrics}"
    data = f"--data-path {FIXTURE / 'data'} --data-cache-path {tmp_path / 'cache'}"
    train(f"--config {CONFIG} {places} {data} --exit-interval 100 {layout}", ranks)
    for split in (None, "valid"):
        found = rows_of(metrics, split)
        expected = rows_of(FIXTURE / "rows.jsonl", split)
        compare(found, expected)


def compare(found: list[dict], expected: list[dict]) -> None:
    assert [row["iteration"] for row in found] == [row["iteration"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name in COUNTS:
            assert row.get(name) == wanted.get(name), (name, row)
        for name in ("lm_loss", "grad_norm"):
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=TOLERANCE), (name, row)


def test_the_fixture_names_no_place_of_its_machine():
    """It was made with relative paths, so that it can be resumed anywhere."""
    for path in FIXTURE.rglob("*"):
        if path.is_file():
            assert b"/tmp/" not in path.read_bytes(), path
