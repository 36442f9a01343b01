"""The data of all parity runs, and the runs of one process that they are held against."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import write_data

from parity.cases import CASES, Case
from parity.harness import MODELS, RUN, Measured, measure
from trivium.ops import cpu


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("parity")
    write_data(place / "data")
    return place


@pytest.fixture(scope="session")
def run(folder) -> Callable[..., Measured]:
    """run(case, extra="", mutation=None): a run of a case, 20 updates of AdamW unless `extra` says otherwise, on the native kernels."""

    def run_case(
        case: Case, extra: str = "", mutation: str | None = None, *, kernels: str = "native"
    ) -> Measured:
        chosen = kernels if cpu.AVAILABLE and "--fp16" not in extra else "torch"
        arguments = f"{RUN} {MODELS[case.model]} --kernels {chosen} --data-path {folder / 'data'} {case.arguments} {extra}"
        return measure(arguments, case.ranks, folder, mutation)

    return run_case


@pytest.fixture(scope="session")
def reference(run) -> Callable[..., Measured]:
    """reference(model, extra=""): one process on plain PyTorch, made once."""
    made: dict[tuple[str, str], Measured] = {}

    def reference_of(model: str, extra: str = "") -> Measured:
        if (model, extra) not in made:
            made[model, extra] = run(Case(1, "", model), extra, kernels="torch")
        return made[model, extra]

    return reference_of


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """PARITY_TABLE=file: what test_layout_matches_one_process recorded of each case, as a table in the order of the cases."""
    if not (path := os.environ.get("PARITY_TABLE")):
        return
    found = {
        name: worst
        for report in terminalreporter.getreports("passed")
        for name, worst in report.user_properties
    }
    lines = [
        "| model | processes | layout | loss | grad norm | gradients | updates |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        if (worst := found.get(str(case))) is not None:
            flags = case.flags.replace("|", "\\|") or "(data parallel)"
            numbers = (
                worst["losses"] * 1e-5,
                worst["norms"] * 1e-5,
                worst["gradient"] * 1e-5,
                worst["update"] * 1e-4,
            )
            lines.append(
                f"| {case.model} | {case.ranks} | `{flags}` | "
                + " | ".join(f"{number:.1e}" for number in numbers)
                + " |"
            )
    Path(path).write_text("\n".join(lines) + "\n")
