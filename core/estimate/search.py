"""Find the fastest layouts of a model that fit.

Thousands of layouts divide the devices (choices.py), so they are judged in two rounds:

1. Every choice is timed by closed formulas, and those that need too much memory are dropped. The
   bubble comes from `waiting`; memory is that of the first, second and last pipeline rank.
2. The best of each cut of model and pipeline are measured as any plan is: the engine's own plan,
   simulated, and every rank (run_plan.py).

The closed formulas agree with whole plans to 12% of the time and exactly in memory, except that
interleaved schedules are counted by whole turns (0.1%); tests/tools/test_plan_tool.py holds that.
"""

from collections.abc import Set
from dataclasses import replace
from functools import cache
from math import log
from typing import Any, NamedTuple

from ..config import Config, resolve
from ..config.validate import validate
from ..pipeline.plan import make_plan
from .activations import ActivationMemory, activations_of
from .choices import LayoutChoice, LayoutChoices, PassChoice, PipelineChoice
from .costs import (
    Hardware,
    PassTimes,
    chunk_times,
    context_bytes,
    data_bytes,
    exposed_data_seconds,
    tensor_bytes,
)
from .memory import StateMemory, state_of
from .occupancy import Occupancy, fullest, occupancies
from .parameters import ModelChunk
from .pass_spec import PassSpec
from .run_plan import RunPlan

FINALISTS = 8
STEPS_OF_TIME = 200  # scores tell times apart that differ by half a percent


class Score(NamedTuple):
    """The worth of a layout; the smaller one is better.

    time: steps of half a percent of an update's time. sent: bytes; of layouts that take the same
    time the one that sends less is better, since hidden communication is not free.
    """

    time: int
    sent: float


def score_of(seconds: float, sent: float) -> Score:
    """Score a layout by the seconds of an update and the bytes it sends."""
    return Score(round(STEPS_OF_TIME * log(seconds)), sent)


class RankWork(NamedTuple):
    """One micro-batch on one pipeline rank: its seconds, and the bytes it sends over tp and cp."""

    times: PassTimes
    sent: float


class DataParallel(NamedTuple):
    """Data parallelism of one rank in one update: seconds that nothing hides, and bytes sent."""

    seconds: float
    sent: float


