"""What a layout needs and does, by arithmetic alone: memory of every pipeline rank, bytes sent, and the time of an update."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import ge, mul

from ..config import Config, data_parallel_size, key_value_copies, optimizer_shards
from ..pipeline.from_flags import placement_of, stage_specs
from ..pipeline.plan import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Costs,
    Forward,
    Message,
    Placement,
    Plan,
    make_plan,
)
from ..pipeline.simulate import Timeline, simulate
from .activations import Activations, Cut, activations_of
from .costs import (
    Hardware,
    Times,
    all_reduce,
    chunk_times,
    context_bytes,
    data_bytes,
    exposed_data_seconds,
    tensor_bytes,
)
from .flops import flops_per_token
from .memory import FP32, Chunk, State, state_of, weights_of

LONG = 96  # micro-batches and more of a plan that are not simulated one by one


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank at its fullest. in_flight: micro-batches whose activations it holds then, a chunk's counting 1 / v."""

    rank: int
    state: State
    activations: int
    working: int
    in_flight: float

    @property
    def total(self) -> int:
        return self.state.total + self.activations + self.working


class Layout:
    """A resolved, valid configuration on a number of devices, and what follows from it."""

    def __init__(self, config: Config, vocab_size: int, num_devices: int, hardware: Hardware):
        self.config, self.vocab_size, self.num_devices, self.hardware = (
            config,
            vocab_size,
            num_devices,
            hardware,
        )
        parallel, batch = config.parallel, config.batch
        self.model, self.cut = config.model, Cut.of(config)
        self.tp, self.pp, self.cp = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        self.dp = data_parallel_size(parallel, num_devices)
        self.shards, self.copies = optimizer_shards(parallel, num_devices), self.dp * self.cp
        self.strategy = parallel.data_parallel_sharding_strategy
        self.num_microbatches = batch.global_batch_size // (batch.micro_batch_size * self.dp)
        self.placement: Placement = placement_of(parallel, self.model.num_layers)
        specs = stage_specs(parallel, self.model.num_layers)
        self.stages = [Chunk(len(spec.layers), spec.embeds, spec.predicts) for spec in specs]

    def chunks(self, rank: int) -> list[Chunk]:
        return [
            self.stages[self.placement.stage(rank, chunk)]
            for chunk in range(self.placement.num_chunks)
        ]

    # Memory.

    def state(self, rank: int) -> State:
        return state_of(
            weights_of(self.model, self.vocab_size, self.tp, self.chunks(rank)),
            self.config,
            self.shards,
            self.copies,
        )

    def activations(self, rank: int) -> list[Activations]:
        return [
            activations_of(self.model, self.vocab_size, chunk, self.cut)
            for chunk in self.chunks(rank)
        ]

    @cached_property
    def plan(self) -> Plan:
        """The engine's own, of so many micro-batches that more of them change neither bubble nor memory."""
        schedule, p, v = self.placement.schedule, self.pp, self.placement.num_chunks
        return make_plan(schedule, p, simulated_microbatches(p, self.num_microbatches), v)

    @cached_property
    def memory(self) -> list[RankMemory]:
        """Of every pipeline rank."""
        found = []
        for rank, actions in enumerate(self.plan.actions):
            v = self.placement.num_chunks
            held, working, chunks = fullest(moments(actions, v), self.activations(rank))
            found.append(RankMemory(rank, self.state(rank), held, working, chunks / v))
        return found

    @property
    def fullest(self) -> RankMemory:
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total + self.hardware.reserve <= self.hardware.memory

    # Time.

    @cached_property
    def times(self) -> list[Times]:
        """Of each stage."""
        return [
            chunk_times(
                self.model, self.vocab_size, chunk, self.cut, self.placement.schedule, self.hardware
            )
            for chunk in self.stages
        ]

    def rank_times(self, rank: int) -> Times:
        return sum(
            (
                self.times[self.placement.stage(rank, chunk)]
                for chunk in range(self.placement.num_chunks)
            ),
            Times(),
        )

    @property
    def message(self) -> int:
        """Bytes between two stages."""
        return self.cut.e * self.cut.norm_tokens * self.model.hidden_size

    @property
    def pipeline_link(self) -> float:
        return self.hardware.link(self.num_devices)

    @cached_property
    def costs(self) -> Costs:
        """The stages' times as the simulator takes them; one ratio of forward to backward stands for all stages."""
        mean = sum(self.times, Times()) * (1 / self.pp)
        relative = tuple(
            max(1e-9, times.total / mean.total) * self.placement.num_chunks for times in self.times
        )
        transfer = self.message / self.pipeline_link if self.pp > 1 else 0.0
        return Costs(mean.forward, mean.backward_input, mean.backward_weight, transfer, relative)

    @cached_property
    def timeline(self) -> Timeline:
        return simulate(self.plan, self.costs)

    def picture(self) -> tuple[Timeline, int]:
        """The timeline of so many micro-batches, all or enough to see warm-up, middle and drain."""
        count = min(self.num_microbatches, max(8 // self.pp * self.pp, 2 * self.pp))
        return simulate(
            make_plan(self.placement.schedule, self.pp, count, self.placement.num_chunks),
            self.costs,
        ), count

    @cached_property
    def makespan(self) -> float:
        """Of all micro-batches: those beyond the plan's take what the last group of it took."""
        extra = self.num_microbatches - self.plan.num_microbatches
        if extra == 0:
            return self.timeline.makespan
        shorter = make_plan(
            self.placement.schedule,
            self.pp,
            self.plan.num_microbatches - self.pp,
            self.placement.num_chunks,
        )
        return (
            self.timeline.makespan
            + (self.timeline.makespan - simulate(shorter, self.costs).makespan) * extra / self.pp
        )

    @property
    def slowest(self) -> float:
        """Seconds of the busiest rank's own work, all micro-batches."""
        return max(self.rank_times(rank).total for rank in range(self.pp)) * self.num_microbatches

    @property
    def bubble(self) -> float:
        """The share of the makespan in which the busiest rank waits."""
        return max(0.0, 1 - self.slowest / self.makespan)

    def data_seconds(self, rank: int) -> float:
        """Of data parallelism, what no computation hides."""
        parallel, sent = self.config.parallel, self.data_bytes(self.state(rank).parameters)
        overlaps = parallel.overlap_grad_reduce, parallel.overlap_param_gather
        return exposed_data_seconds(
            sent,
            self.strategy,
            overlaps,
            self.num_microbatches,
            self.rank_times(rank),
            self.data_link,
        )

    @property
    def data_link(self) -> float:
        return self.hardware.link(self.tp * self.copies)

    @cached_property
    def step_seconds(self) -> float:
        return self.makespan + max(
            self.data_seconds(rank) for rank in {0, self.pp // 2, self.pp - 1}
        )

    def utilization(self, *, causal: bool) -> float:
        """MFU, by either convention."""
        tokens = self.config.batch.global_batch_size * self.config.batch.seq_length
        work = (
            flops_per_token(
                self.model, self.vocab_size, self.config.batch.seq_length, causal=causal
            )
            * tokens
        )
        return work / (self.step_seconds * self.num_devices * self.hardware.peak)

    # Communication.

    def data_bytes(self, parameters: int) -> dict[str, float]:
        return data_bytes(
            parameters, self.strategy, self.shards, self.copies, self.cut.e, self.num_microbatches
        )

    def sent(self, rank: int) -> dict[str, float]:
        """Bytes that each device of a pipeline rank sends in one update, by axis."""
        m, chunks = self.num_microbatches, self.chunks(rank)
        layers = sum(chunk.layers for chunk in chunks)
        tensor = sum(sum(tensor_bytes(self.model, chunk, self.cut)) for chunk in chunks) * m
        ends = 0.0
        if (
            self.model.tied
            and self.pp > 1
            and self.placement.schedule != "zb-v"
            and rank in (0, self.pp - 1)
        ):
            ends = (
                FP32
                * self.model.padded_vocabulary(self.vocab_size, self.tp)
                // self.tp
                * self.model.hidden_size
                / self.shards
            )
        return {
            "tp": tensor + self._partial_bytes(rank),
            "cp": sum(context_bytes(self.model, self.cut)) * layers * m,
            "pp": self._messages(rank) * self.message * m + ends,
            "dp": sum(self.data_bytes(self.state(rank).parameters).values()),
        }

    def _messages(self, rank: int) -> int:
        """Sent in one micro-batch: activations on, gradients back."""
        sends = [
            type(action).__name__
            for action in self.plan.actions[rank]
            if isinstance(action, Message)
        ]
        return sum(name.startswith("Send") for name in sends) // self.plan.num_microbatches

    def _partial_bytes(self, rank: int) -> float:
        """Gradients that each rank of tp has a share of: norms and biases of cut tokens, QK norms, key-value heads that several ranks hold."""
        if self.tp == 1:
            return 0.0
        model, chunks = self.model, self.chunks(rank)
        layers = sum(chunk.layers for chunk in chunks)
        norm = model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
        by_head = model.qk_layernorm and model.qk_layernorm_width == "head"
        count = layers * 2 * model.head_size * by_head * (norm // model.hidden_size)
        if self.cut.sequence_parallel:
            biases = model.hidden_size * (model.attention_out_bias + model.linear_bias)
            count += layers * (model.norms_per_layer * norm + biases) + norm * any(
                chunk.predicts for chunk in chunks
            )
            learned = model.position_embedding_type == "learned_absolute"
            count += (
                model.max_position_embeddings
                * model.hidden_size
                * (learned and any(chunk.embeds for chunk in chunks))
            )
        copies = key_value_copies(model, self.config.parallel)
        heads = (
            layers
            * model.head_size
            * (2 * (model.hidden_size + model.qkv_bias) + (model.qk_layernorm and not by_head))
        )
        return FP32 / self.shards * (all_reduce(count, self.tp) + all_reduce(heads, copies))


def simulated_microbatches(p: int, m: int) -> int:
    """m, or fewer where the pipeline only repeats itself: whole rounds of p less, but past warm-up and drain."""
    least = max(3 * p, LONG // p * p)
    return m if m <= least else least + (m - least) % p


Moment = tuple[
    tuple[int, ...], int | None
]  # by chunk whole micro-batches, then by chunk those whose weights' gradient waits; the chunk at work


def moments(actions: Iterable[Action], chunks: int) -> list[Moment]:
    """What a rank holds while each action runs, without the moments at which it holds no more of anything than at another."""
    held, found = [0] * (2 * chunks), set()
    for action in actions:
        kind = type(action)
        if isinstance(action, Message):
            continue
        whole, late = action.chunk, chunks + action.chunk
        held[whole] += kind is Forward
        if kind is not BackwardWeight:
            found.add((tuple(held), action.chunk))
        held[whole] -= kind in (Backward, BackwardInput)
        held[late] += (kind is BackwardInput) - (kind is BackwardWeight)
        if kind is BackwardInput:
            found.add((tuple(held), None))
    return [
        moment
        for moment in found
        if not any(_covers(other, moment) for other in found if other != moment)
    ]


def _covers(larger: Moment, moment: Moment) -> bool:
    return moment[1] in (None, larger[1]) and all(map(ge, larger[0], moment[0]))


def fullest(found: Iterable[Moment], activations: Sequence[Activations]) -> tuple[int, int, int]:
    """Of the moment that takes most: bytes of activations, bytes of working memory, and how many chunks' activations are held."""
    sizes = [chunk.held for chunk in activations] + [chunk.deferred for chunk in activations]
    sums = (
        (
            sum(map(mul, held, sizes)),
            0 if at_work is None else activations[at_work].working,
            sum(held),
        )
        for held, at_work in found
    )
    return max(sums, key=lambda most: most[0] + most[1])
