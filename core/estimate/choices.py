"""List the layouts that a search can choose from.

A layout is chosen from the outside in, since each choice limits the next ones. On 8 devices:

    tensor parallel size      1, 2, 4 or 8     if it divides heads and feed-forward width
    context parallel size     1 .. 8 / tp      if it divides the sequence
    sequence parallel         yes or no
    pipeline                  a number of ranks, a schedule, chunks, what counts as a layer
    micro-batch               1, 2, 4 or 8     if it divides the batch of one data-parallel rank
    recomputation             none, attention, everything
    sharding                  what the remaining devices, data parallel, share out

What the command line gives is kept: then there is one value to try, whether or not it divides.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from ..config import SHARDING_STRATEGIES, Config
from .costs import Overlaps, splits_backward
from .parameters import ModelChunk

LARGEST_TP = 8
LARGEST_MICRO_BATCH = 8
MOST_CHUNKS = 8
LONGEST_ZERO_BUBBLE = 32  # stages; the memory of zero-bubble schedules is read off their plans


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
        """Return the chunks of the first, the second and the last rank, by rank.

        The ranks between hold what the second one does, and no longer.
        """
        if self.p == 1:
            return {0: [ModelChunk(num_layers)]}
        layers = self._counted(num_layers) // (self.p * self.v)
        # A stage with an end that counts as a layer has one layer less.
        first = ModelChunk(layers - self.embedding, embeds=True, predicts=False)
        middle = ModelChunk(layers, embeds=False, predicts=False)
        last = ModelChunk(layers - self.loss, embeds=False, predicts=True)
        between = [middle] * (self.v - 1)
        end = self.p - 1
        if self.schedule == "zb-v":
            # Down the ranks and up again: the first rank has both ends of the model.
            return {0: [first, last], 1: [middle, middle], end: [middle, middle]}
        return {0: [first, *between], 1: [middle, *between], end: [*between, last]}

    def divides(self, num_layers: int) -> bool:
        """Return whether the layers can be shared out evenly, each chunk with at least one."""
        chunks = self.p * self.v
        counted = self._counted(num_layers)
        return counted % chunks == 0 and counted >= chunks

    def _counted(self, num_layers: int) -> int:
        return num_layers + self.embedding + self.loss


@dataclass(frozen=True)
class PassChoice:
    """The part of a layout that the pass of a micro-batch depends on.

    micro_batch: samples of a micro-batch. recompute: --recompute-granularity.
    """

    tp: int
    cp: int
    sequence_parallel: bool
    micro_batch: int
    recompute: str | None

    def applied(self, config: Config) -> Config:
        """Return the configuration with the flags of this part."""
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            context_parallel_size=self.cp,
            sequence_parallel=self.sequence_parallel,
            recompute_granularity=self.recompute,
        )
        batch = replace(config.batch, micro_batch_size=self.micro_batch)
        return replace(config, parallel=parallel, batch=batch)


@dataclass(frozen=True)
class LayoutChoice:
    """A layout as the search sees it.

    dp: the data-parallel size. strategy: --data-parallel-sharding-strategy.
    """

    micro: PassChoice
    pipeline: PipelineChoice
    dp: int
    strategy: str

    @property
    def cut(self) -> tuple[Any, ...]:
        """Return how model and pipeline are cut: of each cut only the best layout is kept."""
        micro = self.micro
        return micro.tp, micro.cp, micro.sequence_parallel, self.pipeline

    @property
    def copies(self) -> int:
        """Return how many ranks hold the same parameters."""
        return self.dp * self.micro.cp

    @property
    def overlaps(self) -> Overlaps:
        """Return what data parallelism overlaps: whatever can be."""
        return Overlaps(
            gradients=self.strategy != "no_shard",
            weights=self.strategy in ("optim", "optim_grads"),
        )

    def applied(self, config: Config) -> Config:
        """Return the configuration with this layout's flags."""
        config = self.micro.applied(config)
        pipeline, overlaps = self.pipeline, self.overlaps
        chunks = pipeline.v if pipeline.schedule == "interleaved" else None
        parallel = replace(
            config.parallel,
            pipeline_model_parallel_size=pipeline.p,
            pipeline_schedule=pipeline.schedule,
            num_virtual_stages_per_pipeline_rank=chunks,
            account_for_embedding_in_pipeline_split=pipeline.embedding,
            account_for_loss_in_pipeline_split=pipeline.loss,
            data_parallel_sharding_strategy=self.strategy,
            use_distributed_optimizer=self.strategy == "optim",
            overlap_grad_reduce=overlaps.gradients,
            overlap_param_gather=overlaps.weights,
        )
        return replace(config, parallel=parallel)


