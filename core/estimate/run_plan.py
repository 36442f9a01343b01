"""Plan a run by arithmetic alone: memory of every pipeline rank, bytes sent, time of an update.

A RunPlan takes a resolved configuration and a number of devices, and puts together what the other
modules of this room count: the state of each pipeline rank (memory.py), the activations it holds
at its fullest moment (activations.py, occupancy.py), the time of its chunks (costs.py), and the
engine's own plan of the pipeline, simulated with these times (core/pipeline).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..config import Config, data_parallel_size, key_value_copies, optimizer_shards
from ..pipeline.actions import Message
from ..pipeline.from_flags import placement_of, stage_specs
from ..pipeline.plan import Costs, Plan, make_plan
from ..pipeline.simulate import Timeline, simulate
from .activations import ActivationMemory, activations_of
from .costs import (
    DataBytes,
    Hardware,
    Overlaps,
    PassTimes,
    all_reduce,
    chunk_times,
    context_bytes,
    data_bytes,
    exposed_data_seconds,
    tensor_bytes,
)
from .flops import flops_per_token
from .memory import StateMemory, state_of
from .occupancy import fullest, occupancies
from .parameters import ModelChunk, local_vocabulary, partial_gradients
from .pass_spec import FP32, PassSpec

# With this many micro-batches and more, the middle of a plan is not simulated one by one.
LONG = 96


@dataclass(frozen=True)
class RankMemory:
    """The bytes of one pipeline rank at its fullest.

    in_flight: micro-batches whose activations it holds then, a chunk's counting 1 / chunks.
    """

    rank: int
    state: StateMemory
    activations: int
    working: int
    in_flight: float

    @property
    def total(self) -> int:
        """Return all bytes."""
        return self.state.total + self.activations + self.working


class Picture(NamedTuple):
    """A timeline that is short enough to be drawn, and how many micro-batches it shows."""

    timeline: Timeline
    num_microbatches: int


class RunPlan:
    """One run, as it would go: a resolved, valid configuration on a number of devices.

    The sizes of the layout are attributes. Memory, times and bytes are computed when asked for.
    """

    def __init__(self, config: Config, vocab_size: int, num_devices: int, hardware: Hardware):
        parallel, batch = config.parallel, config.batch
        self.config = config
        self.model = config.model
        self.vocab_size = vocab_size
        self.num_devices = num_devices
        self.hardware = hardware
        self.pass_spec = PassSpec.of(config)

        self.tp = parallel.tensor_model_parallel_size
        self.pp = parallel.pipeline_model_parallel_size
        self.cp = parallel.context_parallel_size
        self.dp = data_parallel_size(parallel, num_devices)
        # Ranks that hold the same parameters, and those of them that share the optimizer's state.
        self.copies = self.dp * self.cp
        self.shards = optimizer_shards(parallel, num_devices)
        self.strategy = parallel.data_parallel_sharding_strategy
        self.num_microbatches = batch.global_batch_size // (batch.micro_batch_size * self.dp)

        self.placement = placement_of(parallel, self.model.num_layers)
        specs = stage_specs(parallel, self.model.num_layers)
        self.stages = [ModelChunk(len(spec.layers), spec.embeds, spec.predicts) for spec in specs]

    @property
    def schedule(self) -> str:
        """Return the name of the pipeline schedule."""
        return self.placement.schedule

    @property
    def num_chunks(self) -> int:
        """Return how many model chunks each pipeline rank has."""
        return self.placement.num_chunks

    def stages_of(self, rank: int) -> list[int]:
        """Return the numbers of a pipeline rank's stages, one for each of its chunks."""
        return [self.placement.stage(rank, chunk) for chunk in range(self.num_chunks)]

    def chunks(self, rank: int) -> list[ModelChunk]:
        """Return the model chunks of a pipeline rank."""
        return [self.stages[stage] for stage in self.stages_of(rank)]

    def num_layers(self, rank: int) -> int:
        """Return how many layers a pipeline rank has."""
        return sum(chunk.layers for chunk in self.chunks(rank))

    def make_plan(self, num_microbatches: int) -> Plan:
        """Make the engine's own plan of so many micro-batches."""
        return make_plan(self.schedule, self.pp, num_microbatches, self.num_chunks)

    # Memory.

    def state(self, rank: int) -> StateMemory:
        """Count weights, gradients and optimizer state of a pipeline rank."""
        chunks = self.chunks(rank)
        return state_of(
            self.config, self.vocab_size, chunks, shards=self.shards, copies=self.copies
        )

    def activations(self, rank: int) -> list[ActivationMemory]:
        """Count the activations of one micro-batch in each chunk of a pipeline rank."""
        return [
            activations_of(self.model, self.vocab_size, chunk, self.pass_spec)
            for chunk in self.chunks(rank)
        ]

    @cached_property
    def plan(self) -> Plan:
        """Make a plan of so many micro-batches that more change neither bubble nor memory."""
        return self.make_plan(simulated_microbatches(self.pp, self.num_microbatches))

    @cached_property
    def memory(self) -> list[RankMemory]:
        """Count the memory of every pipeline rank."""
        found = []
        for rank, actions in enumerate(self.plan.actions):
            # The state stays as it is during an update, so the peak is that of the activations.
            peak = fullest(occupancies(actions, self.num_chunks), self.activations(rank))
            in_flight = peak.chunks / self.num_chunks
            memory = RankMemory(rank, self.state(rank), peak.activations, peak.working, in_flight)
            found.append(memory)
        return found

    @property
    def fullest(self) -> RankMemory:
        """Return the memory of the pipeline rank that needs most."""
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        """Return whether every rank fits into its device, the reserve left free."""
        return self.fullest.total + self.hardware.reserve <= self.hardware.memory

    # Time.

    @cached_property
    def times(self) -> list[PassTimes]:
        """Estimate the seconds of one micro-batch in each stage."""
        return [
            chunk_times(
                self.model, self.vocab_size, chunk, self.pass_spec, self.schedule, self.hardware
            )
            for chunk in self.stages
        ]

    def rank_times(self, rank: int) -> PassTimes:
        """Estimate the seconds of one micro-batch in all chunks of a pipeline rank."""
        return sum((self.times[stage] for stage in self.stages_of(rank)), PassTimes())

    @property
    def message(self) -> int:
        """Return the bytes of one message between two stages."""
        return self.pass_spec.hidden_bytes(self.model)

    @property
    def pipeline_link(self) -> float:
        """Return the bytes a second between two stages."""
        return self.hardware.link(self.num_devices)

    @property
    def data_link(self) -> float:
        """Return the bytes a second between the ranks that hold the same parameters."""
        return self.hardware.link(self.tp * self.copies)

    @cached_property
    def costs(self) -> Costs:
        """Return the stages' times as the simulator takes them.

        One ratio of forward to backward stands for all stages; their sizes differ.
        """
        mean = sum(self.times, PassTimes()) * (1 / self.pp)
        relative = []
        for times in self.times:
            relative.append(max(1e-9, times.total / mean.total) * self.num_chunks)
        transfer = self.message / self.pipeline_link if self.pp > 1 else 0.0
        return Costs(
            mean.forward, mean.backward_input, mean.backward_weight, transfer, tuple(relative)
        )

    @cached_property
    def timeline(self) -> Timeline:
        """Simulate `plan`."""
        return simulate(self.plan, self.costs)

    def picture(self) -> Picture:
        """Simulate all micro-batches, or enough to see warm-up, middle and drain."""
        whole_rounds = 8 // self.pp * self.pp
        shown = min(self.num_microbatches, max(whole_rounds, 2 * self.pp))
        return Picture(simulate(self.make_plan(shown), self.costs), shown)

    @cached_property
    def makespan(self) -> float:
        """Estimate the seconds of the pipeline in one update.

        Each group of pp micro-batches beyond those of `plan` takes what its last group took.
        """
        simulated = self.timeline.makespan
        # A schedule repeats itself after pp micro-batches: a long one is not simulated whole.
        extra = self.num_microbatches - self.plan.num_microbatches
        if extra == 0:
            return simulated
        shorter = self.make_plan(self.plan.num_microbatches - self.pp)
        last_group = simulated - simulate(shorter, self.costs).makespan
        return simulated + last_group * extra / self.pp

    @property
    def slowest(self) -> float:
        """Return the seconds of the busiest rank's own work in one update."""
        return max(self.rank_times(rank).total for rank in range(self.pp)) * self.num_microbatches

    @property
    def bubble(self) -> float:
        """Return the share of the makespan in which the busiest rank waits."""
        return max(0.0, 1 - self.slowest / self.makespan)

    def data_seconds(self, rank: int) -> float:
        """Estimate the seconds of data parallelism that no computation hides, in one update."""
        parallel = self.config.parallel
        return exposed_data_seconds(
            self.data_bytes(rank),
            self.strategy,
            Overlaps(parallel.overlap_grad_reduce, parallel.overlap_param_gather),
            self.num_microbatches,
            self.rank_times(rank),
            self.data_link,
        )

    @cached_property
    def step_seconds(self) -> float:
        """Estimate the seconds of one update."""
        looked_at = {0, self.pp // 2, self.pp - 1}  # the ends differ from the middle
        return self.makespan + max(self.data_seconds(rank) for rank in looked_at)

    def utilization(self, *, causal: bool) -> float:
        """Return the MFU of the devices, counting full attention or its causal half."""
        batch = self.config.batch
        tokens = batch.global_batch_size * batch.seq_length
        flops = flops_per_token(self.model, self.vocab_size, batch.seq_length, causal=causal)
        work = flops * tokens
        return work / (self.step_seconds * self.num_devices * self.hardware.peak)

    # Communication.

    def data_bytes(self, rank: int) -> DataBytes:
        """Count what each device of a pipeline rank sends over data parallelism in one update."""
        return data_bytes(
            self.state(rank).parameters,
            self.strategy,
            self.shards,
            self.copies,
            self.pass_spec.itemsize,
            self.num_microbatches,
        )

    def sent(self, rank: int) -> dict[str, float]:
        """Count the bytes that each device of a pipeline rank sends in one update, by axis."""
        m, spec = self.num_microbatches, self.pass_spec
        chunks = self.chunks(rank)
        tensor = sum(sum(tensor_bytes(self.model, chunk, spec)) for chunk in chunks) * m
        return {
            "tp": tensor + self._partial_bytes(rank),
            "cp": sum(context_bytes(self.model, spec)) * self.num_layers(rank) * m,
            "pp": self._messages(rank) * self.message * m + self._tied_bytes(rank),
            "dp": sum(self.data_bytes(rank)),
        }

    def _messages(self, rank: int) -> int:
        """Count the messages that a rank sends in one micro-batch: activations, gradients."""
        actions = self.plan.actions[rank]
        messages = [type(action).__name__ for action in actions if isinstance(action, Message)]
        sends = [name for name in messages if name.startswith("Send")]
        return len(sends) // self.plan.num_microbatches

    def _tied_bytes(self, rank: int) -> float:
        """Return what the two ends of the pipeline send to add up a tied matrix's gradient.

        In zb-v both ends are on one rank.
        """
        at_an_end = rank in (0, self.pp - 1)
        two_ranks = self.pp > 1 and self.schedule != "zb-v"
        if not (self.model.tied and two_ranks and at_an_end):
            return 0.0
        words = local_vocabulary(self.model, self.vocab_size, self.tp)
        return FP32 * words * self.model.hidden_size / self.shards

    def _partial_bytes(self, rank: int) -> float:
        """Return what a rank sends to add up gradients of which each rank of tp has a share."""
        if self.tp == 1:
            return 0.0
        cut_by_tokens = self.pass_spec.sequence_parallel
        partial = partial_gradients(
            self.model, self.tp, self.chunks(rank), sequence_parallel=cut_by_tokens
        )
        copies = key_value_copies(self.model, self.config.parallel)
        over_tp = all_reduce(partial.over_tp, self.tp)
        over_copies = all_reduce(partial.over_copies, copies)
        return FP32 / self.shards * (over_tp + over_copies)


def simulated_microbatches(p: int, m: int) -> int:
    """Return how many of m micro-batches are simulated on p ranks.

    All, or fewer where the pipeline only repeats itself: whole rounds of p less, but past warm-up
    and drain.
    """
    least = max(3 * p, LONG // p * p)
    return m if m <= least else least + (m - least) % p
