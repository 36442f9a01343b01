"""Sum each rank's gradients to those of the whole batch, and compute their norm and clip factor.

1. Over data parallel and twins: `reduce_gradients` has each bucket do it (buckets.py).
2. Over an axis whose ranks each saw a share, such as the tokens of sequence parallel:
   `sum_partial`.
3. The norm: `squared_norm` of the elements that this rank counts; the sum over all ranks is the
   whole.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from .. import comm
from ..mesh import Axis
from ..ops import Ops
from .buckets import Shard


def reduce_gradients(shards: Sequence[Shard]) -> None:
    """Leave every shard with the gradients of the whole batch, after all backward passes."""
    for shard in reversed(shards):  # backward finished the last ones first
        shard.start_reduction()
    for shard in reversed(shards):
        shard.finish()
    sum_partial(shards)


def sum_partial(shards: Sequence[Shard]) -> None:
    """Sum gradients of which each rank of an axis has a share: one all-reduce per axis."""
    views: dict[Axis, list[torch.Tensor]] = defaultdict(list)
    for shard in shards:
        for axis, start, stop in shard.partial_sums:
            views[axis].append(shard.gradients[start:stop])
    for axis, shares in views.items():
        # As one message: the shares are small (norms and biases), and there are many.
        total = comm.all_reduce(torch.cat(shares), axis)
        torch._foreach_copy_(shares, list(total.split([share.numel() for share in shares])))


def squared_norm(shards: Sequence[Shard], device: torch.device, ops: Ops) -> torch.Tensor:
    """Return this rank's share of the squared 2-norm of all gradients: 0-d, fp64, on the device.

    Each element counts on one rank of the world (Shard.counted), so the shares add up.
    """
    counted: list[torch.Tensor] = []
    for shard in shards:
        gradients = shard.gradients
        counted += [gradients[start:stop] for start, stop in shard.counted]
    if not counted:  # a pipeline rank may hold no parameter
        return torch.zeros((), dtype=torch.float64, device=device)
    return ops.squared_norm(counted)


def clip_factor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """Return the factor on gradients that keeps their norm at `limit` at most: 0-d, on the device.

    limit: 0 does not clip.
    """
    if limit == 0:
        return torch.ones_like(norm)
    # Megatron's and torch's formula; the 1e-6 is for a norm of 0.
    return (limit / (norm + 1e-6)).clamp(max=1.0)
