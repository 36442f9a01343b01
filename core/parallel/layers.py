"""Layers cut over the tensor axis: column parallel, row parallel, and the embedding.

    ColumnParallelLinear     the weight is cut by rows: each rank computes its output features
    RowParallelLinear        the weight is cut by columns: the ranks' products are summed
    VocabParallelEmbedding   the table is cut by rows: each rank looks up the ids that it has

I input and O output features; otherwise the letters of model/shape.py.

Without sequence parallel x is whole on every rank of tp. A column-parallel layer needs nothing
forward and sums dx over tp backward; a row-parallel one sums y forward and needs nothing backward.
With sequence parallel x is cut over tp by tokens outside of the layers: gathered on the way in, and
the sum of y is cut on the way out. Backward each turns into the other.

torch.compile does not look into the products: they send, and their gradients go where no compiler
can follow.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import comm
from ..gradients import Sink, ready_sink, use
from ..ops import Ops
from .sharding import Sharding


class _ParallelLinear(nn.Module):
    """A linear layer whose weight is cut over tp; each subclass says how it multiplies."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, sharding: Sharding, ops: Ops
    ):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.sharding = sharding
        self.ops = ops


class ColumnParallelLinear(_ParallelLinear):
    """y = x W^T + b, with W cut by rows: each rank of tp computes its own slice of the features.

    x: [B, T, I] on every rank, or [B, T/tp, I] with sequence parallel.
    y: [B, T, O/tp], the slices of the parts one after another.

    Several projections may be fused in one weight (q, k and v of one product), each cut by itself:
    see Layout.rows_cut.
    Shoeybi et al. 2019, section 3; sequence parallel: Korthikanti et al. 2022, section 4.2.
    """

    def forward(self, x: Tensor) -> Tensor:
        multiply = _column_parallel if torch.is_grad_enabled() else _column_product
        y = multiply(x, self.weight, self.sharding, self.ops)
        return y if self.bias is None else y + use(self.bias)


