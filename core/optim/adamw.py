"""AdamW over flat buckets, with a step count and a skip that live on the device."""

from collections.abc import Iterator

import torch

from .. import comm
from ..config import OptimizerConfig
from ..layout import Piece
from ..mesh import Axis
from ..ops import Ops
from .buckets import Bucket

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on the fp32 masters; the working weights are rounded from them.

    A step has three phases: `reduce_gradients` sums them over the data-parallel ranks, the caller derives norm, clip factor and
    skip from them on the device, `update` applies them (or, where skip is true, changes nothing at all).
    """

    def __init__(self, buckets: list[Bucket], config: OptimizerConfig, ops: Ops):
        self.buckets, self.config, self.ops = buckets, config, ops
        self.moments = [{name: torch.zeros_like(bucket.masters) for name in MOMENTS} for bucket in buckets]
        self.steps = torch.zeros((), dtype=torch.int64, device=buckets[0].masters.device)

    def zero_gradients(self) -> None:
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def reduce_gradients(self, axis: Axis) -> None:
        """Sum the gradients over `axis`, once per update."""
        for bucket in self.buckets:
            comm.all_reduce(bucket.gradients, axis)

    def update(self, lr: float, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """One update with the gradients times grad_scale (0-d fp32). skip (0-d bool): leave weights, moments and step count as they are."""
        self.steps += (~skip).to(self.steps.dtype)
        config = self.config
        for bucket, moments in zip(self.buckets, self.moments, strict=True):
            self.ops.adamw_(
                bucket.masters,
                moments["exp_avg"],
                moments["exp_avg_sq"],
                bucket.gradients,
                bucket.weights,
                lr=lr,
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                eps=config.adam_eps,
                weight_decay=config.weight_decay if bucket.decayed else 0.0,
                step=self.steps,
                grad_scale=grad_scale,
                skip=skip,
            )

    def weight_pieces(self) -> Iterator[Piece]:
        """The fp32 masters under their plain names."""
        for bucket in self.buckets:
            yield from bucket.pieces(bucket.masters)

    def moment_pieces(self) -> Iterator[Piece]:
        """The moments, named `optim.exp_avg.NAME` and `optim.exp_avg_sq.NAME`."""
        for bucket, moments in zip(self.buckets, self.moments, strict=True):
            for name, moment in moments.items():
                yield from bucket.pieces(moment, f"optim.{name}.")

    def masters_loaded(self) -> None:
        """Round the working weights from masters that a checkpoint was read into."""
        for bucket in self.buckets:
            if bucket.weights is not bucket.masters:
                bucket.weights.copy_(bucket.masters)
