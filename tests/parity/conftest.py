"""The data of all parity runs, and the runs of one process that they are held against."""

from collections.abc import Callable

import pytest
from runs import write_data

from parity.cases import Case
from parity.harness import MODELS, RUN, Measured, measure


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("parity")
    write_data(place / "data")
    return place


@pytest.fixture(scope="session")
def run(folder) -> Callable[..., Measured]:
    """run(case, extra="", mutation=None): a run of a case, 20 updates of AdamW unless `extra` says otherwise."""

    def run_case(case: Case, extra: str = "", mutation: str | None = None) -> Measured:
        return measure(f"{RUN} {MODELS[case.model]} --data-path {folder / 'data'} {case.flags} {extra}", case.ranks, folder, mutation)

    return run_case


@pytest.fixture(scope="session")
def reference(run) -> Callable[..., Measured]:
    """reference(model, extra=""): one process, made once."""
    made: dict[tuple[str, str], Measured] = {}

    def reference_of(model: str, extra: str = "") -> Measured:
        if (model, extra) not in made:
            made[model, extra] = run(Case(1, "", model), extra)
        return made[model, extra]

    return reference_of
