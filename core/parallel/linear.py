"""Linear layers cut over an axis, by rows (column parallel) or by columns (row parallel) of the weight. H in, O out features.

The products stay outside of what torch.compile sees: they send, and their gradients go where no compiler can follow.

With sequence parallel, x outside of the layers is cut over the same axis by tokens: gathered on the way in, its sum cut on the way out.
"""

from functools import partial

import torch
from torch import nn

from .. import comm
from ..autograd import apply
from ..gradients import Sink, current, sink_of, use
from ..ops import Ops
from .sharding import Sharding


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b, with W cut by rows: each rank of `tp` computes its own slice of the output features.

    x: [B, T, H] on every rank, or [B, T/tp, H] with sequence parallel.   y: [B, T, O/tp], the slices of the parts one after another.
    Several projections may be fused in one weight (q, k and v of one product), each cut by itself: see Layout.rows_cut.
    Shoeybi et al. 2019, section 3; sequence parallel: Korthikanti et al. 2022, section 4.2.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, sharding: Sharding, ops: Ops
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.sharding, self.ops = sharding, ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = column_parallel(x, self.weight, self.sharding, self.ops)
        return y if self.bias is None else y + use(self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b, with W cut by columns: each rank of `tp` holds a slice of the input features, and the products are summed.

    x: [B, T, H/tp].   y: [B, T, O] on every rank, or [B, T/tp, O] with sequence parallel. The bias is whole on every rank and
    added once, after the sum: with sequence parallel each rank sees only its tokens' share of the bias' gradient.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, sharding: Sharding, ops: Ops
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.sharding, self.ops = sharding, ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = row_parallel(x, self.weight, self.sharding, self.ops)
        return y if self.bias is None else y + use(self.bias)


@torch.compiler.disable
def column_parallel(
    x: torch.Tensor, weight: nn.Parameter, sharding: Sharding, ops: Ops
) -> torch.Tensor:
    """x W^T for a weight [O/tp, H] that is cut by rows: see ColumnParallelLinear."""
    return apply(_ColumnParallel, x, current(weight), sink_of(weight), sharding, ops)


@torch.compiler.disable
def row_parallel(
    x: torch.Tensor, weight: nn.Parameter, sharding: Sharding, ops: Ops
) -> torch.Tensor:
    """x W^T, summed over tp, for a weight [O, I/tp] that is cut by columns: see RowParallelLinear."""
    return apply(_RowParallel, x, current(weight), sink_of(weight), sharding, ops)


class _ColumnParallel(torch.autograd.Function):
    """The gradient of x is summed over tp while the weight gradient's GEMM runs; the gathered x is not kept but gathered again."""

    @staticmethod
    def forward(ctx, x, weight, sink, sharding, ops):
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.sharding, ctx.ops = sink, sharding, ops
        return ops.product(
            comm.start_gather_tokens(x, sharding.tp)() if sharding.sequence_parallel else x, weight
        )

    @staticmethod
    def backward(ctx, dy):
        (x, weight), tp, sink, ops = ctx.saved_tensors, ctx.sharding.tp, ctx.sink, ctx.ops
        x, wide = x.detach(), ops.operand(dy)
        if not ctx.sharding.sequence_parallel:
            dx = _input_gradient(wide, weight, x.dtype, ops)
            summed = comm.start_all_reduce(dx, tp)
            dw = _weight_gradient(sink, weight, wide, lambda: x, ops)
            return summed.wait(), dw, None, None, None
        gather = partial(comm.start_gather_tokens, x, tp)
        if sink is None or sink.owner.deferral.held is None:
            whole = gather()  # under way during the next GEMM
        else:
            whole = lambda: gather()()  # noqa: E731 - a held product keeps the cut x alone, and gathers when its turn comes
        summed = comm.start_reduce_tokens(_input_gradient(wide, weight, x.dtype, ops), tp)
        dw = _weight_gradient(sink, weight, wide, whole, ops)
        return summed(), dw, None, None, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, sink, sharding, ops):
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.sharding, ctx.ops = sink, sharding, ops
        y = ops.product(x, weight)
        return (
            comm.start_reduce_tokens(y, sharding.tp)()
            if sharding.sequence_parallel
            else comm.all_reduce(y, sharding.tp)
        )

    @staticmethod
    def backward(ctx, dy):
        (x, weight), ops = ctx.saved_tensors, ctx.ops
        x = x.detach()
        if ctx.sharding.sequence_parallel:
            dy = comm.start_gather_tokens(dy, ctx.sharding.tp)()
        wide = ops.operand(dy)
        dx = _input_gradient(wide, weight, x.dtype, ops)
        return dx, _weight_gradient(ctx.sink, weight, wide, lambda: x, ops), None, None, None


def _input_gradient(
    dy: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, ops: Ops
) -> torch.Tensor:
    """dy W in `dtype`; dy is an operand already."""
    return (dy @ ops.operand(weight)).to(dtype)


def _weight_gradient(
    sink: Sink | None, weight: torch.Tensor, dy: torch.Tensor, x, ops: Ops
) -> torch.Tensor | None:
    """dy^T x to the sink, now or when its turn comes, or to autograd where there is no sink. `x` is called for the input; dy is an operand."""
    if not weight.requires_grad:
        return None
    if sink is None:
        return (dy.flatten(0, -2).t() @ ops.operand(x()).flatten(0, -2)).to(weight.dtype)
    sink.owner.deferral.run(
        lambda: sink.add_product(dy.flatten(0, -2), ops.operand(x()).flatten(0, -2))
    )
    return None