class LayoutChoices:
    """Every layout of a model on a number of devices.

    given: names of the fields of the configuration that stay as they are.
    """

    def __init__(self, config: Config, num_devices: int, given: Set[str]):
        self.model = config.model
        self.batch = config.batch
        self.parallel = config.parallel
        self.num_devices = num_devices
        self.given = given

    def __iter__(self) -> Iterator[LayoutChoice]:
        """Yield the layouts that divide devices, layers, heads, tokens and batch evenly."""
        for tp in self._tensor_sizes():
            for cp in self._context_sizes(tp):
                for sequence_parallel in self._sequence_parallel(tp, cp):
                    yield from self._pipelined(tp, cp, sequence_parallel)

    def _pipelined(self, tp: int, cp: int, sequence_parallel: bool) -> Iterator[LayoutChoice]:
        devices = self.num_devices // (tp * cp)
        for pipeline in self._pipelines(devices):
            dp = devices // pipeline.p
            for micro_batch in self._micro_batches(dp):
                for recompute in self._recomputation(pipeline):
                    micro = PassChoice(tp, cp, sequence_parallel, micro_batch, recompute)
                    for strategy in self._strategies(dp * cp, pipeline.p):
                        yield LayoutChoice(micro, pipeline, dp, strategy)

    def _open(self, name: str, values: list[Any]) -> list[Any]:
        """Return the values to try for a field: the one that is given, if there is one."""
        if name not in self.given:
            return values
        section = self.batch if name == "micro_batch_size" else self.parallel
        return [getattr(section, name)]

    # One axis after the other.

    def _tensor_sizes(self) -> Iterator[int]:
        model = self.model
        sizes = [size for size in _divisors(self.num_devices) if size <= LARGEST_TP]
        for tp in self._open("tensor_model_parallel_size", sizes):
            # With fewer key-value heads than ranks, several ranks hold the same one.
            kv_heads = model.num_kv_heads
            cuts_kv_heads = kv_heads % tp == 0 or tp % kv_heads == 0
            cuts_queries = model.num_attention_heads % tp == 0
            cuts_feed_forward = model.ffn_hidden_size % tp == 0
            if cuts_queries and cuts_kv_heads and cuts_feed_forward:
                yield tp

    def _context_sizes(self, tp: int) -> Iterator[int]:
        devices = self.num_devices // tp
        heads = self.model.num_attention_heads // tp
        for cp in self._open("context_parallel_size", _divisors(devices)):
            if devices % cp:
                continue
            # Each rank has two chunks of a sequence, so that causal attention is as much for all.
            cuts_tokens = self.batch.seq_length % (2 * cp) == 0
            cuts_heads = self.parallel.cp_comm_type != "a2a" or heads % cp == 0
            if cp == 1 or (cuts_tokens and cuts_heads):
                yield cp

    def _sequence_parallel(self, tp: int, cp: int) -> Iterator[bool]:
        either = [True, False] if tp > 1 else [False]
        tokens = self.batch.seq_length // cp
        for wanted in self._open("sequence_parallel", either):
            if not wanted or tokens % tp == 0:
                yield wanted

    # The pipeline.

    def _pipelines(self, devices: int) -> Iterator[PipelineChoice]:
        """Yield the pipelines of so many devices, tensor and context parallelism set aside."""
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
        """Yield schedules for p ranks, each with a number of chunks."""
        kinds = [("1f1b", 1)]
        if p > 1:
            kinds += [("interleaved", chunks) for chunks in range(2, MOST_CHUNKS + 1)]
        if 1 < p <= LONGEST_ZERO_BUBBLE:
            kinds += [("zb-h1", 1), ("zb-v", 2)]
        for schedule, chunks in kinds:
            if schedule not in self._open("pipeline_schedule", [schedule]):
                continue
            # The others have as many chunks as they have: the flag is for interleaved alone.
            wanted = self._open("num_virtual_stages_per_pipeline_rank", [chunks])
            if schedule != "interleaved" or chunks in wanted:
                yield schedule, chunks

    # The micro-batch, and what a rank keeps.

    def _micro_batches(self, dp: int) -> Iterator[int]:
        sizes = [1]
        while sizes[-1] < LARGEST_MICRO_BATCH:
            sizes.append(2 * sizes[-1])
        for size in self._open("micro_batch_size", sizes):
            if self.batch.global_batch_size % (size * dp) == 0:
                yield size

    def _recomputation(self, pipeline: PipelineChoice) -> Iterator[str | None]:
        # Weight gradients that wait need activations which full recomputation does not keep.
        splits = splits_backward(pipeline.schedule)
        for recompute in self._open("recompute_granularity", [None, "selective", "full"]):
            if recompute != "full" or not splits:
                yield recompute

    def _strategies(self, copies: int, p: int) -> list[str]:
        """Return the ways to share weights, gradients and state over so many copies."""
        if copies == 1:
            return ["no_shard"]
        chosen_by = {"use_distributed_optimizer", "data_parallel_sharding_strategy"}
        if self.given & chosen_by:
            return [self.parallel.data_parallel_sharding_strategy]
        strategies = list(SHARDING_STRATEGIES)
        if p > 1:
            strategies.remove("optim_grads_params")  # it needs a model in one piece
        return strategies


def _divisors(number: int) -> list[int]:
    candidates = range(1, number + 1)
    return [divisor for divisor in candidates if number % divisor == 0]
