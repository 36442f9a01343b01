"""Random layouts compute what one process does; for the nightly run."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from runs import CHUNKS, CP, INSTANCES, PP, SCHEDULE, SP, STRATEGY, TP, ZERO1

from parity.cases import LAYOUT, Case
from parity.harness import MODELS, RUN, SGD, differences
from trivium.config import flags, resolve
from trivium.config.validate import validate

SIZES = st.sampled_from([1, 1, 2, 2, 4])
SPLITS = {  # of 7 layers, by number of stages
    1: "EtttttttL",
    2: "Ettt|ttttL",
    4: "Ett|tt|tt|tL",
    8: "Et|t|t|t|t|t|t|L",
}


SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]
SHARDING = ["", ZERO1, f"{STRATEGY} optim_grads", f"{STRATEGY} optim_grads_params"]
RECOMPUTE = ["", "--recompute-granularity full", "--recompute-granularity selective"]


@st.composite
def cases(draw) -> Case:
    """Draw a layout that the configuration allows, on at most 8 processes."""

    def one_of(*choices: str) -> str:
        return draw(st.sampled_from(choices))

    tp = draw(SIZES)
    pp = draw(SIZES)
    cp = draw(SIZES)
    ranks = tp * pp * cp * draw(SIZES)
    assume(ranks <= 8)
    schedule = one_of(*SCHEDULES)
    chunks = 2 if schedule in ("interleaved", "zb-v") else 1
    words = [
        f"{TP} {tp} {PP} {pp} {CP} {cp} {SCHEDULE} {schedule} {CHUNKS} {chunks}",
        one_of("", SP),
        f"{LAYOUT} {SPLITS[pp * chunks]}" if pp * chunks > 1 else "",
        f"--cp-comm-type {one_of('p2p', 'allgather', 'a2a')}",
        one_of(*SHARDING),
        one_of("", f"{INSTANCES} 2"),
        one_of("", "--overlap-grad-reduce"),
        one_of("", "--overlap-param-gather"),
        one_of("", "--ddp-bucket-size 2000"),
        one_of(*RECOMPUTE),
    ]
    case = Case(ranks, " ".join(words), one_of("deep", "documents"))
    arguments = f"{RUN} {MODELS[case.model]} --num-layers 7 --mock-data {case.flags}"
    config = resolve(flags.parse(arguments.split()).config, case.ranks)
    assume(not validate(config, case.ranks))
    return case


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_random_layout_matches_one_process(case, run, reference):
    extra = f"--num-layers 7 {SGD}"
    found = differences(run(case, extra), reference(case.model, extra))
    assert max(found.values()) <= 1, max(found, key=found.get)
