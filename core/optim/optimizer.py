"""The update of flat buckets by AdamW or SGD, with a step count and a skip that live on the device."""

from collections.abc import Iterator, Sequence

import torch

from ..config import OPTIMIZER_STATE, OptimizerConfig
from ..layout import Piece
from ..ops import AdamWTerms, Ops
from ..state import StateItem
from .buckets import Shard
from .reduce import reduce_gradients


class Optimizer:
    """Updates the fp32 masters of this rank's shards, rounds the working weights from them and gathers those of the other shards.

    A step has three phases: `begin` before the first micro-batch, `reduce` after the last one, then the caller derives norm, clip
    factor and skip from the gradients on the device, and `update` applies them (or, where skip is true, changes nothing at all).
    AdamW: Loshchilov and Hutter 2019. SGD with momentum and coupled weight decay, as torch.optim.SGD.
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
        self.buckets, self.config, self.ops, self.overlap_gather = (
            buckets,
            config,
            ops,
            overlap_gather,
        )
        self.moments = [
            {name: torch.zeros_like(bucket.masters) for name in OPTIMIZER_STATE[config.optimizer]}
            for bucket in buckets
        ]
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, micro_batches: int) -> None:
        """An update of so many micro-batches begins: gradients are zero."""
        for bucket in self.buckets:
            bucket.begin(micro_batches)

    def reduce(self) -> None:
        """The gradients of the whole batch, each shard where it is updated."""
        reduce_gradients(self.buckets)

    def update(self, lr: float, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """One update with the gradients times grad_scale (0-d fp32). skip (0-d bool): leave weights, moments and step count as they are."""
        self.steps += (~skip).to(self.steps.dtype)
        for bucket, moments in zip(self.buckets, self.moments, strict=True):
            for elements, weight_decay in (
                (slice(0, bucket.decayed), self.config.weight_decay),
                (slice(bucket.decayed, None), 0.0),
            ):
                flat = [
                    memory[elements]
                    for memory in (
                        bucket.masters,
                        *moments.values(),
                        bucket.gradients,
                        bucket.own_weights,
                    )
                ]
                if flat[0].numel():
                    self._apply(
                        *flat, lr=lr, weight_decay=weight_decay, grad_scale=grad_scale, skip=skip
                    )
        self._gather(wait=not self.overlap_gather)

    def _apply(self, *flat: torch.Tensor, **now: float | torch.Tensor) -> None:
        config = self.config
        if config.optimizer == "sgd":
            self.ops.sgd_(*flat, momentum_factor=config.sgd_momentum, **now)
        else:
            terms = AdamWTerms.at(
                self.steps,
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                eps=config.adam_eps,
                **now,
            )
            self.ops.adamw_(*flat, terms)

    def weight_pieces(self) -> Iterator[Piece]:
        """The fp32 masters of this rank's shards under their plain names."""
        for bucket in self.buckets:
            yield from bucket.pieces(bucket.masters)

    def moment_pieces(self) -> Iterator[Piece]:
        """The moments, named `optim.exp_avg.NAME`, `optim.exp_avg_sq.NAME` or `optim.momentum.NAME`."""
        for bucket, moments in zip(self.buckets, self.moments, strict=True):
            for name, moment in moments.items():
                yield from bucket.pieces(moment, f"optim.{name}.")

    def state_items(self) -> list[StateItem]:
        """Return what a run's state says of the optimizer beside tensors: its count of updates."""
        return [StateItem("optimizer_steps", lambda: self.steps.item(), self.steps.fill_)]

    def masters_loaded(self) -> None:
        """Round the working weights from masters that a checkpoint was read into."""
        for bucket in self.buckets:
            bucket.own_weights.copy_(bucket.masters)
        self._gather(wait=True)

    def _gather(self, *, wait: bool) -> None:
        for bucket in self.buckets:
            bucket.start_gather()
        if wait:
            for bucket in self.buckets:
                bucket.wait_for_weights()
