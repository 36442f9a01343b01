"""Cross-entropy over a vocabulary cut over an axis: no rank ever sees the logits of another."""

import torch

from .. import comm
from ..mesh import Axis

_ROWS_IN_CACHE = 1 << 18  # logits handled at a time on the CPU: 1 MB in fp32


def vocab_parallel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp: Axis) -> torch.Tensor:
    """Loss of every token, fp32 [N], for logits [N, V/tp] (V padded) and labels int64 [N] in the whole vocabulary.

    Columns past `vocab_size` are padding: left out of the maximum and the sum, with zero gradient. The backward pass writes
    the gradient over `logits`, which must not be used afterwards. Shoeybi et al. 2019, section 3; probability minus one in fp32,
    rounded once.
    """
    return _CrossEntropy.apply(logits, labels, vocab_size, tp)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, vocab_size, tp):
        local = logits.shape[1]
        first = tp.rank * local
        real = min(max(vocab_size - first, 0), local)  # columns of this rank that are no padding
        here = (labels >= first) & (labels < first + real)
        column = (labels - first).masked_fill(~here, 0).unsqueeze(1)
        highest, total, target = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3))
        for rows in _chunks(logits):
            _local_sums(logits[rows, :real], column[rows], highest[rows], total[rows], target[rows])
        global_highest = comm.all_reduce(highest.clone(), tp, "max")
        total = comm.all_reduce(total * torch.exp(highest - global_highest), tp)
        target = comm.all_reduce(target.masked_fill(~here, 0.0), tp)
        log_total = global_highest + torch.log(total)
        ctx.save_for_backward(logits, column, here, log_total)
        ctx.real = real
        return log_total - target

    @staticmethod
    def backward(ctx, grad):
        logits, column, here, log_total = ctx.saved_tensors
        for rows in _chunks(logits):
            _write_gradient(logits[rows], column[rows], here[rows], log_total[rows], grad[rows], ctx.real)
        return logits, None, None, None


def _local_sums(logits, column, highest, total, target) -> None:
    """Maximum, sum of exponentials under it, and the target's logit, of this rank's columns [n, real]."""
    if logits.shape[1] == 0:
        highest.fill_(-torch.inf), total.zero_(), target.zero_()
        return
    x = logits.float()
    torch.amax(x, dim=1, out=highest)
    target.copy_(x.gather(1, column).squeeze(1))
    total.copy_(torch.exp(x - highest.unsqueeze(1)).sum(dim=1))


def _write_gradient(logits, column, here, log_total, grad, real) -> None:
    """(softmax - onehot) * grad over the logits, in place; zero in the padding. The loss scale in `grad` comes in before the rounding to fp16."""
    x = torch.exp(logits[:, :real].float() - log_total.unsqueeze(1))
    if real:
        x.scatter_(1, column, x.gather(1, column) - here.unsqueeze(1).to(x.dtype))
    logits[:, :real] = x * grad.unsqueeze(1)
    logits[:, real:] = 0


def _chunks(logits: torch.Tensor) -> list[slice]:
    n, columns = logits.shape
    step = max(1, _ROWS_IN_CACHE // columns) if logits.device.type == "cpu" else max(n, 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
