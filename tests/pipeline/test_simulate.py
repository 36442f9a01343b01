"""The proof has teeth: any plan with one action too few, too many, or out of its place is refused;
times and memory are as worked by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest

from trivium.pipeline.actions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Message,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)
from trivium.pipeline.plan import Costs, Plan, make_plan
from trivium.pipeline.simulate import PlanError, simulate

PLANS = [
    make_plan("gpipe", 2, 2),
    make_plan("1f1b", 3, 4),
    make_plan("interleaved", 3, 3, 2),
    make_plan("zb-h1", 3, 4),
    make_plan("zb-v", 3, 5, 2),
]
every_plan = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.schedule)


def with_rank(plan, rank, actions):
    return replace(plan, actions=(*plan.actions[:rank], tuple(actions), *plan.actions[rank + 1 :]))


def places(plan):
    return [
        (rank, index) for rank, actions in enumerate(plan.actions) for index in range(len(actions))
    ]


# Refused.


@every_plan
def test_a_plan_without_any_one_of_its_actions_is_refused(plan):
    for rank, index in places(plan):
        actions = plan.actions[rank]
        with pytest.raises(PlanError, match=f"rank {rank}"):
            simulate(with_rank(plan, rank, actions[:index] + actions[index + 1 :]))


@every_plan
def test_a_plan_with_any_action_twice_is_refused(plan):
    for rank, index in places(plan):
        actions = plan.actions[rank]
        with pytest.raises(PlanError, match=f"rank {rank}: .* does again what is done"):
            simulate(with_rank(plan, rank, actions[: index + 1] + actions[index:]))


@every_plan
def test_two_messages_of_a_pair_swapped_at_one_end_are_refused(plan):
    """With tags they might still meet; an unbuffered queue hangs, or delivers the wrong one."""
    refusals = []
    for rank, actions in enumerate(plan.actions):
        for peer in range(plan.num_ranks):
            queue = [
                index
                for index, action in enumerate(actions)
                if isinstance(action, Message) and action.peer == peer
            ]
            for earlier, later in pairwise(queue):
                changed = list(actions)
                changed[earlier], changed[later] = actions[later], actions[earlier]
                with pytest.raises(PlanError) as refused:
                    simulate(with_rank(plan, rank, changed))
                refusals.append(str(refused.value))
    assert sum(refusal.startswith("deadlock") for refusal in refusals) >= 2


def test_messages_of_different_pairs_may_change_places():
    """The proof refuses what hangs and no more: on rank 1 the queues with ranks 0 and 2 do not know
    of each other."""
    plan = make_plan("1f1b", 3, 4)
    for index, (one, other) in enumerate(pairwise(plan.actions[1])):
        if isinstance(one, Message) and isinstance(other, Message) and one.peer != other.peer:
            actions = list(plan.actions[1])
            actions[index : index + 2] = other, one
            assert simulate(with_rank(plan, 1, actions)).makespan == simulate(plan).makespan
            return
    pytest.fail("no such messages")


@every_plan
def test_an_action_ahead_of_what_it_needs_is_refused(plan):
    """Any receive behind its user, any send ahead of its producer, B ahead of F, W ahead of B: each
    action moved to the front, if it needs any."""
    needy = (Backward, BackwardInput, BackwardWeight, SendActivation, SendGradient)
    for rank, index in places(plan):
        actions = plan.actions[rank]
        if isinstance(actions[index], needy):
            with pytest.raises(PlanError, match=f"rank {rank}: .* comes before .*, which it needs"):
                simulate(
                    with_rank(plan, rank, (actions[index], *actions[:index], *actions[index + 1 :]))
                )
        if isinstance(actions[index], ReceiveActivation | ReceiveGradient):
            with pytest.raises(PlanError, match=f"rank {rank}: .* comes before Receive"):
                simulate(
                    with_rank(plan, rank, (*actions[:index], *actions[index + 1 :], actions[index]))
                )


def test_the_chunks_of_one_rank_need_each_other_without_messages():
    """At the turn of zb-v the second chunk's forward needs the first one's, and no receive says
    so."""
    plan = make_plan("zb-v", 1, 1, 2)
    forward, second, *rest = plan.actions[0]
    with pytest.raises(
        PlanError,
        match=r"rank 0: Forward\(chunk=1, microbatch=0\) comes before "
        r"Forward\(chunk=0, microbatch=0\)",
    ):
        simulate(with_rank(plan, 0, (second, forward, *rest)))


@pytest.mark.parametrize(
    "wrong",
    [
        SendActivation(0, 0, 2),
        SendActivation(0, 4, 1),
        SendActivation(1, 0, 1),
        SendActivation(0, -1, 1),
        SendGradient(0, 0, 1),
    ],
    ids=["peer", "micro-batch", "chunk", "negative", "first stage"],
)
def test_a_message_that_nobody_expects_is_refused(wrong):
    plan = make_plan("1f1b", 3, 4)
    assert plan.actions[0][1] == SendActivation(0, 0, 1)
    with pytest.raises(
        PlanError, match=r"rank 0: Send.* (goes to the wrong rank|is no part of this plan)"
    ):
        simulate(with_rank(plan, 0, (plan.actions[0][0], wrong, *plan.actions[0][2:])))


def test_backwards_in_a_plan_of_forwards_are_refused():
    with pytest.raises(PlanError, match=r"Backward.* is no part of this plan"):
        simulate(replace(make_plan("1f1b", 1, 2), forward_only=True))


def test_a_plan_for_fewer_ranks_is_refused():
    plan = make_plan("1f1b", 3, 4)
    with pytest.raises(PlanError, match="2 lists of actions for 3 ranks"):
        simulate(replace(plan, actions=plan.actions[:2]))


def test_a_whole_backward_and_its_halves_are_one_or_the_other():
    plan = make_plan("1f1b", 1, 1)
    assert (
        simulate(
            with_rank(plan, 0, (Forward(0, 0), BackwardInput(0, 0), BackwardWeight(0, 0)))
        ).makespan
        == 3
    )
    with pytest.raises(PlanError, match="does again"):
        simulate(with_rank(plan, 0, (Forward(0, 0), Backward(0, 0), BackwardWeight(0, 0))))


# Deadlocks of plans in which every rank's list is in order by itself.


def test_1f1b_with_sends_first_deadlocks():
    """The classic: in the steady state rank 0 puts its next activation first, rank 1 its gradient.

    Blocking sends wait for each other.
    """
    first = (
        *(Forward(0, 0), SendActivation(0, 0, 1), Forward(0, 1), SendActivation(0, 1, 1)),
        *(ReceiveGradient(0, 0, 1), Backward(0, 0), ReceiveGradient(0, 1, 1), Backward(0, 1)),
    )
    second = (
        *(ReceiveActivation(0, 0, 0), Forward(0, 0), Backward(0, 0), SendGradient(0, 0, 0)),
        *(ReceiveActivation(0, 1, 0), Forward(0, 1), Backward(0, 1), SendGradient(0, 1, 0)),
    )
    plan = Plan("1f1b", 2, 1, 2, False, (first, second))
    with pytest.raises(
        PlanError, match=r"deadlock: .* has Send.* first in its queue with rank ., which has Send"
    ):
        simulate(plan)
    receive_ahead = (*second[:2], second[4], *second[2:4], *second[5:])
    assert simulate(replace(plan, actions=(first, receive_ahead))).makespan > 0


def test_ranks_in_a_ring_that_wait_for_each_other_deadlock():
    """Every queue is in one order at both ends, and yet: rank 0 waits for rank 2, which waits for
    micro-batch 1 of rank 1, and that for rank 0."""
    ranks = (
        (
            *(
                Forward(0, 0),
                SendActivation(0, 0, 1),
                ReceiveActivation(1, 1, 2),
                ReceiveActivation(1, 0, 2),
                Forward(1, 0),
            ),
            *(
                SendActivation(1, 0, 1),
                Forward(0, 1),
                SendActivation(0, 1, 1),
                Forward(1, 1),
                SendActivation(1, 1, 1),
            ),
        ),
        (
            *(
                ReceiveActivation(0, 0, 0),
                Forward(0, 0),
                SendActivation(0, 0, 2),
                ReceiveActivation(1, 0, 0),
                ReceiveActivation(0, 1, 0),
            ),
            *(Forward(0, 1), SendActivation(0, 1, 2), Forward(1, 0), SendActivation(1, 0, 2)),
            *(ReceiveActivation(1, 1, 0), Forward(1, 1), SendActivation(1, 1, 2)),
        ),
        (
            *(
                ReceiveActivation(0, 0, 1),
                ReceiveActivation(0, 1, 1),
                Forward(0, 1),
                SendActivation(0, 1, 0),
                Forward(0, 0),
                SendActivation(0, 0, 0),
            ),
            *(ReceiveActivation(1, 0, 1), Forward(1, 0), ReceiveActivation(1, 1, 1), Forward(1, 1)),
        ),
    )
    words = (
        r"deadlock: ranks wait for each other, rank 0 at Forward\(chunk=1, .*, "
        r"rank 1 at Forward\(chunk=0, .*, rank 2 at Forward\(chunk=0, "
    )
    with pytest.raises(PlanError, match=words):
        simulate(Plan("interleaved", 3, 2, 2, True, ranks))


# Times and memory.


def test_times_of_1f1b_by_hand():
    """F = 2, B = W = 1, messages of 0.5: rank 1 starts half a unit late, and its gradients take
    half a unit back."""
    costs = Costs(2, 1, 1, transfer=0.5)
    timeline = simulate(make_plan("1f1b", 2, 2, costs=costs), costs)
    first, second = timeline.spans
    assert first == (
        (Forward(0, 0), 0, 2),
        (Forward(0, 1), 2, 4),
        (Backward(0, 0), 7, 9),
        (Backward(0, 1), 11, 13),
    )
    assert second == (
        (Forward(0, 0), 2.5, 4.5),
        (Backward(0, 0), 4.5, 6.5),
        (Forward(0, 1), 6.5, 8.5),
        (Backward(0, 1), 8.5, 10.5),
    )
    assert timeline.busy == (8, 8) and timeline.bubbles == (5, 0) and timeline.makespan == 13
    assert (
        timeline.bubble == 5
        and timeline.peak_activations == (2, 1)
        and timeline.activations_vs_1f1b == 1
    )


def test_messages_of_a_pair_pass_one_after_another():
    """Three activations made at 1, 2, 3 over a link that takes 5 each arrive at 6, 11, 16."""
    costs = Costs(transfer=5)
    _, second = simulate(make_plan("gpipe", 2, 3, costs=costs, forward_only=True), costs).spans
    assert [start for _, start, _ in second] == [6, 11, 16]


def test_a_message_waits_for_its_receive():
    """Sent at 1 but posted at 3, behind rank 1's only other work: it passes at 3."""
    costs = Costs(transfer=0.5)
    plan = make_plan("gpipe", 2, 2, forward_only=True)
    assert plan.actions[1][:3] == (
        ReceiveActivation(0, 0, 0),
        ReceiveActivation(0, 1, 0),
        Forward(0, 0),
    )
    assert [start for _, start, _ in simulate(plan, costs).spans[1]] == [1.5, 2.5]
    lazy = with_rank(
        plan,
        1,
        (ReceiveActivation(0, 0, 0), Forward(0, 0), ReceiveActivation(0, 1, 0), Forward(0, 1)),
    )
    assert [start for _, start, _ in simulate(lazy, costs).spans[1]] == [1.5, 3]


