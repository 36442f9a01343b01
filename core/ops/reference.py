"""Every op in plain PyTorch, with its contract: what the kernels are tested against.

It is also what runs where there is no kernel. The other implementations, `cpu` and `triton`, have
functions of the same names that follow the contracts written here. Letters: B batch, T tokens,
H hidden, F feed-forward, A heads, K key-value heads, D head size, N rows of a flat batch.
Reached through Ops alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.sizes import ELEMENTS_IN_CACHE, LOGITS_IN_CACHE

# Stands in for the -inf of a query that sees nothing: -inf less -inf would be NaN.
_LOWEST = torch.finfo(torch.float32).min

Tensors3 = tuple[Tensor, Tensor, Tensor]


# --- norms ---


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide x by its root mean square and scale it (Zhang and Sennrich 2019).

    The division is done in fp32 (float64 stays) and rounded to x's dtype before the weight, as
    Llama does it.

    x: [..., H].
    weight: [H], cast to x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(-1, keepdim=True)
    inverse = torch.rsqrt(mean_square + eps)
    x_hat = (wide * inverse).to(x.dtype)
    return weight.to(x.dtype) * x_hat


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + branch and the rms_norm of it; kernels do both in one pass over memory."""
    total = x + branch
    return total, rms_norm(total, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Bring x [..., H] to mean 0 and variance 1, then apply weight and bias [H] in x's dtype."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return x + branch and the layer_norm of it; kernels do both in one pass over memory."""
    total = x + branch
    return total, layer_norm(total, weight, bias, eps)


# --- rotary positions ---


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first R of the D dims of every head (Su et al. 2021, section 3.4).

    Here cos and sin are cast to x's dtype, as Hugging Face does; kernels leave them in fp32 and
    round once.

    x: [B, T, A, D].
    cos, sin: of the angles, [T, R/2] or [B, T, R/2].
    interleaved: dim 2i turns with dim 2i + 1; else dim i with dim i + R/2, as in Llama.
    """
    cos = _per_head(cos, x.dtype)
    sin = _per_head(sin, x.dtype)
    return _Rope.apply(x, cos, sin, interleaved)


def split_heads(
    heads: Tensor,
    sizes: tuple[int, int, int],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
) -> Tensors3:
    """Split packed heads into q, k and v, with q and k under rope.

    heads: [B, T, A + 2K, D]. A kernel may overwrite it, so nothing else may read it afterwards.
    sizes: (A, K, K).
    cos, sin, interleaved: as for rope.
    """
    q, k, v = heads.split(sizes, dim=2)
    q = rope(q, cos, sin, interleaved)
    k = rope(k, cos, sin, interleaved)
    return q, k, v


class _Rope(torch.autograd.Function):
    """A rotation, whose gradient is the rotation by the opposite angle.

    Autograd's own gradient would pad each half of x with zeros and add the two up.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin, ctx.interleaved), None, None, None


def _per_head(table: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, R/2] -> [T, 1, R/2], [B, T, R/2] -> [B, T, 1, R/2]: the same angles for every head."""
    return table.to(dtype).unsqueeze(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    first, second = _pairs(x, half, interleaved)
    y = torch.empty_like(x)
    y_first, y_second = _pairs(y, half, interleaved)
    y_first.copy_(first * cos - second * sin)
    y_second.copy_(second * cos + first * sin)
    rotated = 2 * half
    y[..., rotated:] = x[..., rotated:]
    return y


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the two coordinates of each rotated plane."""
    rotated = x[..., : 2 * half]
    if interleaved:
        return rotated[..., 0::2], rotated[..., 1::2]
    return rotated[..., :half], rotated[..., half:]


# --- activations ---


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Every kind of activation there is. A kind that a kernel lacks runs here, on any --kernels.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": _gelu_tanh,  # GPT-2 and Megatron's fused kernel (Hendrycks and Gimpel 2016)
    "gelu_erf": F.gelu,  # the same by the error function
    "squared_relu": _squared_relu,  # max(x, 0)^2 (So et al. 2021)
}


def activation(x: Tensor, kind: str) -> Tensor:
    """Apply the function ACTIVATIONS[kind] to every element."""
    return ACTIVATIONS[kind](x)


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """Compute f(gate) * up for x [..., 2F], gate before up: [..., F].

    SwiGLU is kind silu, GEGLU either GELU (Shazeer 2020).
    """
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * up


