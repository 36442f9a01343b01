"""Make the data of all parity runs, and the runs of one process that they are compared with."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import write_data

from parity.cases import CASES, Case
from parity.harness import MODELS, RUN, Measured, measure
from trivium.ops import cpu

HEADER = """\
| model | processes | layout | loss | grad norm | gradients | updates |
|---|---|---|---|---|---|---|
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the data."""
    folder = tmp_path_factory.mktemp("parity")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def run(folder) -> Callable[..., Measured]:
    """Return run(case, extra="", mutation=None): measure a case on the native kernels.

    20 updates of AdamW, unless `extra` says otherwise.
    """

    def run_case(
        case: Case, extra: str = "", mutation: str | None = None, *, kernels: str = "native"
    ) -> Measured:
        chosen = kernels if cpu.AVAILABLE and "--fp16" not in extra else "torch"
        model = f"{RUN} {MODELS[case.model]} --kernels {chosen}"
        data = f"--data-path {folder / 'data'}"
        return measure(f"{model} {data} {case.arguments} {extra}", case.ranks, folder, mutation)

    return run_case


@pytest.fixture(scope="session")
def reference(run) -> Callable[..., Measured]:
    """Return reference(model, extra=""): measure one process on plain PyTorch, once."""
    made: dict[tuple[str, str], Measured] = {}

    def reference_of(model: str, extra: str = "") -> Measured:
        if (model, extra) not in made:
            made[model, extra] = run(Case(1, "", model), extra, kernels="torch")
        return made[model, extra]

    return reference_of


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write what test_layout_matches_one_process recorded into the file that PARITY_TABLE names."""
    path = os.environ.get("PARITY_TABLE")
    if not path:
        return
    worst_by_case: dict[str, dict[str, float]] = {}
    for report in terminalreporter.getreports("passed"):
        worst_by_case.update(report.user_properties)
    lines = [row(case, worst_by_case[str(case)]) for case in CASES if str(case) in worst_by_case]
    Path(path).write_text(HEADER + "\n".join(lines) + "\n")


def row(case: Case, worst: dict[str, float]) -> str:
    """Return the table's row of a case; `worst` is in units of the tolerances."""
    numbers = [
        worst["losses"] * 1e-5,
        worst["norms"] * 1e-5,
        worst["gradient"] * 1e-5,
        worst["update"] * 1e-4,
    ]
    cells = [case.model, str(case.ranks), case.short, *(f"{number:.1e}" for number in numbers)]
    return f"| {' | '.join(cells)} |"
