"""The head and its cross-entropy, by chunks of tokens: a micro-batch's logits are never held whole.

Logits of a large vocabulary are the largest tensor of a model: 8,192 tokens x 128,256 words are
4 GB in fp32. So they are computed a chunk of tokens at a time, into memory that the next chunk
overwrites, and everything that needs them happens while they are at hand: the loss, their gradient
(which takes their place), the gradient of x and that of the weight.

For one token with logits z_j over the words j, label y and weight w:

    m    = max_j z_j                              highest
    s    = sum over j != y of exp(z_j - m)        rest: without the label's own term
    e    = exp(z_y - m)                           label: the label's term
    loss = -log(e / (s + e)) = log(1 + s / e)
    dz_j = w exp(z_j - m) / (s + e)               for j != y
    dz_y = w (e / (s + e) - 1) = -w s / (s + e)

The label's term is kept apart because of certain labels. With e / (s + e) = 1 - 4e-9 a rounded
probability is 1, and loss and gradient would be 0 or wrong in their first digit; s / e and
-w s / (s + e) keep all digits.

The vocabulary is cut over tp: each rank has its own m, s and z_y, from which those of the whole
follow by one maximum and one sum (Shoeybi et al. 2019, section 3). In chunks: Hsu et al. 2024,
section 3.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import comm
from ..config.sizes import LOGITS_AT_A_TIME
from ..gradients import Sink, ready_sink
from ..mesh import Axis
from ..ops import Ops
from .sharding import Sharding


@dataclass(frozen=True)
class _Task:
    """The inputs of the head's loss beside x and the weight.

    labels: int64, flat; weights: fp32, flat. Both cover all tokens of the micro-batch.
    learns: gradients are wanted.
    """

    labels: Tensor
    weights: Tensor
    vocab_size: int
    sharding: Sharding
    ops: Ops
    softcap: float | None
    learns: bool


def head_loss(
    x: Tensor,
    weight: nn.Parameter,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    sharding: Sharding,
    ops: Ops,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the logits' cross-entropy with the labels.

    Returns the sum over all labels of weights * loss, 0-d fp32, and the losses, fp32 [B, T], which
    have no gradient.

    The gradients are computed here, while the logits of a chunk are at hand, and that of the weight
    goes to its sink at once: backward must start from the sum itself, unscaled.

    x: [B, T, H], or [B, T/tp, H] with sequence parallel.
    weight: [V/tp, H], V padded.
    labels: int64 [B, T], the same on every rank of tp.
    weights: fp32 [B, T], likewise. A label of weight 0 adds nothing to the sum and has no gradient,
        whatever its logits.
    vocab_size: columns from here on are padding.
    softcap: c, for logits of c tanh(logit / c).
    """
    learns = torch.is_grad_enabled()
    flat_weights = weights.flatten().float()
    task = _Task(labels.flatten(), flat_weights, vocab_size, sharding, ops, softcap, learns)
    total, losses = _HeadLoss.apply(x, weight, task)
    return total, losses.view(labels.shape)