# --- products of few rows, steps of a block ---


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T for few rows, where reading the weight is nearly all the work.

    x: [..., I].
    weight: [O, I] of x's dtype.
    """
    return F.linear(x, weight)


def block_step(shape: object, weights: Sequence[Tensor | None], sequences: int) -> None:
    """Return None: plain PyTorch runs a block op by op. See cpu.block_step."""
    return None


# --- cross-entropy ---


@torch.no_grad()
def cross_entropy_statistics(logits: Tensor, column: Tensor, real: int) -> Tensors3:
    """Compute what the loss and its gradient are made of, from some columns of the logits.

    Returns, each fp32 [N]: the maximum (-inf where real is 0); the sum of exp(logit - maximum) over
    all columns but the label's; the label's logit (0 where the label is not here). The label's own
    term is kept out of the sum so that a probability near 1 keeps its distance from 1.

    logits: [N, C]; the first `real` columns count, the others are padding.
    column: int64 [N], where the label stands, -1 where it is not among these columns.
    """
    rows_in_all, _ = logits.shape
    highest = torch.zeros(rows_in_all, dtype=torch.float32, device=logits.device)
    rest = torch.zeros_like(highest)
    target = torch.zeros_like(highest)
    if real == 0:
        return highest.fill_(-torch.inf), rest, target
    for rows in _in_cache(logits):
        x = logits[rows, :real].float()
        here = (column[rows] >= 0).unsqueeze(1)
        place = column[rows].clamp(min=0).unsqueeze(1)
        torch.amax(x, dim=1, out=highest[rows])
        of_label = torch.where(here, x.gather(1, place), 0.0)
        target[rows] = of_label.squeeze(1)
        terms = torch.exp(x - highest[rows].unsqueeze(1))
        without_label = torch.where(here, 0.0, terms.gather(1, place))
        rest[rows] = terms.scatter(1, place, without_label).sum(dim=1)
    return highest, rest, target


@torch.no_grad()
def cross_entropy_gradient_(
    logits: Tensor,
    column: Tensor,
    highest: Tensor,
    scale: Tensor,
    target_gradient: Tensor,
    real: int,
) -> None:
    """Overwrite the logits with their gradient: exp(logit - highest) * scale, rounded once.

    Padding columns become zero, and so do whole rows of scale 0, whatever the logits hold.

    logits, column, real: as for cross_entropy_statistics.
    highest, scale: fp32 [N].
    target_gradient: fp32 [N], what stands in the label's column instead.
    """
    for rows in _in_cache(logits):
        counts = (scale[rows] != 0).unsqueeze(1)
        if real:
            here = (column[rows] >= 0).unsqueeze(1)
            place = column[rows].clamp(min=0).unsqueeze(1)
            x = torch.exp(logits[rows, :real].float() - highest[rows].unsqueeze(1))
            x = x * scale[rows].unsqueeze(1)
            of_label = target_gradient[rows].unsqueeze(1)
            x.scatter_(1, place, torch.where(here, of_label, x.gather(1, place)))
            logits[rows, :real] = torch.where(counts, x, 0.0).to(logits.dtype)
        logits[rows, real:] = 0


def _in_cache(logits: Tensor) -> list[slice]:
    """Return slices of rows whose elementwise passes stay in a CPU's cache; on a device, one."""
    n, columns = logits.shape
    step = max(n, 1)
    if logits.device.type == "cpu":
        step = max(1, LOGITS_IN_CACHE // max(columns, 1))
    starts = range(0, n, step)
    return [slice(start, min(start + step, n)) for start in starts]


# --- attention in blocks ---


def attention_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute AttentionOps.attention_block, storing every score in fp32 (float64 stays).

    A query that sees nothing gets o = 0 and lse = -inf.
    """
    scores, _ = _scores(q, k, causal, scale, softcap, mask)
    lse = scores.logsumexp(-1)
    finite = lse.clamp(min=_LOWEST)
    weights = (scores - finite.unsqueeze(-1)).exp()
    o = torch.einsum("bkgts,bskd->btkgd", weights, v.to(scores.dtype))
    o = o.flatten(2, 3).to(q.dtype)
    return o, lse.flatten(1, 2)


def attention_block_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute AttentionOps.attention_block_backward (Dao 2023, section 3.1).

    With p = exp(score - lse) and dp = do v^T:  ds = p (dp - do o),  dq = ds k,  dk = ds^T q,
    dv = p^T do.  A softcap multiplies ds by the derivative of c tanh(s / c), 1 - (capped / c)^2.
    """
    scores, slope = _scores(q, k, causal, scale, softcap, mask)
    heads = (k.shape[2], -1)
    wide = scores.dtype
    wide_q = q.to(wide).unflatten(2, heads)
    wide_do = do.to(wide).unflatten(2, heads)
    wide_o = o.to(wide).unflatten(2, heads)
    grouped_lse = lse.unflatten(1, heads)
    p = (scores - grouped_lse.unsqueeze(-1)).exp()
    dp = torch.einsum("btkgd,bskd->bkgts", wide_do, v.to(wide))
    do_times_o = (wide_do * wide_o).sum(-1)
    do_times_o = do_times_o.permute(0, 2, 3, 1).unsqueeze(-1)
    ds = p * (dp - do_times_o) * _scale(q, scale)
    if slope is not None:
        ds = ds * slope
    dq = torch.einsum("bkgts,bskd->btkgd", ds, k.to(wide)).flatten(2, 3)
    dk = torch.einsum("bkgts,btkgd->bskd", ds, wide_q)
    dv = torch.einsum("bkgts,btkgd->bskd", p, wide_do)
    return tuple(gradient.to(q.dtype) for gradient in (dq, dk, dv))


def _scores(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the scores [B, K, A/K, T, S], and with a softcap its derivative.

    A/K query heads share a key head. A score is -inf where the query does not see the key.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(wide))
    scores = scores * _scale(q, scale)
    slope = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores = softcap * tanh
        slope = 1 - tanh.square()
    if causal:
        square = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(square.triu(1), -torch.inf)
    if mask is not None:
        hidden = ~mask[:, None, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, slope


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


# --- the optimizer's passes over flat memory ---


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared 2-norm of contiguous fp32 tensors together, 0-d fp64 on their device."""
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return norms.double().square().sum()


@dataclass(frozen=True)
class AdamWTerms:
    """The numbers of one AdamW update, made once for all its buffers.

    The tensors are 0-d and live on the buffers' device, so that the host waits for none of them.

    step_size: lr / (1 - beta1^t) at update t, fp32.
    root_correction: sqrt(1 - beta2^t), fp32.
    grad_scale: what the gradients are multiplied with, fp32.
    skip: bool; where true nothing changes, whatever the gradients hold.
    lr_decay: 1 - lr * weight_decay.
    """

    step_size: Tensor
    root_correction: Tensor
    grad_scale: Tensor
    skip: Tensor
    lr_decay: float
    beta1: float
    beta2: float
    eps: float


@torch.no_grad()
def adamw_(
    masters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Tensor,
    weights: Tensor,
    terms: AdamWTerms,
) -> None:
    """Update flat buffers in place by AdamW (Loshchilov and Hutter 2019), as torch.optim.AdamW.

    With g = grads * grad_scale:
        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,
        p = p * lr_decay - step_size * m / (sqrt(v) / root_correction + eps).

    masters, exp_avg, exp_avg_sq: p, m and v, fp32 [N].
    grads: fp32 [N], only read.
    weights: [N], becomes the rounded copy of masters; it may be masters itself.
    Raises ValueError on buffers of another size or dtype.
    """
    check_flat(masters, exp_avg, exp_avg_sq, grads, weights)
    skip = terms.skip
    size = masters.numel()
    chunk = ELEMENTS_IN_CACHE if masters.device.type == "cpu" else max(1, size)
    for start in range(0, size, chunk):
        part = slice(start, start + chunk)
        p, w = masters[part], weights[part]
        m, v = exp_avg[part], exp_avg_sq[part]
        g = grads[part] * terms.grad_scale
        new_m = torch.lerp(m, g, 1 - terms.beta1)
        new_v = (v * terms.beta2).addcmul_(g, g, value=1 - terms.beta2)
        divisor = (new_v.sqrt() / terms.root_correction).add_(terms.eps)
        update = (new_m * terms.step_size).div_(divisor)
        new_p = (p * terms.lr_decay).sub_(update)
        # Selected, never multiplied by zero: 0 x NaN is NaN.
        torch.where(skip, w, new_p.to(w.dtype), out=w)
        torch.where(skip, m, new_m, out=m)
        torch.where(skip, v, new_v, out=v)
        if weights.data_ptr() != masters.data_ptr():
            torch.where(skip, p, new_p, out=p)


def check_flat(
    masters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Tensor,
    weights: Tensor,
) -> None:
    """Raise ValueError on buffers with gaps or of different sizes.

    The kernels go by address: they would write past the end of what is shorter.
    """
    size = masters.numel()
    state = {"masters": masters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grads": grads}
    for name, buffer in (*state.items(), ("weights", weights)):
        if buffer.shape != (size,) or not buffer.is_contiguous():
            raise ValueError(
                f"adamw_ takes flat buffers of one size; masters has {size} elements, "
                f"{name} is {tuple(buffer.shape)}"
            )
    for name, buffer in state.items():
        if buffer.dtype != torch.float32:
            raise ValueError(f"adamw_ keeps its state in float32; {name} is {buffer.dtype}")
