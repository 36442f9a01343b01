"""Find the fastest layouts of a model that fit.

Thousands of layouts divide the devices, so they are judged in two rounds:

1. Every choice of tensor, context and pipeline parallelism, schedule, micro-batch, recomputation and
   sharding is timed by closed formulas. The bubble comes from `waiting`; memory is that of the first,
   second and last pipeline rank, since the ranks between hold what the second does, and no longer.
2. The best of each cut of model and pipeline are measured as any plan is: the engine's own plan,
   simulated, and every rank (run_plan.py).

What the command line gives is kept, the rest is chosen.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from math import log
from typing import Any, NamedTuple

from ..config import SHARDING_STRATEGIES, Config, resolve
from ..config.validate import validate
from ..pipeline.plan import make_plan
from .activations import ActivationMemory, activations_of
from .costs import (
    Hardware,
    Overlaps,
    PassTimes,
    chunk_times,
    context_bytes,
    data_bytes,
    exposed_data_seconds,
    splits_backward,
    tensor_bytes,
)
from .memory import state_of
from .occupancy import Occupancy, fullest, occupancies
from .parameters import ModelChunk
from .pass_spec import PassSpec
from .run_plan import RunPlan

FINALISTS = 8
LARGEST_TP = 8
LARGEST_MICRO_BATCH = 8
MOST_CHUNKS = 8
LONGEST_ZERO_BUBBLE = 32  # stages; the memory of zero-bubble schedules is read off their plans


class Score(NamedTuple):
    """What a layout is worth. The smaller one is better.

    time: steps of half a percent of an update's time. sent: bytes; of layouts that take the same
    time the one that sends less is better, since hidden communication is not free.
    """

    time: int
    sent: float


def score_of(seconds: float, sent: float) -> Score:
    """Score a layout by the seconds of an update and the bytes it sends."""
    return Score(round(200 * log(seconds)), sent)


@dataclass(frozen=True)
class PipelineChoice:
    """A pipeline as the search sees it: p ranks of v chunks under a schedule.

    embedding, loss: whether the two count as a layer each when layers are shared out.
    """

    p: int
    schedule: str = "1f1b"
    v: int = 1
    embedding: bool = False
    loss: bool = False

    def ranks(self, num_layers: int) -> dict[int, list[ModelChunk]]:
        """Return the chunks of the first, the second and the last rank."""
        p, v = self.p, self.v
        if p == 1:
            return {0: [ModelChunk(num_layers)]}
        layers = (num_layers + self.embedding + self.loss) // (p * v)
        first = ModelChunk(layers - self.embedding, embeds=True, predicts=False)
        middle = ModelChunk(layers, embeds=False, predicts=False)
        last = ModelChunk(layers - self.loss, embeds=False, predicts=True)
        if self.schedule == "zb-v":
            return {0: [first, last], 1: [middle, middle], p - 1: [middle, middle]}
        between = [middle] * (v - 1)
        return {0: [first, *between], 1: [middle, *between], p - 1: [*between, last]}

    def divides(self, num_layers: int) -> bool:
        """Return whether the layers can be shared out evenly, each chunk with at least one."""
        counted = num_layers + self.embedding + self.loss
        chunks = self.p * self.v
        return counted % chunks == 0 and counted >= chunks


@dataclass(frozen=True)
class LayoutChoice:
    """A layout as the search sees it."""

    tp: int
    cp: int
    sequence_parallel: bool
    pipeline: PipelineChoice
    micro_batch: int
    strategy: str
    recompute: str | None

    @property
    def cut(self) -> tuple[Any, ...]:
        """Return how model and pipeline are cut: of each cut only the best layout is kept."""
        return self.tp, self.cp, self.sequence_parallel, self.pipeline

    @property
    def pass_key(self) -> tuple[Any, ...]:
        """Return everything that the pass of a micro-batch depends on."""
        return self.tp, self.cp, self.sequence_parallel, self.micro_batch, self.recompute

    @property
    def overlaps(self) -> Overlaps:
        """Return what data parallelism overlaps: whatever can be."""
        return Overlaps(
            gradients=self.strategy != "no_shard",
            weights=self.strategy in ("optim", "optim_grads"),
        )

    def copies(self, num_devices: int) -> int:
        """Return how many ranks hold the same parameters."""
        return num_devices // (self.tp * self.pipeline.p)

    def shards(self, num_devices: int) -> int:
        """Return how many ranks share the optimizer's state."""
        return 1 if self.strategy == "no_shard" else self.copies(num_devices)

    def applied(self, config: Config) -> Config:
        """Return the configuration with this layout's flags."""
        pipeline = self.pipeline
        chunks = pipeline.v if pipeline.schedule == "interleaved" else None
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            context_parallel_size=self.cp,
            pipeline_model_parallel_size=pipeline.p,
            sequence_parallel=self.sequence_parallel,
            pipeline_schedule=pipeline.schedule,
            num_virtual_stages_per_pipeline_rank=chunks,
            account_for_embedding_in_pipeline_split=pipeline.embedding,
            account_for_loss_in_pipeline_split=pipeline.loss,
            data_parallel_sharding_strategy=self.strategy,
            use_distributed_optimizer=self.strategy == "optim",
            overlap_grad_reduce=self.overlaps.gradients,
            overlap_param_gather=self.overlaps.weights,
            recompute_granularity=self.recompute,
        )
        batch = replace(config.batch, micro_batch_size=self.micro_batch)
        return replace(config, parallel=parallel, batch=batch)


