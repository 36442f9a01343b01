"""Every op in plain PyTorch: what the kernels are tested against, and what runs where there is none. Only this package may import it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..config.sizes import ELEMENTS_IN_CACHE, LOGITS_IN_CACHE

_LOWEST = torch.finfo(
    torch.float32
).min  # in place of the -inf of a query that sees nothing: -inf less -inf is NaN


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H] over its root mean square, in fp32 (float64 stays), rounded to x's dtype before the weight [H]: as Llama does.

    Zhang and Sennrich 2019.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * x_hat.to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """See Ops.rope."""
    return _Rope.apply(x, _per_head(cos, x.dtype), _per_head(sin, x.dtype), interleaved)


class _Rope(torch.autograd.Function):
    """A rotation: its gradient is the rotation by the opposite angle. Autograd would pad each half of x with zeros and add them up."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin, ctx.interleaved), None, None, None


def _per_head(table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, R/2] -> [T, 1, R/2], [B, T, R/2] -> [B, T, 1, R/2]: the same angles for every head."""
    return table.to(dtype).unsqueeze(-2)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    half = cos.shape[-1]
    first, second = _pairs(x, half, interleaved)
    y = torch.empty_like(x)
    y_first, y_second = _pairs(y, half, interleaved)
    y_first.copy_(first * cos - second * sin)
    y_second.copy_(second * cos + first * sin)
    y[..., 2 * half :] = x[..., 2 * half :]
    return y


def _pairs(x: torch.Tensor, half: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two coordinates of each rotated plane, as views."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See Ops.layer_norm."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


_ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "squared_relu": lambda x: F.relu(x).square(),
}


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """f(x), elementwise."""
    return _ACTIVATIONS[kind](x)


def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """f(gate) * up for x [..., 2F], gate before up."""
    gate, up = x.chunk(2, dim=-1)
    return _ACTIVATIONS[kind](gate) * up


def cross_entropy_statistics(
    logits: torch.Tensor, column: torch.Tensor, real: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See Ops.cross_entropy_statistics."""
    highest, rest, target = (
        torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if real == 0:
        return highest.fill_(-torch.inf), rest, target
    for rows in _in_cache(logits):
        x, here = logits[rows, :real].float(), (column[rows] >= 0).unsqueeze(1)
        place = column[rows].clamp(min=0).unsqueeze(1)
        torch.amax(x, dim=1, out=highest[rows])
        target[rows] = torch.where(here, x.gather(1, place), 0.0).squeeze(1)
        terms = torch.exp(x - highest[rows].unsqueeze(1))
        rest[rows] = terms.scatter(1, place, torch.where(here, 0.0, terms.gather(1, place))).sum(
            dim=1
        )
    return highest, rest, target


def cross_entropy_gradient_(
    logits: torch.Tensor,
    column: torch.Tensor,
    highest: torch.Tensor,
    scale: torch.Tensor,
    target_gradient: torch.Tensor,
    real: int,
) -> None:
    """See Ops.cross_entropy_gradient_."""
    for rows in _in_cache(logits):
        counts, place = (scale[rows] != 0).unsqueeze(1), column[rows].clamp(min=0).unsqueeze(1)
        if real:
            x = torch.exp(logits[rows, :real].float() - highest[rows].unsqueeze(1)) * scale[
                rows
            ].unsqueeze(1)
            x.scatter_(
                1,
                place,
                torch.where(
                    (column[rows] >= 0).unsqueeze(1),
                    target_gradient[rows].unsqueeze(1),
                    x.gather(1, place),
                ),
            )
            logits[rows, :real] = torch.where(counts, x, 0.0).to(logits.dtype)
        logits[rows, real:] = 0


def _in_cache(logits: torch.Tensor) -> list[slice]:
    """Rows whose few elementwise passes stay in a CPU's cache; on a device all at once."""
    n, columns = logits.shape
    step = max(1, LOGITS_IN_CACHE // max(columns, 1)) if logits.device.type == "cpu" else max(n, 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def squared_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See Ops.squared_norm."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


def attention_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See Ops.attention_block. Every score is stored, in fp32 (float64 stays). A query that sees nothing gets o = 0 and lse = -inf."""
    scores, _ = _scores(q, k, causal, scale, softcap, mask)
    lse = scores.logsumexp(-1)
    o = torch.einsum(
        "bkgts,bskd->btkgd",
        (scores - lse.clamp(min=_LOWEST).unsqueeze(-1)).exp(),
        v.to(scores.dtype),
    )
    return o.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)


def attention_block_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """See Ops.attention_block_backward. With p = exp(score - lse) and dp = do v^T: ds = p (dp - do o), as in Dao 2023, section 3.1.

    The derivative of c tanh(s / c) is 1 - (capped / c)^2.
    """
    (scores, slope), heads = _scores(q, k, causal, scale, softcap, mask), (k.shape[2], -1)
    wide_q, wide_do, wide_o = (t.to(scores.dtype).unflatten(2, heads) for t in (q, do, o))
    p = (scores - lse.unflatten(1, heads).unsqueeze(-1)).exp()
    dp = torch.einsum("btkgd,bskd->bkgts", wide_do, v.to(p.dtype))
    ds = p * (dp - (wide_do * wide_o).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)) * _scale(q, scale)
    if slope is not None:
        ds = ds * slope
    dq = torch.einsum("bkgts,bskd->btkgd", ds, k.to(p.dtype)).flatten(2, 3)
    dk = torch.einsum("bkgts,btkgd->bskd", ds, wide_q)
    dv = torch.einsum("bkgts,btkgd->bskd", p, wide_do)
    return tuple(grad.to(q.dtype) for grad in (dq, dk, dv))


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, K, A/K, T, S]: grouped heads share a key head; -inf where a query does not see a key. With a softcap, also its derivative."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum(
        "btkgd,bskd->bkgts", q.to(wide).unflatten(2, (k.shape[2], -1)), k.to(wide)
    ) * _scale(q, scale)
    slope = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    if causal:
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return scores, slope


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def adamw_(
    masters,
    exp_avg,
    exp_avg_sq,
    grads,
    weights,
    *,
    step_size,
    root_correction,
    grad_scale,
    skip,
    lr_decay,
    beta1,
    beta2,
    eps,
) -> None:
    """One update in place of flat buffers of one size, fp32 but for weights, which may be masters itself.

    step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t), grad_scale: 0-d fp32; skip: 0-d bool.
    lr_decay = 1 - lr * weight_decay. Loshchilov and Hutter 2019.
    """
    chunk = ELEMENTS_IN_CACHE if masters.device.type == "cpu" else max(1, masters.numel())
    for start in range(0, masters.numel(), chunk):
        p, m, v, g, w = (
            buffer[start : start + chunk]
            for buffer in (masters, exp_avg, exp_avg_sq, grads, weights)
        )
        g = g * grad_scale
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (v * beta2).addcmul_(g, g, value=1 - beta2)
        update = (new_m * step_size).div_((new_v.sqrt() / root_correction).add_(eps))
        new_p = (p * lr_decay).sub_(update)
        # Selected, never multiplied by zero: 0 x NaN is NaN.
        torch.where(skip, w, new_p.to(w.dtype), out=w)
        torch.where(skip, m, new_m, out=m)
        torch.where(skip, v, new_v, out=v)
        if weights.data_ptr() != masters.data_ptr():
            torch.where(skip, p, new_p, out=p)