def test_a_chunk_is_its_share_of_a_rank_in_time_and_memory():
    """One rank, two chunks, one micro-batch: 0.5 each for F, B and W; both chunks are held
    together."""
    timeline = simulate(make_plan("zb-v", 1, 1, 2))
    assert timeline.makespan == 3 and timeline.peak_activations == (1,)
    assert [(start, end) for _, start, end in timeline.spans[0]] == [
        (at / 2, at / 2 + 0.5) for at in range(6)
    ]


def test_a_message_between_chunks_takes_as_long_as_one_between_ranks():
    """Four chunks of half a unit and three messages of a quarter."""
    costs = Costs(transfer=0.25)
    first, second = simulate(
        make_plan("interleaved", 2, 1, 2, costs, forward_only=True), costs
    ).spans
    assert [(start, end) for _, start, end in first] == [(0, 0.5), (1.5, 2)]
    assert [(start, end) for _, start, end in second] == [(0.75, 1.25), (2.25, 2.75)]


def test_stages_that_take_longer():
    timeline = simulate(make_plan("1f1b", 2, 2), Costs(stages=(1, 3)))
    assert timeline.busy == (6, 18)


def test_an_activation_is_held_until_its_weight_gradient():
    plan = make_plan("gpipe", 1, 2)
    inputs_first = [
        Forward(0, 0),
        BackwardInput(0, 0),
        Forward(0, 1),
        BackwardInput(0, 1),
        BackwardWeight(0, 0),
        BackwardWeight(0, 1),
    ]
    assert simulate(with_rank(plan, 0, inputs_first)).peak_activations == (2,)
    in_turn = [
        Forward(0, 0),
        BackwardInput(0, 0),
        BackwardWeight(0, 0),
        Forward(0, 1),
        BackwardInput(0, 1),
        BackwardWeight(0, 1),
    ]
    assert simulate(with_rank(plan, 0, in_turn)).peak_activations == (1,)