class RowParallelLinear(_ParallelLinear):
    """y = x W^T + b, with W cut by columns: each rank of tp holds a slice of the input features.

    x: [B, T, I/tp].
    y: [B, T, O] on every rank, or [B, T/tp, O] with sequence parallel: the sum over tp.

    The bias is whole on every rank and added once, after the sum. With sequence parallel a rank
    sees only its tokens' share of the bias' gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        multiply = _row_parallel if torch.is_grad_enabled() else _row_product
        y = multiply(x, self.weight, self.sharding, self.ops)
        return y if self.bias is None else y + use(self.bias)


class VocabParallelEmbedding(nn.Module):
    """A table [V, H] cut by rows: each rank of tp holds [V/tp, H] and looks up the ids in them.

    tokens: int64 [B, T].
    y: [B, T, H] on every rank, or [B, T/tp, H] with sequence parallel.

    Rows past the vocabulary are padding, zero and never looked up. A tied head has the same weight.
    """

    def __init__(self, weight: nn.Parameter, sharding: Sharding):
        super().__init__()
        self.weight = weight
        self.sharding = sharding

    def forward(self, tokens: Tensor) -> Tensor:
        weight = use(self.weight)
        tp = self.sharding.tp
        if tp.size == 1:
            return F.embedding(tokens, weight)
        # An id of another rank looks row 0 up and is set to zero: each id has one rank that
        # contributes, so the sum over tp is the whole lookup.
        local = tokens - tp.rank * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        found = F.embedding(local.masked_fill(elsewhere, 0), weight)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sharding.sequence_parallel:
            return comm.reduce_tokens(found, tp)
        return comm.reduce_from(found, tp)


def column_parallel(x: Tensor, weight: nn.Parameter, sharding: Sharding, ops: Ops) -> Tensor:
    """Compute x W^T as ColumnParallelLinear does, for a weight [O/tp, I] that lives elsewhere."""
    multiply = _column_parallel if torch.is_grad_enabled() else _column_product
    return multiply(x, weight, sharding, ops)


class _ColumnParallel(torch.autograd.Function):
    """y = x W^T, with dx summed over tp while the weight gradient's product runs.

    With sequence parallel the gathered x is not kept for backward but gathered again.
    """

    @staticmethod
    def forward(ctx, x, weight, sharding, ops):
        ctx.sink = ready_sink(weight)
        ctx.sharding = sharding
        ctx.ops = ops
        ctx.save_for_backward(x, weight)
        if sharding.sequence_parallel:
            x = comm.start_gather_tokens(x, sharding.tp)()
        return ops.product(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x = x.detach()
        tp = ctx.sharding.tp
        dy = ctx.ops.operand(dy)
        # dx first, because others wait for its sum; that travels during the product for dW.
        if not ctx.sharding.sequence_parallel:
            dx = ctx.ops.input_gradient(dy, weight, x.dtype)
            summed = comm.start_all_reduce(dx, tp)
            dw = _weight_gradient(ctx, weight, dy, lambda: x)
            return summed.wait(), dw, None, None
        gather = partial(comm.start_gather_tokens, x, tp)
        if _is_held(ctx.sink):
            # A held product keeps the cut x alone, and gathers it when its turn comes.
            whole = lambda: gather()()  # noqa: E731
        else:
            whole = gather()  # under way during the next product
        dx = ctx.ops.input_gradient(dy, weight, x.dtype)
        summed = comm.start_reduce_tokens(dx, tp)
        dw = _weight_gradient(ctx, weight, dy, whole)
        return summed(), dw, None, None


class _RowParallel(torch.autograd.Function):
    """y = x W^T, summed over tp."""

    @staticmethod
    def forward(ctx, x, weight, sharding, ops):
        ctx.sink = ready_sink(weight)
        ctx.sharding = sharding
        ctx.ops = ops
        ctx.save_for_backward(x, weight)
        y = ops.product(x, weight)
        if sharding.sequence_parallel:
            return comm.start_reduce_tokens(y, sharding.tp)()
        return comm.all_reduce(y, sharding.tp)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x = x.detach()
        if ctx.sharding.sequence_parallel:
            dy = comm.start_gather_tokens(dy, ctx.sharding.tp)()
        dy = ctx.ops.operand(dy)
        dx = ctx.ops.input_gradient(dy, weight, x.dtype)
        return dx, _weight_gradient(ctx, weight, dy, lambda: x), None, None


@torch.compiler.disable
def _column_product(x: Tensor, weight: nn.Parameter, sharding: Sharding, ops: Ops) -> Tensor:
    """Compute _ColumnParallel where no gradient is wanted, without autograd's bookkeeping."""
    ready_sink(weight)
    if sharding.sequence_parallel:
        x = comm.start_gather_tokens(x, sharding.tp)()
    return ops.product(x, weight)


@torch.compiler.disable
def _row_product(x: Tensor, weight: nn.Parameter, sharding: Sharding, ops: Ops) -> Tensor:
    """Compute _RowParallel where no gradient is wanted, without autograd's bookkeeping."""
    ready_sink(weight)
    y = ops.product(x, weight)
    if sharding.sequence_parallel:
        return comm.start_reduce_tokens(y, sharding.tp)()
    return comm.all_reduce(y, sharding.tp)


# Wrapped once here rather than by a decorated function: that would be one more call per layer.
_column_parallel = torch.compiler.disable(_ColumnParallel.apply)
_row_parallel = torch.compiler.disable(_RowParallel.apply)


def _is_held(sink: Sink | None) -> bool:
    """Return whether the schedule holds weight-gradient products back at the moment."""
    return sink is not None and sink.owner.deferral.held is not None


def _weight_gradient(ctx, weight: Tensor, dy: Tensor, x: Callable[[], Tensor]) -> Tensor | None:
    """Bring dW = dy^T x to the sink, or return it to autograd where there is no sink.

    To the sink it goes at once or when the schedule says.

    ctx: of the autograd function, with its sink and ops.
    x: called for the layer's input when the product runs.
    """
    sink, ops = ctx.sink, ctx.ops
    if not weight.requires_grad:
        return None
    if sink is None:
        return ops.weight_gradient(dy, x(), weight.dtype)

    def product() -> None:
        whole = x()
        ops.add_weight_gradient_(sink.memory(), dy, whole)
        sink.wrote()

    sink.owner.deferral.run(product)
    return None
