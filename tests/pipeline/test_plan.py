"""Every schedule, proven complete and free of deadlock, against the formulas for its bubble and its
memory."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.pipeline.actions import (
    Backward,
    BackwardWeight,
    Forward,
    Message,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)
from trivium.pipeline.placement import Placement
from trivium.pipeline.plan import Costs, make_plan
from trivium.pipeline.simulate import simulate

KINDS = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("interleaved", 4),
    ("zb-h1", 1),
    ("zb-v", 2),
]
SIZES = [(p, m) for p in range(1, 9) for m in range(1, 33)]
SAMPLE = [
    (p, m)
    for p in (1, 2, 3, 5)
    for m in sorted({1, 2, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1} - {0})
]
UNEVEN = [Costs(2, 3, 1), Costs(3, 2, 3), Costs(1, 2, 3)]
EXACT = (
    1e-9  # whole-number costs are summed exactly; only the division by the number of chunks rounds
)

every_kind = pytest.mark.parametrize(("schedule", "v"), KINDS)


class Outcome(NamedTuple):
    bubble: float
    makespan: float
    peaks: tuple[float, ...]  # micro-batches that each rank holds


@cache
def run(schedule, p, m, v, costs=Costs()):  # noqa: B008
    timeline = simulate(make_plan(schedule, p, m, v, costs), costs)
    return Outcome(timeline.bubble, timeline.makespan, timeline.peak_activations)


@every_kind
def test_every_size_completes_without_deadlock(schedule, v):
    """simulate raises where a plan is incomplete, out of order or hangs; no rank can do its work in
    less time than that takes."""
    for p, m in SIZES:
        outcome = run(schedule, p, m, v)
        assert outcome.makespan >= 3 * m and outcome.bubble >= 0, (p, m)


@every_kind
def test_forwards_alone_take_the_least_time(schedule, v):
    """p - 1 chunks more than a rank's work; p - 1 whole ranks more for zb-v, whose last chunk
    climbs back to rank 0 alone."""
    for p, m in SAMPLE:
        plan = make_plan(schedule, p, m, v, forward_only=True)
        makespan = simulate(plan).makespan
        assert {type(action) for rank in plan.actions for action in rank} <= {
            Forward,
            SendActivation,
            ReceiveActivation,
        }
        if schedule == "zb-v":
            assert makespan == m + p - 1, (p, m)
        elif m >= p:
            assert abs(makespan - (m + (p - 1) / v)) < EXACT, (p, m)


# Bubbles.


def expected_bubble(schedule, p, m, v, costs):
    """The table's formulas, for one rank's F, B and W of a micro-batch."""
    f, b, w = costs.forward, costs.backward_input, costs.backward_weight
    if schedule in ("gpipe", "1f1b"):
        return (p - 1) * (f + b + w)
    if schedule == "interleaved":
        return ((p - 1) + (v - 1) * max(0, p - m)) * (f + b + w) / v
    return (p - 1) * (f + b - w) if schedule == "zb-h1" else 0.0


def formula_holds(schedule, p, m, costs):
    if schedule == "zb-h1":
        return (
            m >= p and costs.backward_weight <= costs.forward
        )  # a longer W cannot fill more than there is to wait
    if schedule == "zb-v":
        return m >= 2 * p - 1 and costs.forward == costs.backward_input == costs.backward_weight
    return True


@every_kind
def test_bubble_is_the_formulas(schedule, v):
    """And never less where the formula does not hold.

    Interleaved reaches it also where p does not divide m.
    """
    held = 0
    for costs, sizes in [(Costs(), SIZES), *((costs, SAMPLE) for costs in UNEVEN)]:
        for p, m in sizes:
            bubble, expected = (
                run(schedule, p, m, v, costs).bubble,
                expected_bubble(schedule, p, m, v, costs),
            )
            assert bubble > expected - EXACT, (p, m, costs)
            if formula_holds(schedule, p, m, costs):
                held += 1
                assert bubble < expected + EXACT, (p, m, costs)
    assert held >= 100


def test_zb_h1_with_long_weight_gradients_waits_only_for_the_first_gradient():
    """With W > F no bubble is left in the drain, but rank 0, full with p forwards, has to wait for
    (p - 1) B."""
    for p, m in SAMPLE:
        for costs in (Costs(1, 2, 3), Costs(3, 2, 3)):
            if m >= p:
                assert run("zb-h1", p, m, 1, costs).bubble == (p - 1) * costs.backward_input, (
                    p,
                    m,
                    costs,
                )


def test_zb_v_is_done_p_minus_1_chunks_after_its_work():
    for p, m in SIZES:
        if m >= 2 * p - 1:
            assert run("zb-v", p, m, 2).makespan == 3 * m + (p - 1) / 2, (p, m)


def test_zb_v_fills_the_gaps_that_few_micro_batches_leave():
    """4 ranks, 4 micro-batches of 28 units.

    The paper's places for the weight gradients would leave 33 and end at 145.
    """
    outcome = run("zb-v", 4, 4, 2, Costs(10, 11, 7))
    assert (outcome.bubble, outcome.makespan) == (17.5, 129.5)


def test_the_later_schedules_are_the_shorter_ones():
    """What they are for, at 4 ranks and 8 micro-batches of 3 units each: 24 units of work."""
    makespans = [
        run(schedule, 4, 8, v).makespan
        for schedule, v in (("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2))
    ]
    assert makespans == [33, 28.5, 27, 25.5]


# Memory.


def test_gpipe_holds_every_micro_batch():
    for p, m in SIZES:
        assert run("gpipe", p, m, 1).peaks == (m,) * p


def test_1f1b_holds_as_many_as_there_are_ranks_behind():
    for p, m in SIZES:
        assert run("1f1b", p, m, 1).peaks == tuple(min(p - rank, m) for rank in range(p))


@pytest.mark.parametrize("v", [2, 3, 4])
def test_interleaved_holds_a_little_more_than_1f1b(v):
    """1 + (p-1)/(pv) of 1F1B's where groups are of p; elsewhere by the larger group, and never more
    than all there is."""
    for p, m in SIZES:
        peak = max(run("interleaved", p, m, v).peaks)
        group = -(-m // max(1, m // p))
        assert abs(peak - min(m, ((v - 1) * group + 2 * p - 1) / v)) < EXACT, (p, m)
        if m % p == 0 and m >= 2 * p:
            assert abs(peak / p - (1 + (p - 1) / (p * v))) < EXACT, (p, m)


@pytest.mark.parametrize(("schedule", "v"), [("zb-h1", 1), ("zb-v", 2)])
def test_zero_bubble_schedules_hold_no_more_than_1f1b(schedule, v):
    """Whatever the costs, hence wherever the weight gradients went."""
    for costs, sizes in [(Costs(), SIZES), *((costs, SAMPLE) for costs in UNEVEN)]:
        for p, m in sizes:
            assert max(run(schedule, p, m, v, costs).peaks) <= min(p, m), (p, m, costs)


# Placement and messages.


@every_kind
def test_one_rank_works_by_itself(schedule, v):
    """All stages on one rank: no messages, no bubble."""
    for m in (1, 2, 5):
        plan = make_plan(schedule, 1, m, v)
        assert not [action for action in plan.actions[0] if isinstance(action, Message)]
        assert run(schedule, 1, m, v).bubble == 0


def test_1f1b_on_one_rank_alternates():
    assert make_plan("1f1b", 1, 3).actions == (
        (
            Forward(0, 0),
            Backward(0, 0),
            Forward(0, 1),
            Backward(0, 1),
            Forward(0, 2),
            Backward(0, 2),
        ),
    )


@every_kind
def test_place_is_the_inverse_of_stage(schedule, v):
    for p in range(1, 9):
        placement = Placement(schedule, p, v)
        places = [(rank, chunk) for rank in range(p) for chunk in range(v)]
        assert sorted(placement.stage(*place) for place in places) == list(
            range(placement.num_stages)
        )
        assert all(placement.rank_and_chunk(placement.stage(*place)) == place for place in places)


def test_stages_go_round_the_ranks_or_down_and_up_again():
    assert [Placement("interleaved", 3, 2).rank_and_chunk(stage)[0] for stage in range(6)] == [
        0,
        1,
        2,
        0,
        1,
        2,
    ]
    assert [Placement("zb-v", 3, 2).rank_and_chunk(stage) for stage in range(6)] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, 1),
        (1, 1),
        (0, 1),
    ]


def test_two_ranks_1f1b_by_hand():
    """Receives stand one action ahead of their use, but behind what goes out before them: gradient
    1 and activation 2 are made at one time."""
    first, second = make_plan("1f1b", 2, 3).actions
    assert first == (
        Forward(0, 0),
        SendActivation(0, 0, 1),
        Forward(0, 1),
        SendActivation(0, 1, 1),
        ReceiveGradient(0, 0, 1),
        Backward(0, 0),
        ReceiveGradient(0, 1, 1),
        Forward(0, 2),
        SendActivation(0, 2, 1),
        ReceiveGradient(0, 2, 1),
        Backward(0, 1),
        Backward(0, 2),
    )
    assert second == (
        ReceiveActivation(0, 0, 0),
        Forward(0, 0),
        ReceiveActivation(0, 1, 0),
        Backward(0, 0),
        SendGradient(0, 0, 0),
        Forward(0, 1),
        Backward(0, 1),
        SendGradient(0, 1, 0),
        ReceiveActivation(0, 2, 0),
        Forward(0, 2),
        Backward(0, 2),
        SendGradient(0, 2, 0),
    )


def in_order_of_queue(plan):
    """(rank, peer) -> the messages with that peer as (stage they go to, micro-batch), in order."""
    queues = defaultdict(list)
    for rank, actions in enumerate(plan.actions):
        for action in actions:
            if isinstance(action, Message):
                stage = plan.stage(rank, action.chunk) + {SendActivation: 1, SendGradient: -1}.get(
                    type(action), 0
                )
                queues[rank, action.peer].append(
                    (
                        isinstance(action, SendActivation | ReceiveActivation),
                        stage,
                        action.microbatch,
                    )
                )
    return queues


@every_kind
def test_both_ends_of_a_pair_list_its_messages_in_one_order(schedule, v):
    for p, m in SAMPLE:
        queues = in_order_of_queue(make_plan(schedule, p, m, v))
        assert all(queue == queues[peer, rank] for (rank, peer), queue in queues.items()), (p, m)


@every_kind
def test_receives_are_posted_a_compute_action_ahead(schedule, v):
    """Unless the action before makes a message that comes first in the same queue: then directly
    behind that."""
    for p, m in SAMPLE:
        for actions in make_plan(schedule, p, m, v).actions:
            computes = [
                index for index, action in enumerate(actions) if not isinstance(action, Message)
            ]
            for before, index in pairwise(computes):
                between, user = actions[before + 1 : index], actions[index]
                receive = ReceiveActivation if isinstance(user, Forward) else ReceiveGradient
                sent_to = [
                    action.peer
                    for action in between
                    if isinstance(action, SendActivation | SendGradient)
                ]
                for action in between:
                    if isinstance(action, receive) and (action.chunk, action.microbatch) == (
                        user.chunk,
                        user.microbatch,
                    ):
                        assert action.peer in sent_to, (p, m, user)


# What cannot be planned, and what it takes to plan.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("2f2b", 4, 8),
            "no pipeline schedule '2f2b'; there are gpipe, 1f1b, interleaved, zb-h1, zb-v",
        ),
        (("1f1b", 4, 8, 2), "1f1b has 1 chunk a rank, not 2; use interleaved"),
        (("zb-v", 4, 8, 1), "zb-v has 2 chunks a rank, not 1"),
        (("zb-v", 4, 8, 3), "zb-v has 2 chunks a rank, not 3"),
        (("interleaved", 4, 8, 1), "interleaved has at least 2 chunks a rank, not 1; use 1f1b"),
        (("gpipe", 0, 8), "at least 1 of its ranks, not 0"),
        (("gpipe", 4, 0), "at least 1 of its micro-batches, not 0"),
        (("interleaved", 4, 8, 0), "at least 1 of its chunks, not 0"),
        (("1f1b", 4, 8, 1, Costs(0, 1, 1)), "times above 0"),
        (("1f1b", 4, 8, 1, Costs(transfer=-1)), "transfers of 0 or more"),
        (("1f1b", 4, 8, 1, Costs(stages=(1, 1, 0, 1))), "times above 0"),
        (("1f1b", 4, 8, 1, Costs(float("inf"), 1, 1)), "all finite"),
        (("1f1b", 4, 8, 1, Costs(1, float("nan"), 1)), "all finite"),
        (("1f1b", 4, 8, 1, Costs(stages=(1, 1))), "2 stages for 4 ranks x 1 chunks = 4 stages"),
    ],
)
def test_impossible_input_is_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_plan(*arguments)


def test_planning_needs_no_torch():
    """Plans of thousands of ranks are studied where no torch is."""
    code = (
        "import sys; import trivium.pipeline.plan, trivium.pipeline.simulate, "
        "trivium.pipeline.split; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_rank_makes_the_same_plan():
    """They plan each for itself and must agree without a word, also where the hash of a string
    differs from process to process."""
    code = "from trivium.pipeline.plan import Costs, make_plan\n"
    code += "print(make_plan('zb-v', 4, 9, 2, Costs(1.1, 0.7, 0.9, transfer=0.03)))"
    plans = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(plans) == 1 and len(plans.pop()) > 1000


numbers = st.floats(0.05, 3.0)


@st.composite
def cases(draw):
    schedule, v = draw(st.sampled_from(KINDS))
    p, m = draw(st.integers(1, 6)), draw(st.integers(1, 16))
    stages = draw(st.one_of(st.just(()), st.tuples(*[numbers] * (p * v))))
    return (
        schedule,
        p,
        m,
        v,
        Costs(
            draw(numbers),
            draw(numbers),
            draw(numbers),
            draw(st.sampled_from([0.0, 0.01, 0.5])),
            stages,
        ),
    )


def makespan_without_queues(plan, costs):
    """When the last action ends if every message goes off as soon as it is made, whatever else is
    under way."""
    ends, clock, at = {}, [0.0] * plan.num_ranks, [0] * plan.num_ranks
    actions = [
        [action for action in rank if not isinstance(action, Message)] for rank in plan.actions
    ]
    while any(position < len(rank) for position, rank in zip(at, actions, strict=True)):
        for rank in range(plan.num_ranks):
            while at[rank] < len(actions[rank]):
                action = actions[rank][at[rank]]
                stage, forward = plan.stage(rank, action.chunk), isinstance(action, Forward)
                source = stage - 1 if forward else stage + 1
                hop = (
                    0.0
                    if not 0 <= source < plan.num_stages or plan.rank_and_chunk(source)[0] == rank
                    else costs.transfer * plan.num_chunks
                )
                waits = not isinstance(action, BackwardWeight) and 0 <= source < plan.num_stages
                if waits and (forward, source, action.microbatch) not in ends:
                    break
                clock[rank] = max(
                    clock[rank], ends[forward, source, action.microbatch] + hop if waits else 0.0
                ) + costs.of(type(action), stage)
                if not isinstance(action, BackwardWeight):
                    ends[forward, stage, action.microbatch] = clock[rank]
                at[rank] += 1
    return max(clock) / plan.num_chunks


@settings(max_examples=60, deadline=None)
@given(cases())
def test_queues_cost_no_time_when_messages_take_none(case):
    """A message listed behind one that is made later would wait for it."""
    schedule, p, m, v, costs = case
    costs = replace(costs, transfer=0.0)
    plan = make_plan(schedule, p, m, v, costs)
    assert simulate(plan, costs).makespan == pytest.approx(makespan_without_queues(plan, costs))


@pytest.mark.parametrize(
    ("schedule", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)]
)
def test_queues_cost_no_time_when_the_transfer_was_planned_for(schedule, v):
    """Known how long messages take, they are listed in the order in which they will be made."""
    costs = Costs(transfer=0.2)
    plan = make_plan(schedule, 4, 16, v, costs)
    assert simulate(plan, costs).makespan == pytest.approx(makespan_without_queues(plan, costs))


def test_a_transfer_is_planned_for_at_its_full_length():
    """With two chunks of half a unit each it is two forwards long.

    Planned for as one, it would end the step at 18.5.
    """
    costs = Costs(1, 2, 1, transfer=1)
    assert simulate(make_plan("interleaved", 2, 2, 2, costs), costs).makespan == 17


@settings(max_examples=60, deadline=None)
@given(cases(), numbers, st.booleans())
def test_any_plan_completes_at_any_speed(case, factor, forward_only):
    """A plan stays free of deadlock when the real times are not those it was made from: uneven,
    slower, with slow messages."""
    schedule, p, m, v, costs = case
    plan = make_plan(schedule, p, m, v, costs, forward_only=forward_only)
    work = [
        sum(costs.stages[plan.stage(rank, chunk)] if costs.stages else 1.0 for chunk in range(v))
        / v
        for rank in range(p)
    ]
    once = costs.forward + (0.0 if forward_only else costs.backward_input + costs.backward_weight)
    timeline = simulate(plan, costs)
    assert timeline.busy == pytest.approx([m * share * once for share in work])
    for other in (Costs(), Costs(factor, 1.0, 1.0, transfer=factor), Costs(0.01, 1.0, 0.01)):
        assert simulate(plan, other).makespan > 0
    if schedule in ("zb-h1", "zb-v") and not forward_only:
        assert max(timeline.peak_activations) <= min(p, m)
