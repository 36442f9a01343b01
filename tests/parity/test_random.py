"""Layouts that nobody thought of, for the nightly run."""

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


@st.composite
def cases(draw) -> Case:
    tp, pp, cp, dp = (draw(SIZES) for _ in range(4))
    assume(tp * pp * cp * dp <= 8)
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]))
    chunks = 2 if schedule in ("interleaved", "zb-v") else 1
    words = [
        f"{TP} {tp} {PP} {pp} {CP} {cp} {SCHEDULE} {schedule} {CHUNKS} {chunks}",
        draw(st.sampled_from(["", SP])),
    ]
    if pp * chunks > 1:
        words.append(f"{LAYOUT} {SPLITS[pp * chunks]}")
    words.append(f"--cp-comm-type {draw(st.sampled_from(['p2p', 'allgather', 'a2a']))}")
    words.append(
        draw(
            st.sampled_from(
                ["", ZERO1, f"{STRATEGY} optim_grads", f"{STRATEGY} optim_grads_params"]
            )
        )
    )
    words.append(draw(st.sampled_from(["", f"{INSTANCES} 2"])))
    words.append(draw(st.sampled_from(["", "--overlap-grad-reduce"])))
    words.append(draw(st.sampled_from(["", "--overlap-param-gather"])))
    words.append(draw(st.sampled_from(["", "--ddp-bucket-size 2000"])))
    words.append(
        draw(
            st.sampled_from(
                ["", "--recompute-granularity full", "--recompute-granularity selective"]
            )
        )
    )
    case = Case(tp * pp * cp * dp, " ".join(words), draw(st.sampled_from(["deep", "documents"])))
    arguments = f"{RUN} {MODELS[case.model]} --num-layers 7 --mock-data {case.flags}"
    assume(not validate(resolve(flags.parse(arguments.split()).config, case.ranks), case.ranks))
    return case


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_random_layout_matches_one_process(case, run, reference):
    found = differences(
        run(case, f"--num-layers 7 {SGD}"), reference(case.model, f"--num-layers 7 {SGD}")
    )
    assert max(found.values()) <= 1, max(found, key=found.get)
