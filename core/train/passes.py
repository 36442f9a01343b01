"""This rank's model chunks at work: prepare a micro-batch, run it through them, add up its losses.

A pass takes the micro-batches of one global batch through the stages of the pipeline, with
gradients (training) or without (evaluation). The pipeline's interpreter decides the order; for
each step of it, it calls `Passes.run_chunk`:

    micro-batch 3, chunk 0   read from the loader, prepared, through the layers of chunk 0
    micro-batch 3, chunk 1   the same prepared micro-batch, through chunk 1; then it is dropped

One object, `Passes`, owns the chunks, the plans and the preparation; what a single pass has come
to so far is a value of its own, `PassState`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import comm, rng
from ..config import Config
from ..data.loader import Batch
from ..gradients import Deferral
from ..mesh import Mesh
from ..model.gpt import GPT
from ..model.tokens import TokenContext
from ..parallel.context import local_tokens, token_positions
from ..parallel.sharding import Sharding
from ..pipeline.placement import Placement
from ..pipeline.plan import make_plan
from ..pipeline.runtime import MessageSpec, Runner
from ..precision import working_dtype
from .schedule import GlobalBatch


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as this rank sees it, on the device.

    tokens: int64 [B, T/cp].
    labels: int64 [B, T/cp], the id that follows each token.
    mask: fp32 [B, T/cp], 1 where a prediction counts.
    context: what the layers need to know of the tokens.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    context: TokenContext


class PrepareBatch:
    """Turn whole samples on the host into this rank's `Inputs`; the copies do not wait.

    eod: the id that ends a document.
    """

    def __init__(self, config: Config, sharding: Sharding, device: torch.device, eod: int):
        self.sharding = sharding
        self.device = device
        self.eod = eod
        self.seed = config.batch.seed
        self.drops_hidden = config.model.hidden_dropout > 0
        self.cuts_attention = config.data.reset_attention_mask
        self.restarts_positions = config.data.reset_position_ids

    def __call__(self, batch: Batch, iteration: int | None) -> Inputs:
        """Return the inputs of a micro-batch.

        iteration: of the update, which dropout depends on; None in evaluation.
        """
        cp = self.sharding.cp
        tokens = batch.tokens.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        mask = batch.loss_mask.to(self.device, non_blocking=True)
        length = tokens.shape[1]

        positions = token_positions(length, cp, self.device)
        stream = None
        if iteration is not None and self.drops_hidden:
            # By the place in the sample: positions that start anew in each document come later.
            own = self.sharding.own_tokens(positions)
            stream = rng.DropoutStream.of(self.seed, iteration, batch.samples, own)
        documents = None
        if self.cuts_attention or self.restarts_positions:
            if batch.documents is None:
                documents = document_indices(tokens, self.eod)
            else:
                documents = batch.documents.to(self.device, non_blocking=True)
            if self.restarts_positions:
                positions = local_tokens(positions_in_documents(documents), cp)
            if not self.cuts_attention:
                documents = None

        context = TokenContext(positions, documents, stream, length)
        return Inputs(
            local_tokens(tokens, cp), local_tokens(labels, cp), local_tokens(mask, cp), context
        )


@dataclass
class PassState:
    """One pass so far: the micro-batches under way and the losses.

    batches: the micro-batches of this rank that are still to be read.
    iteration: of the update; None in evaluation.
    scale: the loss that backward starts from is the sum of the token losses times this.
    totals: fp64 [2], the masked token losses and the mask that this rank alone accounts for,
        summed so far: over all ranks of the world they are those of the global batch.
    inputs: the micro-batches that some chunk has still to see, by their index.
    """

    batches: Iterator[Batch]
    totals: torch.Tensor
    iteration: int | None = None
    scale: torch.Tensor | float = 1.0
    inputs: dict[int, Inputs] = field(default_factory=dict)


class Passes:
    """This rank's part of the model, and how the passes of training and evaluation run on it.

    chunks: the model chunks of this rank, in the order of their stages.
    placement: which stages of the pipeline they are, and its schedule.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        chunks: Sequence[GPT],
        placement: Placement,
        prepare: PrepareBatch,
    ):
        self.chunks = chunks
        self.mesh = mesh
        self.device = device
        self.placement = placement
        self.prepare = prepare
        self.deferral = Deferral()
        self.vocab_size = chunks[0].vocab_size
        self._seed = config.batch.seed
        self._drops_attention = config.model.attention_dropout > 0
        # Ranks of one tensor-parallel group compute the same losses: one of them counts.
        self._counts_losses = mesh.tp.rank == 0
        self._micro_batch_size = config.batch.micro_batch_size
        self._hidden_size = config.model.hidden_size
        self._dtype = working_dtype(config.precision)
        self._runners: dict[tuple[GlobalBatch, bool], Runner] = {}

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters in the order in which a forward pass uses them.

        A weight that two chunks share is one parameter, and stands there once.
        """
        # A dict keeps the order, and drops what it holds already.
        found: dict[torch.nn.Parameter, None] = {}
        for chunk in self.chunks:
            found.update(dict.fromkeys(chunk.parameters()))
        return list(found)

    def runner(self, batch: GlobalBatch, *, forward_only: bool) -> Runner:
        """Return what runs a global batch through the pipeline, made when first asked for."""
        key = batch, forward_only
        if key not in self._runners:
            self._runners[key] = self._make_runner(batch, forward_only)
        return self._runners[key]

    def train(
        self,
        batches: Iterator[Batch],
        batch: GlobalBatch,
        iteration: int,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """Run forward and backward of the micro-batches of one update.

        batches: gives this rank's micro-batches of the global batch `batch` next.
        scale: 0-d; the gradients are those of the sum of the token losses times this.
        Returns the `totals` of `PassState`.
        """
        for chunk in self.chunks:
            chunk.train()  # dropout on
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        state = PassState(batches, totals, iteration, scale)
        runner = self.runner(batch, forward_only=False)
        runner.run(partial(self.run_chunk, state))
        return totals

    def mean_loss(self, batches: Iterator[Batch], batch: GlobalBatch, num_passes: int) -> float:
        """Return the mean loss in nats of `num_passes` global batches, in evaluation mode.

        It is the sum of the masked token losses over the sum of the mask, over all ranks of the
        world; NaN if everything is masked.
        """
        for chunk in self.chunks:
            chunk.eval()  # dropout off
        runner = self.runner(batch, forward_only=True)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for _ in range(num_passes):
            one_pass = torch.zeros_like(totals)
            runner.run(partial(self.run_chunk, PassState(batches, one_pass)))
            totals += one_pass
        loss, count = comm.all_reduce(totals, self.mesh.world).tolist()
        return loss / count if count else float("nan")

    def run_chunk(
        self, state: PassState, chunk: int, index: int, x: torch.Tensor | None
    ) -> torch.Tensor:
        """Run one model chunk on one micro-batch, and add up its losses on the last stage.

        index: of the micro-batch in the pass.
        x: hidden states of the stage before; None on the first stage.
        Returns the hidden states for the next stage, or on the last one the scaled loss, 0-d.
        """
        # The first chunk of this rank reads a micro-batch, and the last one has done with it.
        if chunk == 0:
            state.inputs[index] = self.prepare(next(state.batches), state.iteration)
        inputs = state.inputs[index]
        if chunk == len(self.chunks) - 1:
            del state.inputs[index]
        if state.iteration is not None and self._drops_attention:
            self._seed_attention_dropout(state.iteration, index, chunk)

        model = self.chunks[chunk]
        x = inputs.tokens if x is None else x
        if not model.predicts:
            return model(x, inputs.context)
        # Backward starts from the total; the losses of the tokens are for the report.
        targets = inputs.labels, inputs.mask * state.scale
        total, losses = model(x, inputs.context, targets=targets)
        if self._counts_losses:
            state.totals[0] += masked_sum(losses, inputs.mask)
            state.totals[1] += inputs.mask.sum()
        return total

    def _seed_attention_dropout(self, iteration: int, index: int, chunk: int) -> None:
        """Seed torch's generator, from which PyTorch's attention draws its masks."""
        seed = rng.attention_dropout_seed(self._seed, iteration, index, chunk, self.mesh.rank)
        torch.manual_seed(seed)

    def _make_runner(self, batch: GlobalBatch, forward_only: bool) -> Runner:
        placement = self.placement
        plan = make_plan(
            placement.schedule,
            placement.num_ranks,
            batch.num_microbatches,
            placement.num_chunks,
            forward_only=forward_only,
        )
        # A message holds the tokens that this rank works on between its layers.
        sharding = self.prepare.sharding
        tokens = batch.seq_length // sharding.cp.size
        if sharding.sequence_parallel:
            tokens //= sharding.tp.size
        shape = (self._micro_batch_size, tokens, self._hidden_size)
        message = MessageSpec(shape, self._dtype, self.device)
        return Runner(plan, self.mesh.pp, message, self.deferral)


def masked_sum(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses [B, T] whose mask [B, T] is above 0.

    They are selected, not multiplied: a loss that does not count may be NaN.
    """
    return torch.where(mask > 0, losses, 0.0).sum()


def document_indices(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Return for each token [B, T] how many documents ended before it.

    An end-of-document token belongs to the document that it ends.
    """
    ends = (tokens == eod).long()
    # The sum up to and with a token; an end does not count for itself.
    return ends.cumsum(dim=1) - ends


def positions_in_documents(documents: torch.Tensor) -> torch.Tensor:
    """Return the distance of each token from the first one of its document in the sample.

    documents: int64 [B, T], as `document_indices` gives them. Returns int64 [B, T].
    """
    indices = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    # The index of the first token of each document at that token, 0 elsewhere; their running
    # maximum is the start of the document that a token stands in.
    before_first = documents[:, :1] - 1
    starts = torch.where(documents.diff(dim=1, prepend=before_first) > 0, indices, 0)
    return indices - starts.cummax(dim=1).values
