"""The fastest layouts of a model that fit: every cut of the devices is timed by closed formulas, the best are simulated.

While searching, the bubble comes from `waiting` and memory is that of the first, second and last pipeline rank. The finalists are measured as
any layout is: the engine's own plan, simulated, and every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log

from ..config import SHARDING_STRATEGIES, Config, resolve
from ..config.validate import validate
from ..pipeline.plan import make_plan
from .activations import Activations, Cut, activations_of
from .run_plan import Layout, Moment, fullest, moments
from .costs import (
    Hardware,
    Times,
    chunk_times,
    context_bytes,
    data_bytes,
    exposed_data_seconds,
    tensor_bytes,
)
from .memory import Chunk, state_of, weights_of

FINALISTS = 8
LARGEST_TP, LARGEST_MICRO_BATCH, MOST_CHUNKS = 8, 8, 8
LONGEST_ZERO_BUBBLE = 32  # stages; the memory of zero-bubble schedules is read off their plans

Score = tuple[int, float]  # steps of half a percent of time, bytes sent


def score_of(seconds: float, sent: float) -> Score:
    """Smaller is better: less time, and of times alike fewer bytes, since hidden communication is not free."""
    return round(200 * log(seconds)), sent


@dataclass(frozen=True)
class Pipeline:
    """p ranks of v chunks under a schedule, and what counts as a layer when layers are shared out."""

    p: int
    schedule: str = "1f1b"
    v: int = 1
    embedding: bool = False
    loss: bool = False

    def ranks(self, num_layers: int) -> dict[int, list[Chunk]]:
        """The chunks of the first, the second and the last rank; those between hold what the second does, and no longer."""
        p, v = self.p, self.v
        if p == 1:
            return {0: [Chunk(num_layers)]}
        layers = (num_layers + self.embedding + self.loss) // (p * v)
        first, middle, last = (
            Chunk(layers - self.embedding, True, False),
            Chunk(layers, False, False),
            Chunk(layers - self.loss, False, True),
        )
        if self.schedule == "zb-v":
            return {0: [first, last], 1: [middle, middle], p - 1: [middle, middle]}
        return {
            0: [first, *[middle] * (v - 1)],
            1: [middle] * v,
            p - 1: [*[middle] * (v - 1), last],
        }


@dataclass(frozen=True)
class Choice:
    """A layout as the search sees it."""

    tp: int
    cp: int
    sequence_parallel: bool
    pipeline: Pipeline
    micro_batch: int
    strategy: str
    granularity: str | None

    @property
    def activations_key(self) -> tuple:
        """All that activations depend on."""
        return self.tp, self.cp, self.sequence_parallel, self.micro_batch, self.granularity

    @property
    def overlaps(self) -> tuple[bool, bool]:
        """Of gradients and of weights."""
        return self.strategy != "no_shard", self.strategy in ("optim", "optim_grads")

    def applied(self, config: Config) -> Config:
        """The flags of this layout, resolved; what can overlap does."""
        pipeline = self.pipeline
        overlap_reduce, overlap_gather = self.overlaps
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            context_parallel_size=self.cp,
            pipeline_model_parallel_size=pipeline.p,
            sequence_parallel=self.sequence_parallel,
            pipeline_schedule=pipeline.schedule,
            num_virtual_stages_per_pipeline_rank=pipeline.v
            if pipeline.schedule == "interleaved"
            else None,
            account_for_embedding_in_pipeline_split=pipeline.embedding,
            account_for_loss_in_pipeline_split=pipeline.loss,
            data_parallel_sharding_strategy=self.strategy,
            use_distributed_optimizer=self.strategy == "optim",
            overlap_grad_reduce=overlap_reduce,
            overlap_param_gather=overlap_gather,
            recompute_granularity=self.granularity,
        )
        return replace(
            config,
            parallel=parallel,
            batch=replace(config.batch, micro_batch_size=self.micro_batch),
        )


class Search:
    """Over all that `given` (flag names of the command line) leaves open."""

    def __init__(
        self, config: Config, vocab_size: int, num_devices: int, hardware: Hardware, given: set[str]
    ):
        self.config, self.vocab_size, self.num_devices, self.hardware, self.given = (
            config,
            vocab_size,
            num_devices,
            hardware,
            given,
        )
        self.model, self.total = config.model, config.batch.global_batch_size
        self.tried = 0
        self.least: tuple[int, Choice] | None = (
            None  # the layout with the smallest need, for the message when none fits
        )
        self._cuts: dict[tuple, Cut] = {}
        self._work: dict[tuple, list[tuple[Times, float]]] = {}
        self._activations: dict[tuple, Activations] = {}
        self._states: dict[tuple, list[tuple[int, int]]] = {}
        self._moments: dict[tuple, list[Moment]] = {}

    def best(self) -> list[Layout]:
        """The finalists that fit, best first: of each cut of model and pipeline only the best. Empty where nothing fits."""
        found: dict[tuple, tuple[Score, Choice]] = {}
        for choice in self.choices():
            self.tried += 1
            cut, score = (
                (choice.tp, choice.cp, choice.sequence_parallel, choice.pipeline),
                self.score(choice),
            )
            if cut in found and score >= found[cut][0]:
                continue
            need = self.need(choice)
            if self.least is None or need < self.least[0]:
                self.least = need, choice
            if need + self.hardware.reserve <= self.hardware.memory:
                found[cut] = score, choice
        choices = sorted(found.values(), key=lambda pair: pair[0])[:FINALISTS]
        layouts = [self.layout(choice) for _, choice in choices]
        fitting = [
            layout
            for layout in layouts
            if layout.fits and not validate(layout.config, self.num_devices)
        ]
        return sorted(
            fitting, key=lambda layout: score_of(layout.step_seconds, sum(layout.sent(0).values()))
        )

    def layout(self, choice: Choice) -> Layout:
        return Layout(
            resolve(choice.applied(self.config), self.num_devices),
            self.vocab_size,
            self.num_devices,
            self.hardware,
        )

    # What there is to choose from.

    def choices(self) -> Iterator[Choice]:
        model, length = self.model, self.config.batch.seq_length
        for tp in self.open(
            "tensor_model_parallel_size",
            [n for n in _divisors(self.num_devices) if n <= LARGEST_TP],
        ):
            heads = model.num_kv_heads
            if (
                model.num_attention_heads % tp
                or model.ffn_hidden_size % tp
                or (heads % tp and tp % heads)
            ):
                continue
            for cp in self.open("context_parallel_size", _divisors(self.num_devices // tp)):
                if (self.num_devices // tp) % cp or (cp > 1 and length % (2 * cp)):
                    continue
                if (
                    cp > 1
                    and self.config.parallel.cp_comm_type == "a2a"
                    and model.num_attention_heads // tp % cp
                ):
                    continue
                for cut_tokens in self.open(
                    "sequence_parallel", [True, False] if tp > 1 else [False]
                ):
                    if not cut_tokens or length // cp % tp == 0:
                        yield from self._pipelined(tp, cp, cut_tokens)

    def _pipelined(self, tp: int, cp: int, cut_tokens: bool) -> Iterator[Choice]:
        for pipeline in self.pipelines(self.num_devices // (tp * cp)):
            dp = self.num_devices // (tp * cp * pipeline.p)
            for micro in self.open(
                "micro_batch_size", [1 << i for i in range(LARGEST_MICRO_BATCH.bit_length())]
            ):
                if self.total % (micro * dp):
                    continue
                for granularity in self.open("recompute_granularity", [None, "selective", "full"]):
                    if granularity == "full" and pipeline.schedule.startswith("zb"):
                        continue
                    for strategy in self.strategies(dp * cp, pipeline.p):
                        yield Choice(tp, cp, cut_tokens, pipeline, micro, strategy, granularity)

    def pipelines(self, devices: int) -> Iterator[Pipeline]:
        layers = self.model.num_layers
        for p in self.open("pipeline_model_parallel_size", _divisors(devices)):
            kinds = [("1f1b", 1)]
            if p > 1:
                kinds += [("interleaved", v) for v in range(2, MOST_CHUNKS + 1)] + [
                    ("zb-h1", 1),
                    ("zb-v", 2),
                ] * (p <= LONGEST_ZERO_BUBBLE)
            for schedule, v in kinds:
                if devices % p or schedule not in self.open("pipeline_schedule", [schedule]):
                    continue
                if schedule == "interleaved" and v not in self.open(
                    "num_virtual_stages_per_pipeline_rank", [v]
                ):
                    continue
                for embedding in self.open(
                    "account_for_embedding_in_pipeline_split", [False, True][: 1 + (p > 1)]
                ):
                    for loss in self.open(
                        "account_for_loss_in_pipeline_split", [False, True][: 1 + (p > 1)]
                    ):
                        counted = layers + embedding + loss
                        if counted % (p * v) == 0 and counted >= p * v:
                            yield Pipeline(p, schedule, v, embedding, loss)

    def strategies(self, copies: int, p: int) -> list[str]:
        if copies == 1:
            return ["no_shard"]
        if self.given & {"use_distributed_optimizer", "data_parallel_sharding_strategy"}:
            return [self.config.parallel.data_parallel_sharding_strategy]
        return [
            strategy
            for strategy in SHARDING_STRATEGIES
            if strategy != "optim_grads_params" or p == 1
        ]

    def open(self, name: str, values: list) -> list:
        """The values to try: the one on the command line, if there is one."""
        if name not in self.given:
            return values
        section = self.config.batch if name == "micro_batch_size" else self.config.parallel
        return [getattr(section, name)]

    # What one is worth.

    def microbatches(self, choice: Choice) -> int:
        return (
            self.total
            * choice.tp
            * choice.cp
            * choice.pipeline.p
            // (choice.micro_batch * self.num_devices)
        )

    def score(self, choice: Choice) -> Score:
        """Of an update, by the closed formulas."""
        pipeline, m, work = choice.pipeline, self.microbatches(choice), self.work(choice)
        message = self.cut(choice).e * self.cut(choice).norm_tokens * self.model.hidden_size
        middle = work[min(1, len(work) - 1)][0]
        makespan = m * max(times.total for times, _ in work)
        makespan += waiting(pipeline, m, middle, message / self.hardware.link(self.num_devices))
        copies = self.num_devices // (choice.tp * pipeline.p)
        shards, link = (
            1 if choice.strategy == "no_shard" else copies,
            self.hardware.link(choice.tp * copies),
        )
        waited = sent = 0.0
        for (times, bytes_sent), (parameters, _) in zip(work, self.states(choice), strict=True):
            data = data_bytes(parameters, choice.strategy, shards, copies, self.cut(choice).e, m)
            waited = max(
                waited, exposed_data_seconds(data, choice.strategy, choice.overlaps, m, times, link)
            )
            sent = max(sent, sum(data.values()) + m * bytes_sent)
        return score_of(makespan + waited, sent)

    def need(self, choice: Choice) -> int:
        """Bytes of the fullest of the first, second and last pipeline rank."""
        pipeline, cut, m, most = choice.pipeline, self.cut(choice), self.microbatches(choice), 0
        ranks = pipeline.ranks(self.model.num_layers)
        for (rank, chunks), (_, state) in zip(ranks.items(), self.states(choice), strict=True):
            most = max(
                most,
                state
                + self.held(pipeline, rank, m, [self.activations(chunk, cut) for chunk in chunks]),
            )
        return most

    def held(self, pipeline: Pipeline, rank: int, m: int, activations: list[Activations]) -> int:
        """Of activations, working memory included. 1F1B and interleaved: all forwards of the warm-up and one more."""
        p, v, working = pipeline.p, pipeline.v, max(chunk.working for chunk in activations)
        if pipeline.schedule == "1f1b":
            return min(m, p - rank) * activations[0].held + working
        if pipeline.schedule == "interleaved":
            group = -(-m // max(1, m // p))
            rest, held = min(m * v, (v - 1) * group + 2 * (p - 1 - rank) + 1), 0
            turn = 0
            while rest > 0:
                held += min(rest, group) * activations[turn % v].held
                rest, turn = rest - group, turn + 1
            return held + working
        key = (
            pipeline.schedule,
            p,
            min(m, 2 * p),
            rank,
        )  # a rank is full before it has seen more micro-batches
        if key not in self._moments:
            self._moments[key] = moments(make_plan(*key[:3], v).actions[rank], v)
        return sum(fullest(self._moments[key], activations)[:2])

    # Each computed once.

    def cut(self, choice: Choice) -> Cut:
        if choice.activations_key not in self._cuts:
            self._cuts[choice.activations_key] = Cut.of(choice.applied(self.config))
        return self._cuts[choice.activations_key]

    def work(self, choice: Choice) -> list[tuple[Times, float]]:
        """Of each of three ranks and one micro-batch: its time, and the bytes it sends over tp and cp."""
        key = choice.activations_key, choice.pipeline
        if key not in self._work:
            cut, schedule, found = self.cut(choice), choice.pipeline.schedule, []
            for chunks in choice.pipeline.ranks(self.model.num_layers).values():
                times = (
                    chunk_times(self.model, self.vocab_size, chunk, cut, schedule, self.hardware)
                    for chunk in chunks
                )
                sent = (
                    sum(tensor_bytes(self.model, chunk, cut))
                    + sum(context_bytes(self.model, cut)) * chunk.layers
                    for chunk in chunks
                )
                found.append((sum(times, Times()), sum(sent)))
            self._work[key] = found
        return self._work[key]

    def states(self, choice: Choice) -> list[tuple[int, int]]:
        """(parameters, bytes) of each of three ranks."""
        copies = self.num_devices // (choice.tp * choice.pipeline.p)
        key = choice.tp, choice.strategy, choice.pipeline
        if key not in self._states:
            config, shards, found = (
                choice.applied(self.config),
                1 if choice.strategy == "no_shard" else copies,
                [],
            )
            for chunks in choice.pipeline.ranks(self.model.num_layers).values():
                state = state_of(
                    weights_of(self.model, self.vocab_size, choice.tp, chunks),
                    config,
                    shards,
                    copies,
                )
                found.append((state.parameters, state.total))
            self._states[key] = found
        return self._states[key]

    def activations(self, chunk: Chunk, cut: Cut) -> Activations:
        if (chunk, cut) not in self._activations:
            self._activations[chunk, cut] = activations_of(self.model, self.vocab_size, chunk, cut)
        return self._activations[chunk, cut]


def waiting(pipeline: Pipeline, m: int, rank: Times, transfer: float) -> float:
    """The bubble by closed formula (of ranks alike), and transfers that nothing hides."""
    p, v = pipeline.p, pipeline.v
    if p == 1:
        return 0.0
    times = rank.forward, rank.backward_input, rank.backward_weight
    match pipeline.schedule:
        case "1f1b":
            return (p - 1) * rank.total + 2 * (m + p - 1) * transfer
        case "interleaved":
            return ((p - 1) + (v - 1) * max(0, p - m)) * rank.total / v + 2 * (
                (v - 1) * m + p - 1
            ) * transfer
        case "zb-h1":
            return (p - 1) * max(rank.total - 2 * rank.backward_weight, rank.backward_input) + 2 * (
                p - 1
            ) * transfer
        case _:  # 0 if F = B = W, plus the makespan's p - 1 half steps
            return (p - 1) * (max(times) - min(times) + rank.forward / 2) + 4 * (p - 1) * transfer


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
