"""From each rank's gradients to those of the whole batch: over data parallel, over twins, and over the tensor axis where ranks saw a share."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from .. import comm
from ..mesh import Axis
from .buckets import Shard


def reduce_gradients(buckets: Sequence[Shard]) -> None:
    """Once the backward passes of an update are done: leave every bucket with its shard of the true gradients."""
    for bucket in reversed(buckets):  # backward finished the last ones first
        bucket.start_reduction()
    for bucket in reversed(buckets):
        bucket.finish()
    sum_partial(buckets)


def sum_partial(buckets: Sequence[Shard]) -> None:
    """Sum what is partial over an axis, such as the gradient of a norm that saw a rank's tokens alone: one all-reduce per axis."""
    partial: dict[Axis, list[torch.Tensor]] = defaultdict(list)
    for bucket in buckets:
        for part, start, stop in bucket.parts():
            if part.partial.size > 1:
                partial[part.partial].append(bucket.gradients[start:stop])
    for axis, views in partial.items():
        total = comm.all_reduce(torch.cat(views), axis)
        torch._foreach_copy_(views, list(total.split([view.numel() for view in views])))