class Search:
    """A search over everything that the command line leaves open.

    given: names of the fields that the command line gives.
    tried: how many layouts were timed.
    least: the bytes of the layout that needs least memory, for the message when none fits; None
        before one was looked at.
    """

    def __init__(
        self, config: Config, vocab_size: int, num_devices: int, hardware: Hardware, given: Set[str]
    ):
        self.config = config
        self.model = config.model
        self.vocab_size = vocab_size
        self.num_devices = num_devices
        self.hardware = hardware
        self.choices = LayoutChoices(config, num_devices, given)
        self.tried = 0
        self.least: int | None = None
        # Each of these is the same for many layouts, and computed once.
        self.spec = cache(self._spec)
        self.work = cache(self._work)
        self.states = cache(self._states)
        self.activations = cache(self._activations)
        self.occupancies = cache(self._occupancies)

    def best(self) -> list[RunPlan]:
        """Return the finalists that fit, best first; none if nothing fits."""
        fitting = []
        for choice in self._finalists():
            plan = self.layout(choice)
            if plan.fits and not validate(plan.config, self.num_devices):
                fitting.append(plan)
        return sorted(fitting, key=_measured_score)

    def layout(self, choice: LayoutChoice) -> RunPlan:
        """Make the plan of a choice, to be measured exactly."""
        config = resolve(choice.applied(self.config), self.num_devices)
        return RunPlan(config, self.vocab_size, self.num_devices, self.hardware)

    def _finalists(self) -> list[LayoutChoice]:
        """Return the best choices that fit, of each cut one, by the closed formulas."""
        found: dict[tuple[Any, ...], tuple[Score, LayoutChoice]] = {}
        for choice in self.choices:
            self.tried += 1
            score = self.score(choice)
            if choice.cut in found and score >= found[choice.cut][0]:
                continue
            # Memory is counted for those alone that are the best of their cut so far.
            need = self.need(choice)
            if self.least is None or need < self.least:
                self.least = need
            if need + self.hardware.reserve <= self.hardware.memory:
                found[choice.cut] = score, choice
        ranked = sorted(found.values(), key=lambda pair: pair[0])
        return [choice for _, choice in ranked[:FINALISTS]]

    # The worth of a choice, by closed formulas.

    def microbatches(self, choice: LayoutChoice) -> int:
        """Return how many micro-batches an update has."""
        samples = choice.micro.micro_batch * choice.dp
        return self.config.batch.global_batch_size // samples

    def score(self, choice: LayoutChoice) -> Score:
        """Score an update: what the slowest rank computes, the bubble, and data parallelism."""
        pipeline, m = choice.pipeline, self.microbatches(choice)
        work = self.work(choice.micro, pipeline)
        message = self.spec(choice.micro).hidden_bytes(self.model)
        transfer = message / self.hardware.link(self.num_devices)
        # Waiting is that of ranks that are alike, so the second one stands for all.
        middle = work[min(1, len(work) - 1)]
        makespan = m * max(rank.times.total for rank in work)
        makespan += waiting(pipeline, m, middle.times, transfer)

        waited = sent = 0.0
        states = self.states(choice.micro.tp, pipeline, choice.strategy)
        for rank, state in zip(work, states, strict=True):
            data = self._data_parallel(choice, state.parameters, rank.times)
            waited = max(waited, data.seconds)
            sent = max(sent, data.sent + m * rank.sent)
        return score_of(makespan + waited, sent)

    def _data_parallel(
        self, choice: LayoutChoice, parameters: int, times: PassTimes
    ) -> DataParallel:
        """Return the data parallelism of a rank with so many parameters."""
        strategy = choice.strategy
        copies = choice.copies
        m = self.microbatches(choice)
        itemsize = self.spec(choice.micro).itemsize
        sent = data_bytes(parameters, strategy, _shards(strategy, copies), copies, itemsize, m)
        link = self.hardware.link(choice.micro.tp * copies)
        seconds = exposed_data_seconds(sent, strategy, choice.overlaps, m, times, link)
        return DataParallel(seconds, sum(sent))

    def need(self, choice: LayoutChoice) -> int:
        """Return the bytes of the fullest of the first, second and last pipeline rank."""
        pipeline, m = choice.pipeline, self.microbatches(choice)
        spec = self.spec(choice.micro)
        ranks = pipeline.ranks(self.model.num_layers)
        states = self.states(choice.micro.tp, pipeline, choice.strategy)
        most = 0
        for (rank, chunks), state in zip(ranks.items(), states, strict=True):
            activations = [self.activations(chunk, spec) for chunk in chunks]
            held = self.held(pipeline, rank, m, activations)
            most = max(most, state.total + held)
        return most

    def held(
        self, pipeline: PipelineChoice, rank: int, m: int, activations: list[ActivationMemory]
    ) -> int:
        """Return the bytes of activations of a rank at its fullest, working memory included.

        1F1B and interleaved are fullest after all forwards of the warm-up and one more. For the
        others this is read off a plan.
        """
        p = pipeline.p
        working = max(chunk.working for chunk in activations)
        if pipeline.schedule == "1f1b":
            return min(m, p - rank) * activations[0].held + working
        if pipeline.schedule == "interleaved":
            return _held_interleaved(pipeline, rank, m, activations) + working
        # A rank is full before it has seen more than 2 p micro-batches.
        found = self.occupancies(pipeline.schedule, p, min(m, 2 * p), pipeline.v, rank)
        peak = fullest(found, activations)
        return peak.activations + peak.working

    # What many choices share. The methods without an underscore compute it once.

    def _spec(self, micro: PassChoice) -> PassSpec:
        return PassSpec.of(micro.applied(self.config))

    def _work(self, micro: PassChoice, pipeline: PipelineChoice) -> list[RankWork]:
        """Return the work of one micro-batch on each of three ranks."""
        spec = self.spec(micro)
        ranks = pipeline.ranks(self.model.num_layers)
        return [self._rank_work(chunks, spec, pipeline.schedule) for chunks in ranks.values()]

    def _rank_work(self, chunks: list[ModelChunk], spec: PassSpec, schedule: str) -> RankWork:
        model, hardware = self.model, self.hardware
        over_cp = sum(context_bytes(model, spec))
        times, sent = PassTimes(), 0.0
        for chunk in chunks:
            times += chunk_times(model, self.vocab_size, chunk, spec, schedule, hardware)
            over_tp = sum(tensor_bytes(model, chunk, spec))
            sent += over_tp + over_cp * chunk.layers
        return RankWork(times, sent)

    def _states(self, tp: int, pipeline: PipelineChoice, strategy: str) -> list[StateMemory]:
        """Return the state of each of three ranks."""
        parallel = replace(
            self.config.parallel,
            tensor_model_parallel_size=tp,
            data_parallel_sharding_strategy=strategy,
        )
        config = replace(self.config, parallel=parallel)
        copies = self.num_devices // (tp * pipeline.p)
        shards = _shards(strategy, copies)
        return [
            state_of(config, self.vocab_size, chunks, shards=shards, copies=copies)
            for chunks in pipeline.ranks(self.model.num_layers).values()
        ]

    def _activations(self, chunk: ModelChunk, spec: PassSpec) -> ActivationMemory:
        return activations_of(self.model, self.vocab_size, chunk, spec)

    def _occupancies(self, schedule: str, p: int, m: int, v: int, rank: int) -> list[Occupancy]:
        actions = make_plan(schedule, p, m, v).actions[rank]
        return occupancies(actions, v)


