"""Communication over an Axis: collectives and messages, differentiable ones, and their failures.

Every function is the identity at size 1, so no caller asks for the size. A function called
`start_x` returns when x is under way, as a `Pending` whose `wait` gives the result.

A failure names the rank, the operation and the ranks it was with: on its own the transport only
says that something timed out.

Letters: B batch, T tokens, H hidden; size is that of the axis.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from .mesh import Axis

Result = TypeVar("Result")

# torch 2.13 renamed both and warns of the names that 2.10 to 2.12 have.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# What the transport says, as a pattern, and what it means for the user.
_MEANINGS = (
    (
        "by peer|[Bb]roken pipe|remote process exited",
        "another rank is gone, and its own message says why",
    ),
    (
        "[Tt]imed ?out|[Tt]imeout",
        "a rank hangs or the network is cut;"
        " if it is only slow, raise --distributed-timeout-minutes",
    ),
)
_LONGEST = 300  # letters of what the transport said


class CommunicationError(RuntimeError):
    """A collective or a message that did not complete.

    It says which one, on which rank, with whom, and what the transport said.
    """


@dataclass
class Pending:
    """Communication under way.

    buffers: must not be touched before `wait`, and are kept alive until then.
    axis, operation: for the error, if it fails; `work` is None where nothing is to be waited for.
    """

    result: torch.Tensor
    axis: Axis | None = None
    operation: str = ""
    work: dist.Work | None = None
    buffers: tuple[torch.Tensor, ...] = ()

    def wait(self) -> torch.Tensor:
        """Return the result, once it is there. Waiting again is free."""
        if self.work is not None and self.axis is not None:
            guarded(self.axis, self.operation, self.work.wait)
            self.work = None
            self.buffers = ()
        return self.result


def all_reduce(tensor: torch.Tensor, axis: Axis, op: str = "sum") -> torch.Tensor:
    """Reduce `tensor` in place over `axis` with sum, max or min, and return it."""
    return start_all_reduce(tensor, axis, op).wait()


def start_all_reduce(tensor: torch.Tensor, axis: Axis, op: str = "sum") -> Pending:
    """Start all_reduce."""
    if axis.size == 1:
        return Pending(tensor)
    reduction = _OPERATIONS[op]
    return _start(
        axis,
        "all-reduce",
        tensor,
        lambda: dist.all_reduce(tensor, op=reduction, group=axis.group, async_op=True),
        tensor,
    )


def start_reduce_scatter(tensor: torch.Tensor, axis: Axis) -> Pending:
    """Start the sum of `tensor` [size * n, ...] over `axis`, of which each rank gets n rows.

    The result is this rank's n rows of the sum, in their own place in `tensor`. The other rows hold
    nothing useful afterwards.
    """
    if axis.size == 1:
        return Pending(tensor)
    own = own_slice(tensor, axis)
    return _start(
        axis,
        "reduce-scatter",
        own,
        lambda: _reduce_scatter(own, tensor, group=axis.group, async_op=True),
        tensor,
    )


def start_all_gather(tensor: torch.Tensor, axis: Axis) -> Pending:
    """Start to fill `tensor` [size * n, ...] with the n rows that each rank has in their place."""
    if axis.size == 1:
        return Pending(tensor)
    own = own_slice(tensor, axis)
    return _start(
        axis,
        "all-gather",
        tensor,
        lambda: _all_gather(tensor, own, group=axis.group, async_op=True),
        tensor,
    )


def all_to_all(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Exchange slices of x [size, ...]: slice i of the result came from rank i of `axis`."""
    if axis.size == 1:
        return x
    x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _start(
        axis,
        "all-to-all",
        y,
        lambda: dist.all_to_all_single(y, x, group=axis.group, async_op=True),
        x,
    ).wait()


def start_send(tensor: torch.Tensor, axis: Axis, to: int) -> Pending:
    """Start to send a contiguous `tensor` to rank `to` of `axis`, another than this one."""
    peer = axis.ranks[to]
    return _start(
        axis,
        f"send to rank {peer}",
        tensor,
        lambda: dist.isend(tensor, dst=peer, group=axis.group),
        tensor,
    )