class RankWork(NamedTuple):
    """One micro-batch on one pipeline rank: its seconds, and the bytes it sends over tp and cp."""

    times: PassTimes
    sent: float


class RankState(NamedTuple):
    """The state of one pipeline rank: how many parameters, and how many bytes in all."""

    parameters: int
    total: int


class Search:
    """A search over everything that the command line leaves open.

    given: names of the fields that the command line gives.
    tried: how many layouts were timed. least: the bytes of the layout that needs least memory, for
    the message when none fits; None before one was looked at.
    """

    def __init__(
        self, config: Config, vocab_size: int, num_devices: int, hardware: Hardware, given: Set[str]
    ):
        self.config = config
        self.model = config.model
        self.global_batch = config.batch.global_batch_size
        self.vocab_size = vocab_size
        self.num_devices = num_devices
        self.hardware = hardware
        self.given = given
        self.tried = 0
        self.least: int | None = None
        # Each of these is the same for many layouts, and computed once.
        self._specs: dict[tuple[Any, ...], PassSpec] = {}
        self._work: dict[tuple[Any, ...], list[RankWork]] = {}
        self._activations: dict[tuple[ModelChunk, PassSpec], ActivationMemory] = {}
        self._states: dict[tuple[Any, ...], list[RankState]] = {}
        self._occupancies: dict[tuple[Any, ...], list[Occupancy]] = {}

    def best(self) -> list[RunPlan]:
        """Return the finalists that fit, best first; none if nothing fits."""
        finalists = [self.layout(choice) for choice in self._finalists()]
        fitting = [plan for plan in finalists if self._works(plan)]
        return sorted(fitting, key=_measured_score)

    def layout(self, choice: LayoutChoice) -> RunPlan:
        """Make the plan of a choice, to be measured exactly."""
        config = resolve(choice.applied(self.config), self.num_devices)
        return RunPlan(config, self.vocab_size, self.num_devices, self.hardware)

    def _finalists(self) -> list[LayoutChoice]:
        """Return the best choices that fit, of each cut one, by the closed formulas."""
        found: dict[tuple[Any, ...], tuple[Score, LayoutChoice]] = {}
        for choice in self.choices():
            self.tried += 1
            score = self.score(choice)
            if choice.cut in found and score >= found[choice.cut][0]:
                continue
            need = self.need(choice)
            if self.least is None or need < self.least:
                self.least = need
            if need + self.hardware.reserve <= self.hardware.memory:
                found[choice.cut] = score, choice
        ranked = sorted(found.values(), key=lambda pair: pair[0])
        return [choice for _, choice in ranked[:FINALISTS]]

    def _works(self, plan: RunPlan) -> bool:
        return plan.fits and not validate(plan.config, self.num_devices)

    # What there is to choose from.

    def choices(self) -> Iterator[LayoutChoice]:
        """Yield every layout that divides devices, layers, heads and batch evenly."""
        for tp in self._tensor_sizes():
            for cp in self._context_sizes(tp):
                for sequence_parallel in self._sequence_parallel(tp, cp):
                    yield from self._pipelined(tp, cp, sequence_parallel)

    def _tensor_sizes(self) -> Iterator[int]:
        model = self.model
        sizes = [size for size in _divisors(self.num_devices) if size <= LARGEST_TP]
        for tp in self._open("tensor_model_parallel_size", sizes):
            kv_heads = model.num_kv_heads
            cuts_kv_heads = kv_heads % tp == 0 or tp % kv_heads == 0
            cuts_queries = model.num_attention_heads % tp == 0
            if cuts_queries and cuts_kv_heads and model.ffn_hidden_size % tp == 0:
                yield tp

    def _context_sizes(self, tp: int) -> Iterator[int]:
        devices = self.num_devices // tp
        heads = self.model.num_attention_heads // tp
        exchanges_heads = self.config.parallel.cp_comm_type == "a2a"
        for cp in self._open("context_parallel_size", _divisors(devices)):
            if devices % cp:
                continue
            if cp == 1:
                yield cp
                continue
            # Each rank has two chunks of a sequence, so that causal attention is the same for all.
            cuts_tokens = self.config.batch.seq_length % (2 * cp) == 0
            cuts_heads = not exchanges_heads or heads % cp == 0
            if cuts_tokens and cuts_heads:
                yield cp

    def _sequence_parallel(self, tp: int, cp: int) -> Iterator[bool]:
        for wanted in self._open("sequence_parallel", [True, False] if tp > 1 else [False]):
            if not wanted or self.config.batch.seq_length // cp % tp == 0:
                yield wanted

    def _pipelined(self, tp: int, cp: int, sequence_parallel: bool) -> Iterator[LayoutChoice]:
        devices = self.num_devices // (tp * cp)
        for pipeline in self.pipelines(devices):
            dp = devices // pipeline.p
            for micro_batch in self._micro_batches(dp):
                for recompute in self._recomputation(pipeline):
                    for strategy in self.strategies(dp * cp, pipeline.p):
                        yield LayoutChoice(
                            tp, cp, sequence_parallel, pipeline, micro_batch, strategy, recompute
                        )

    def _micro_batches(self, dp: int) -> Iterator[int]:
        sizes = [1 << power for power in range(LARGEST_MICRO_BATCH.bit_length())]
        for size in self._open("micro_batch_size", sizes):
            if self.global_batch % (size * dp) == 0:
                yield size

    def _recomputation(self, pipeline: PipelineChoice) -> Iterator[str | None]:
        for recompute in self._open("recompute_granularity", [None, "selective", "full"]):
            if recompute != "full" or not splits_backward(pipeline.schedule):
                yield recompute

    def pipelines(self, devices: int) -> Iterator[PipelineChoice]:
        """Yield every pipeline of so many devices, tensor and context parallelism set aside."""
        for p in self._open("pipeline_model_parallel_size", _divisors(devices)):
            if devices % p:
                continue
            either = [False, True] if p > 1 else [False]
            for schedule, v in self._schedules(p):
                for embedding in self._open("account_for_embedding_in_pipeline_split", either):
                    for loss in self._open("account_for_loss_in_pipeline_split", either):
                        pipeline = PipelineChoice(p, schedule, v, embedding, loss)
                        if pipeline.divides(self.model.num_layers):
                            yield pipeline

    def _schedules(self, p: int) -> Iterator[tuple[str, int]]:
        """Yield schedules and their numbers of chunks."""
        kinds = [("1f1b", 1)]
        if p > 1:
            kinds += [("interleaved", chunks) for chunks in range(2, MOST_CHUNKS + 1)]
        if 1 < p <= LONGEST_ZERO_BUBBLE:
            kinds += [("zb-h1", 1), ("zb-v", 2)]
        for schedule, chunks in kinds:
            if schedule not in self._open("pipeline_schedule", [schedule]):
                continue
            wanted = self._open("num_virtual_stages_per_pipeline_rank", [chunks])
            if schedule != "interleaved" or chunks in wanted:
                yield schedule, chunks

    def strategies(self, copies: int, p: int) -> list[str]:
        """Return the ways to share weights, gradients and state over so many copies."""
        if copies == 1:
            return ["no_shard"]
        chosen_by = {"use_distributed_optimizer", "data_parallel_sharding_strategy"}
        if self.given & chosen_by:
            return [self.config.parallel.data_parallel_sharding_strategy]
        # Sharing out the weights themselves needs a model in one piece.
        in_one_piece = p == 1
        return [
            strategy
            for strategy in SHARDING_STRATEGIES
            if strategy != "optim_grads_params" or in_one_piece
        ]

    def _open(self, name: str, values: list[Any]) -> list[Any]:
        """Return the values to try for a field: the one on the command line, if there is one."""
        if name not in self.given:
            return values
        section = self.config.batch if name == "micro_batch_size" else self.config.parallel
        return [getattr(section, name)]

    # What a choice is worth, by closed formulas.

    def microbatches(self, choice: LayoutChoice) -> int:
        """Return how many micro-batches an update has."""
        ranks = choice.tp * choice.cp * choice.pipeline.p
        return self.global_batch * ranks // (choice.micro_batch * self.num_devices)

    def score(self, choice: LayoutChoice) -> Score:
        """Score an update."""
        pipeline, m = choice.pipeline, self.microbatches(choice)
        spec, work = self.spec(choice), self.work(choice)
        message = spec.hidden_bytes(self.model)
        middle = work[min(1, len(work) - 1)].times
        makespan = m * max(rank.times.total for rank in work)
        makespan += waiting(pipeline, m, middle, message / self.hardware.link(self.num_devices))

        copies, shards = choice.copies(self.num_devices), choice.shards(self.num_devices)
        link = self.hardware.link(choice.tp * copies)
        strategy = choice.strategy
        waited = sent = 0.0
        for rank, state in zip(work, self.states(choice), strict=True):
            data = data_bytes(state.parameters, strategy, shards, copies, spec.itemsize, m)
            seconds = exposed_data_seconds(data, strategy, choice.overlaps, m, rank.times, link)
            waited = max(waited, seconds)
            sent = max(sent, sum(data) + m * rank.sent)
        return score_of(makespan + waited, sent)

    def need(self, choice: LayoutChoice) -> int:
        """Return the bytes of the fullest of the first, second and last pipeline rank."""
        spec, m = self.spec(choice), self.microbatches(choice)
        ranks = choice.pipeline.ranks(self.model.num_layers)
        most = 0
        for (rank, chunks), state in zip(ranks.items(), self.states(choice), strict=True):
            activations = [self.activations(chunk, spec) for chunk in chunks]
            held = self.held(choice.pipeline, rank, m, activations)
            most = max(most, state.total + held)
        return most

    def held(
        self, pipeline: PipelineChoice, rank: int, m: int, activations: list[ActivationMemory]
    ) -> int:
        """Return the bytes of activations of a rank at its fullest, working memory included.

        1F1B and interleaved are fullest after all forwards of the warm-up and one more. For the
        others this is read off a plan.
        """
        p, v = pipeline.p, pipeline.v
        working = max(chunk.working for chunk in activations)
        if pipeline.schedule == "1f1b":
            return min(m, p - rank) * activations[0].held + working
        if pipeline.schedule == "interleaved":
            return _held_interleaved(pipeline, rank, m, activations) + working
        enough = min(m, 2 * p)  # a rank is full before it has seen more micro-batches
        key = pipeline.schedule, p, enough, rank
        if key not in self._occupancies:
            actions = make_plan(pipeline.schedule, p, enough, v).actions[rank]
            self._occupancies[key] = occupancies(actions, v)
        peak = fullest(self._occupancies[key], activations)
        return peak.activations + peak.working

    # What many choices share.

    def spec(self, choice: LayoutChoice) -> PassSpec:
        """Return what the pass of a micro-batch depends on."""
        if choice.pass_key not in self._specs:
            self._specs[choice.pass_key] = PassSpec.of(choice.applied(self.config))
        return self._specs[choice.pass_key]

    def work(self, choice: LayoutChoice) -> list[RankWork]:
        """Return the work of one micro-batch on each of three ranks."""
        key = choice.pass_key, choice.pipeline
        if key not in self._work:
            ranks = choice.pipeline.ranks(self.model.num_layers).values()
            self._work[key] = [self._rank_work(choice, chunks) for chunks in ranks]
        return self._work[key]

    def _rank_work(self, choice: LayoutChoice, chunks: list[ModelChunk]) -> RankWork:
        model, spec, schedule = self.model, self.spec(choice), choice.pipeline.schedule
        times, sent = PassTimes(), 0.0
        for chunk in chunks:
            times += chunk_times(model, self.vocab_size, chunk, spec, schedule, self.hardware)
            over_tp = sum(tensor_bytes(model, chunk, spec))
            sent += over_tp + sum(context_bytes(model, spec)) * chunk.layers
        return RankWork(times, sent)

    def states(self, choice: LayoutChoice) -> list[RankState]:
        """Return the state of each of three ranks."""
        key = choice.tp, choice.strategy, choice.pipeline
        if key not in self._states:
            config = choice.applied(self.config)
            shards, copies = choice.shards(self.num_devices), choice.copies(self.num_devices)
            found = []
            for chunks in choice.pipeline.ranks(self.model.num_layers).values():
                state = state_of(config, self.vocab_size, chunks, shards=shards, copies=copies)
                found.append(RankState(state.parameters, state.total))
            self._states[key] = found
        return self._states[key]

    def activations(self, chunk: ModelChunk, spec: PassSpec) -> ActivationMemory:
        """Return the activations of a micro-batch in a chunk."""
        key = chunk, spec
        if key not in self._activations:
            self._activations[key] = activations_of(self.model, self.vocab_size, chunk, spec)
        return self._activations[key]


