"""The head and its cross-entropy, by chunks of tokens: neither the logits of a micro-batch nor those of another rank are ever held whole."""

from contextlib import nullcontext

import torch
from torch import nn

from .. import comm
from ..config.sizes import LOGITS_AT_A_TIME
from ..gradients import Sink, add_product, current, sink_of
from ..ops import Ops
from .sharding import Sharding


def head_loss(
    x: torch.Tensor,
    weight: nn.Parameter,
    labels: torch.Tensor,
    weights: torch.Tensor,
    vocab_size: int,
    sharding: Sharding,
    ops: Ops,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over all labels of weights * loss, 0-d fp32, and the losses, fp32 [B, T], without a gradient.

    x [B, T, H], or [B, T/tp, H] with sequence parallel; weight [V/tp, H] (V padded); labels int64 and weights fp32, [B, T], on every rank
    of tp. softcap c: logits are c tanh(logit / c). Columns past `vocab_size` are padding. A label of weight 0 adds nothing to the sum and
    no gradient, whatever its logits.

    The gradients are computed here, while the logits of a chunk are at hand, and that of the weight goes to its sink at once: backward
    must start from the sum itself. Shoeybi et al. 2019, section 3 (over tp); Hsu et al. 2024, section 3.2 (in chunks).
    """
    return _HeadLoss.apply(
        x,
        current(weight),
        sink_of(weight),
        labels,
        weights,
        vocab_size,
        sharding,
        ops,
        softcap,
        torch.is_grad_enabled(),
    )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, sink, labels, weights, vocab_size, sharding, ops, softcap, learns):
        tp = sharding.tp
        whole = comm.start_gather_tokens(x, tp)() if sharding.sequence_parallel else x
        flat, table = ops.operand(whole.flatten(0, -2)), ops.operand(weight)
        first = tp.rank * table.shape[0]
        real = min(
            max(vocab_size - first, 0), table.shape[0]
        )  # columns of this rank that are no padding
        shape, labels, weights = labels.shape, labels.flatten(), weights.flatten().float()
        column = torch.where((labels >= first) & (labels < first + real), labels - first, -1)
        losses, dx = torch.empty_like(weights), torch.empty_like(flat) if learns else None
        with _gradient_memory(weight, sink if learns else None, learns) as dw:
            for rows, logits in _logits_of(flat, table):
                slope = _cap_(logits, softcap, learns) if softcap is not None else None
                parts = ops.cross_entropy_statistics(logits, column[rows], real)
                highest, rest, target = _over(tp, *parts)
                label = torch.exp(target - highest)  # of the sum of exponentials, the label's term
                total = rest + label
                losses[rows] = torch.where(
                    label > 0.1, torch.log1p(rest / label), torch.log(total) + (highest - target)
                )
                if learns:
                    scale = torch.where(weights[rows] != 0, weights[rows] / total, 0.0)
                    ops.cross_entropy_gradient_(
                        logits, column[rows], highest, scale, -rest * scale, real
                    )
                    if slope is not None:
                        logits.mul_(slope)
                    torch.mm(logits, table, out=dx[rows])
                    if dw is not None:
                        add_product(dw, logits, flat[rows])
        if learns:
            dx = dx.to(x.dtype).view_as(whole)
            dx = (
                comm.start_reduce_tokens(dx, tp)()
                if sharding.sequence_parallel
                else comm.all_reduce(dx, tp)
            )
            ctx.save_for_backward(
                dx, dw.to(weight.dtype) if sink is None and dw is not None else None
            )
        ctx.sink = sink
        total, losses = torch.where(weights != 0, weights * losses, 0.0).sum(), losses.view(shape)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        if ctx.sink is not None:
            torch._assert_async(
                grad == 1
            )  # the weight's gradient is where it belongs, and cannot be scaled any more
            return dx, *(None,) * 9
        return dx * grad.to(dx.dtype), None if dw is None else dw * grad.to(dw.dtype), *(None,) * 8


def _gradient_memory(weight: torch.Tensor, sink: Sink | None, learns: bool):
    """Where dW adds up over the chunks, in fp32: a context, of None where there is none to compute."""
    if sink is not None:
        return sink.opened()
    return nullcontext(
        torch.zeros(weight.shape, device=weight.device) if learns and weight.requires_grad else None
    )


def _logits_of(flat: torch.Tensor, table: torch.Tensor):
    """The rows of each chunk and their logits, in memory that the next chunk overwrites."""
    tokens, columns = flat.shape[0], table.shape[0]
    at_a_time = LOGITS_AT_A_TIME["cpu" if flat.device.type == "cpu" else "gpu"]
    step = min(max(1, at_a_time // columns), max(tokens, 1))
    memory = flat.new_empty(step, columns)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        yield rows, torch.mm(flat[rows], table.t(), out=memory[: rows.stop - start])


def _cap_(logits: torch.Tensor, softcap: float, learns: bool) -> torch.Tensor | None:
    """c tanh(logit / c) over the logits; its derivative 1 - tanh^2."""
    logits.div_(softcap).tanh_()
    slope = 1 - logits.float().square() if learns else None
    logits.mul_(softcap)
    return slope


def _over(
    tp, highest: torch.Tensor, rest: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Ops.cross_entropy_statistics of one rank's columns -> of all columns. The label stands on one rank, its logit is 0 on the others."""
    top = comm.all_reduce(highest.clone(), tp, "max")
    rest, target = comm.all_reduce(torch.stack([rest * torch.exp(highest - top), target]), tp)
    return top, rest, target