def start_receive(buffer: torch.Tensor, axis: Axis, source: int) -> Pending:
    """Start to receive into `buffer` what rank `source` of `axis` sends."""
    peer = axis.ranks[source]
    return _start(
        axis,
        f"receive from rank {peer}",
        buffer,
        lambda: dist.irecv(buffer, src=peer, group=axis.group),
        buffer,
    )


def own_slice(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return this rank's rows of a tensor [size * n, ...] that is cut over `axis`: a view."""
    rows = tensor.shape[0] // axis.size
    return tensor[axis.rank * rows : (axis.rank + 1) * rows]


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return x unchanged; its gradient is summed over `axis`.

    The way into a column-parallel layer (Shoeybi et al. 2019, f).
    """
    return _CopyTo.apply(x, axis) if axis.size > 1 else x


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return x summed over `axis`; its gradient is unchanged.

    The way out of a row-parallel layer (Shoeybi et al. 2019, g).
    """
    return _ReduceFrom.apply(x, axis) if axis.size > 1 else x


def gather_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Gather [B, T/size, H] to [B, T, H] on every rank; the gradient is summed and cut again.

    Korthikanti et al. 2022, g.
    """
    return _GatherTokens.apply(x, axis) if axis.size > 1 else x


def reduce_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum [B, T, H] over `axis` and keep this rank's [B, T/size, H]; the gradient is gathered.

    Korthikanti et al. 2022, g bar.
    """
    return _ReduceTokens.apply(x, axis) if axis.size > 1 else x


def start_gather_tokens(x: torch.Tensor, axis: Axis) -> Callable[[], torch.Tensor]:
    """Start to gather [B, T/size, H] to [B, T, H]; call what is returned for the result."""
    if axis.size == 1:
        return lambda: x
    whole = x.new_empty(axis.size, *x.shape)
    whole[axis.rank] = x
    pending = start_all_gather(whole, axis)
    # [size, B, T/size, H] -> [B, T, H]: ranks hold consecutive tokens.
    return lambda: pending.wait().transpose(0, 1).flatten(1, 2)


def start_reduce_tokens(x: torch.Tensor, axis: Axis) -> Callable[[], torch.Tensor]:
    """Start the sum of [B, T, H] over `axis`, of which this rank keeps [B, T/size, H].

    Call what is returned for the result. x may be overwritten.
    """
    if axis.size == 1:
        return lambda: x
    # The collective cuts the first dim, so the slices of T go there: [size, B, T/size, H].
    slices = x.unflatten(1, (axis.size, -1)).transpose(0, 1).contiguous()
    pending = start_reduce_scatter(slices, axis)
    return lambda: pending.wait()[0].clone()  # a view would keep all T tokens in memory


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        # A copy, because all_reduce works in place and autograd may hand grad to others too.
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return start_gather_tokens(x, axis)()

    @staticmethod
    def backward(ctx, grad):
        return start_reduce_tokens(grad.contiguous().clone(), ctx.axis)(), None


class _ReduceTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return start_reduce_tokens(x.contiguous().clone(), axis)()

    @staticmethod
    def backward(ctx, grad):
        return start_gather_tokens(grad, ctx.axis)(), None


def _start(
    axis: Axis,
    operation: str,
    result: torch.Tensor,
    begin: Callable[[], dist.Work | None],
    *buffers: torch.Tensor,
) -> Pending:
    return Pending(result, axis, operation, guarded(axis, operation, begin), buffers)


def guarded(axis: Axis, operation: str, call: Callable[[], Result]) -> Result:
    """Return call(); raise its failure as a CommunicationError.

    Also for operations that another library starts over `axis`.
    """
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        me = axis.ranks[axis.rank]
        others = ", ".join(map(str, axis.ranks[:16]))
        more = ", ..." if axis.size > 16 else ""
        what = f"rank {me}: {operation} over {axis.name} (ranks {others}{more})"
        raise CommunicationError(f"{what} failed: {_explained(str(error))}") from error


def _explained(said: str) -> str:
    """Return what the transport said, in one line of at most 300 letters.

    It ends with what that means for the user, if it is known.
    """
    line = " ".join(said.split())
    line = re.sub(r"\[/\S+:\d+\] ", "", line)  # gloo's source lines
    line = line.split(". This is typically")[0]  # and guesses
    meaning = ""
    for pattern, words in _MEANINGS:
        if re.search(pattern, line):
            meaning = f"; {words}"
            break
    return line[: _LONGEST - len(meaning)] + meaning