def waiting(pipeline: PipelineChoice, m: int, rank: PassTimes, transfer: float) -> float:
    """Return the seconds of the bubble of ranks that are alike, and of transfers nothing hides.

    m: micro-batches. rank: times of one micro-batch on a rank. transfer: seconds of a message.
    F, B, W of a rank, p ranks of v chunks:

        1f1b          (p - 1) (F + B + W)                   2 (m + p - 1) transfers
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
            idle = (p - 1) + (v - 1) * max(0, p - m)
            return idle * rank.total / v + 2 * ((v - 1) * m + p - 1) * transfer
        case "zb-h1":
            idle = max(rank.total - 2 * rank.backward_weight, rank.backward_input)
            return (p - 1) * idle + 2 * (p - 1) * transfer
        case _:
            times = rank.forward, rank.backward_input, rank.backward_weight
            uneven = max(times) - min(times)
            return (p - 1) * (uneven + rank.forward / 2) + 4 * (p - 1) * transfer


def _measured_score(plan: RunPlan) -> Score:
    return score_of(plan.step_seconds, sum(plan.sent(0).values()))


def _held_interleaved(
    pipeline: PipelineChoice, rank: int, m: int, activations: list[ActivationMemory]
) -> int:
    """Return the bytes of the warm-up's forwards and one more; chunks take turns by groups."""
    p, v = pipeline.p, pipeline.v
    rounds = max(1, m // p)
    group = -(-m // rounds)
    rest = min(m * v, (v - 1) * group + 2 * (p - 1 - rank) + 1)
    held = turn = 0
    while rest > 0:
        held += min(rest, group) * activations[turn % v].held
        rest -= group
        turn += 1
    return held


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
