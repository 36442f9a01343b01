"""The parity table can fail: each way of breaking the engine turns it red."""

import pytest

from parity.harness import SGD, differences
from parity.mutations import MUTATIONS, mutated


@pytest.mark.parity
@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_engine_is_noticed(name, run, reference):
    case = MUTATIONS[name].case
    mutated(MUTATIONS[name])  # a mutation that no longer fits the source is no proof
    expected = reference(case.model, SGD)
    try:
        found = run(case, SGD, name)
    except Exception as error:
        assert not isinstance(error, SyntaxError | NameError), error
        return
    worst = max(differences(found, expected).values())
    assert worst > 2, f"{name}: {worst:.3g} times the tolerance"