class _HeadLoss(torch.autograd.Function):
    """Computes the loss and, in the same pass over the logits, both gradients."""

    @staticmethod
    def forward(ctx, x, weight, task):
        tp, ops = task.sharding.tp, task.ops
        sink = ready_sink(weight)
        whole = comm.start_gather_tokens(x, tp)() if task.sharding.sequence_parallel else x
        # Widened once for all chunks, where 16-bit numbers are multiplied in fp32.
        flat = ops.operand(whole.flatten(0, -2))
        table = ops.operand(weight)
        losses = torch.empty_like(task.weights)
        dx = torch.empty_like(flat) if task.learns else None
        dw = _gradient_memory(weight, sink) if task.learns else None
        columns = _own_columns(task, table.shape[0])

        for rows, logits in _logits_of(flat, table, ops):
            slope = _cap_(logits, task.softcap, task.learns)
            # Statistics: of this rank's columns, then of all columns of tp.
            column = columns.of_label[rows]
            own = ops.cross_entropy_statistics(logits, column, columns.real)
            highest, rest, target = _over(tp, *own)
            # Loss: log1p(s / e), or the sum of logarithms where e is so small that s / e overflows.
            label = torch.exp(target - highest)
            total = rest + label
            far = torch.log(total) + (highest - target)
            losses[rows] = torch.where(label > 0.1, torch.log1p(rest / label), far)
            if not task.learns:
                continue
            # Gradient of the logits, in their place: w exp(z - m) / (s + e), and -w s / (s + e).
            weight_of = task.weights[rows]
            scale = torch.where(weight_of != 0, weight_of / total, 0.0)
            ops.cross_entropy_gradient_(logits, column, highest, scale, -rest * scale, columns.real)
            if slope is not None:
                logits.mul_(slope)
            # dx = dlogits W, dW += dlogits^T x.
            ops.input_gradient_into(dx[rows], logits, table)
            if dw is not None:
                ops.add_weight_gradient_(dw, logits, flat[rows])

        ctx.sink = sink
        if task.learns:
            if sink is not None:
                sink.wrote()
                dw = None
            dx = dx.to(x.dtype).view_as(whole)
            dx = _sum_over_tp(dx, task.sharding)
            ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return torch.where(task.weights != 0, task.weights * losses, 0.0).sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        if ctx.sink is not None:
            # The weight's gradient is where it belongs, and cannot be scaled any more.
            torch._assert_async(grad == 1)
            return dx, None, None
        dw = None if dw is None else dw * grad.to(dw.dtype)
        return dx * grad.to(dx.dtype), dw, None


def _sum_over_tp(dx: Tensor, sharding: Sharding) -> Tensor:
    """Sum what each rank's columns contribute to the gradient of x [B, T, H]."""
    if sharding.sequence_parallel:
        return comm.start_reduce_tokens(dx, sharding.tp)()
    return comm.all_reduce(dx, sharding.tp)


def _gradient_memory(weight: Tensor, sink: Sink | None) -> Tensor | None:
    """Return the fp32 memory in which dW adds up over the chunks; None where it is not wanted."""
    if sink is not None:
        return sink.memory()
    return torch.zeros(weight.shape, device=weight.device) if weight.requires_grad else None


class _Columns(NamedTuple):
    """This rank's columns of the vocabulary.

    real: how many of them are no padding.
    of_label: int64, flat, the column in which each label stands, -1 where it is another rank's.
    """

    real: int
    of_label: Tensor


def _own_columns(task: _Task, count: int) -> _Columns:
    first = task.sharding.tp.rank * count
    real = min(max(task.vocab_size - first, 0), count)
    here = (task.labels >= first) & (task.labels < first + real)
    return _Columns(real, torch.where(here, task.labels - first, -1))


def _logits_of(flat: Tensor, table: Tensor, ops: Ops) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each chunk and their logits, in memory that the next chunk overwrites."""
    tokens, columns = flat.shape[0], table.shape[0]
    at_a_time = LOGITS_AT_A_TIME["cpu" if flat.device.type == "cpu" else "gpu"]
    step = min(max(1, at_a_time // columns), max(tokens, 1))
    memory = flat.new_empty(step, columns)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        yield rows, ops.product_into(memory[: rows.stop - start], flat[rows], table)


def _cap_(logits: Tensor, softcap: float | None, learns: bool) -> Tensor | None:
    """Replace the logits by c tanh(logit / c); return its derivative 1 - tanh^2 if it learns."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.float().square() if learns else None
    logits.mul_(softcap)
    return slope


def _over(tp: Axis, highest: Tensor, rest: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the statistics of one rank's columns into those of all columns.

    m = max over ranks of m_r,  s = sum over ranks of s_r exp(m_r - m).  The label stands on one
    rank, and its logit is 0 on the others.
    """
    top = comm.all_reduce(highest.clone(), tp, "max")
    rest, target = comm.all_reduce(torch.stack([rest * torch.exp(highest - top), target]), tp)
    return top, rest, target
