"""Collectives over an Axis: plain and differentiable. Each is the identity at size 1, so that no caller asks for the size."""

import torch
import torch.distributed as dist

from .mesh import Axis


def all_reduce(tensor: torch.Tensor, axis: Axis, op: str = "sum") -> torch.Tensor:
    """Reduce `tensor` in place over `axis` with sum, max or min, and return it."""
    if axis.size > 1:
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op], group=axis.group)
    return tensor


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x unchanged, its gradient summed over `axis`: the way into a column-parallel layer (Shoeybi et al. 2019, f)."""
    return _CopyTo.apply(x, axis) if axis.size > 1 else x


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x summed over `axis`, its gradient unchanged: the way out of a row-parallel layer (Shoeybi et al. 2019, g)."""
    return _ReduceFrom.apply(x, axis) if axis.size > 1 else x


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
