"""The update of this rank's shards, with a step count and a skip that live on the device."""

from collections.abc import Iterator, Sequence

import torch

from ..config import OPTIMIZER_STATE, OptimizerConfig
from ..layout import Piece
from ..ops import Ops
from ..state import StateItem
from .buckets import GroupSpan, Shard
from .groups import weight_decay_of
from .reduce import reduce_gradients
from .rules import FlatMemory, Step, rule_named


class Optimizer:
    """Updates the fp32 masters of this rank's shards, and the working weights of all shards.

    An update has three phases:
    1. `begin`, before the first micro-batch.
    2. `reduce`, after the last one. The caller then derives norm, clip factor and skip from the
       gradients, on the device.
    3. `update` applies them by the rule of --optimizer; or, if skip is true, changes nothing.

    state: what the rule keeps of each shard's weights, by name.
    steps: updates so far, not counting those skipped; 0-d int64.
    """

    def __init__(
        self,
        buckets: Sequence[Shard],
        config: OptimizerConfig,
        ops: Ops,
        device: torch.device,
        *,
        overlap_gather: bool = False,
    ):
        self.buckets = buckets
        self.config = config
        self.ops = ops
        self.overlap_gather = overlap_gather
        self.rule = rule_named(config.optimizer)
        if self.rule.WHOLE_MATRICES:
            _check_whole(buckets, config.optimizer)
        names = OPTIMIZER_STATE[config.optimizer]
        self.state = [
            {name: torch.zeros_like(bucket.masters) for name in names} for bucket in buckets
        ]
        # What each span of each shard is updated with; a step looks no group up.
        self._spans = [[self._with_decay(span) for span in bucket.spans] for bucket in buckets]
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, micro_batches: int) -> None:
        """Start an update of so many micro-batches from gradients of zero."""
        for bucket in self.buckets:
            bucket.begin(micro_batches)

    def reduce(self) -> None:
        """Leave each shard with the gradients of the whole batch."""
        reduce_gradients(self.buckets)

    @torch.no_grad()
    def update(self, lr: float, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update the weights once.

        grad_scale: factor on the gradients; 0-d fp32.
        skip: leave weights, state and step count as they are; 0-d bool.
        """
        # On the device, like skip: a step that waited for the answer would stall the device.
        self.steps += (~skip).to(self.steps.dtype)
        step = Step(lr, self.steps, grad_scale, skip)
        for i, bucket in enumerate(self.buckets):
            for elements, weight_decay in self._spans[i]:
                memory = self._memory(bucket, self.state[i], elements, weight_decay)
                self.rule.update(memory, step, self.config, self.ops)
        self._gather(wait=not self.overlap_gather)

    def _with_decay(self, span: GroupSpan) -> tuple[slice, float]:
        return slice(span.start, span.stop), weight_decay_of(span.group, self.config)

    def _memory(
        self, bucket: Shard, state: dict[str, torch.Tensor], elements: slice, weight_decay: float
    ) -> FlatMemory:
        # Cut anew in each update: the memory of ZeRO-3 may move between two.
        return FlatMemory(
            masters=bucket.masters[elements],
            state={name: tensor[elements] for name, tensor in state.items()},
            gradients=bucket.gradients[elements],
            weights=bucket.own_weights[elements],
            weight_decay=weight_decay,
        )

    def weight_pieces(self, *, owned: bool = False) -> Iterator[Piece]:
        """Return the fp32 masters of this rank's shards, under their plain names.

        owned: only what this rank writes into a checkpoint. Over all ranks that is every element
            once: of the copies of a shard the first writes it, of replicated parts the primary.
        """
        for bucket in self.buckets:
            yield from self._chosen(bucket, bucket.pieces(bucket.masters), owned)

    def moment_pieces(self, *, owned: bool = False) -> Iterator[Piece]:
        """Return the rule's state, named such as `optim.exp_avg.NAME` or `optim.momentum.NAME`.

        owned: as for weight_pieces.
        """
        for bucket, state in zip(self.buckets, self.state, strict=True):
            for name, tensor in state.items():
                pieces = bucket.pieces(tensor, f"optim.{name}.")
                yield from self._chosen(bucket, pieces, owned)

    def _chosen(self, bucket: Shard, pieces: Iterator[Piece], owned: bool) -> Iterator[Piece]:
        # The copies are those of the bucket's own reduction: experts have others than the rest.
        if not owned:
            yield from pieces
        elif bucket.reduction.copies.rank == 0:
            yield from (piece for piece in pieces if piece.primary)

    def state_items(self) -> list[StateItem]:
        """Return what a run's state says of the optimizer beside tensors: its count of updates."""

        def load(steps: int) -> None:
            self.steps.fill_(steps)

        return [StateItem("optimizer_steps", lambda: self.steps.item(), load)]

    def masters_loaded(self) -> None:
        """Round the working weights from masters that a checkpoint was read into.

        A checkpoint holds masters alone, since the working weights follow from them.
        """
        for bucket in self.buckets:
            bucket.own_weights.copy_(bucket.masters)
        self._gather(wait=True)

    def _gather(self, *, wait: bool) -> None:
        for bucket in self.buckets:
            bucket.start_gather()
        if wait:
            for bucket in self.buckets:
                bucket.wait_for_weights()


def _check_whole(buckets: Sequence[Shard], optimizer: str) -> None:
    """Raise ValueError if a rule that needs whole matrices is given shards that may cut them."""
    for bucket in buckets:
        shards = bucket.reduction.shards.size
        if shards > 1:
            raise ValueError(
                f"--optimizer {optimizer} needs whole matrices, but its state is cut over {shards}"
                " processes; use --data-parallel-sharding-strategy no_shard"
            )