def _shards(strategy: str, copies: int) -> int:
    """Return how many of the ranks that hold the same parameters share the optimizer's state."""
    return 1 if strategy == "no_shard" else copies


def waiting(pipeline: PipelineChoice, m: int, rank: PassTimes, transfer: float) -> float:
    """Return the seconds of the bubble of ranks that are alike, and of transfers nothing hides.

    m: micro-batches. rank: times of one micro-batch on a rank. transfer: seconds of a message.
    F, B, W of a rank, p ranks of v chunks:

        schedule      bubble                                transfers
        1f1b          (p - 1) (F + B + W)                   2 (m + p - 1)
        interleaved   (p - 1) (F + B + W) / v, and more     2 ((v - 1) m + p - 1)
                      where m < p
        zb-h1         (p - 1) max(F + B - W, B)             2 (p - 1)
        zb-v          0 if F = B = W, and the p - 1 half    4 (p - 1)
                      steps in which the last rank starts
    """
    p, v = pipeline.p, pipeline.v
    if p == 1:
        return 0.0
    match pipeline.schedule:
        case "1f1b":
            return (p - 1) * rank.total + 2 * (m + p - 1) * transfer
        case "interleaved":
            # With fewer micro-batches than ranks, each turn of a chunk ends before it is due.
            idle = (p - 1) + (v - 1) * max(0, p - m)
            transfers = 2 * ((v - 1) * m + p - 1)
            return idle * rank.total / v + transfers * transfer
        case "zb-h1":
            idle_seconds = max(rank.total - 2 * rank.backward_weight, rank.backward_input)
            return (p - 1) * idle_seconds + 2 * (p - 1) * transfer
        case _:
            # The plan fits together without gaps only if its three steps are as long.
            times = rank.forward, rank.backward_input, rank.backward_weight
            uneven = max(times) - min(times)
            return (p - 1) * (uneven + rank.forward / 2) + 4 * (p - 1) * transfer


def _measured_score(plan: RunPlan) -> Score:
    sent = sum(plan.sent(0).values())
    return score_of(plan.step_seconds, sent)


def _held_interleaved(
    pipeline: PipelineChoice, rank: int, m: int, activations: list[ActivationMemory]
) -> int:
    """Return the bytes of the warm-up's forwards and one more.

    Chunks take turns, each for a group of micro-batches: as many as there are ranks, or a few more.
    """
    p, v = pipeline.p, pipeline.v
    rounds = max(1, m // p)
    group = -(-m // rounds)
    forwards = (v - 1) * group + 2 * (p - 1 - rank) + 1
    left = min(m * v, forwards)
    held = turn = 0
    while left > 0:
        held += min(left, group) * activations[turn % v].held
        left -= group
        turn += 1
    return held
