"""The only door to kernels: which implementation of each op this run uses, chosen once, named in the log, passed in as a value."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import native, reference
from .logs import get_logger

try:
    from .kernels import adamw as triton_adamw
    from .kernels import rms_norm as triton_rms_norm
except ImportError:  # Triton has no wheel for every platform
    triton_adamw = triton_rms_norm = None

# --attention-backend, Megatron's words. None: torch picks the fastest that fits.
_ATTENTION = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fused": SDPBackend.CUDNN_ATTENTION,
    "unfused": SDPBackend.MATH,
    "local": SDPBackend.MATH,
}
# torch's flash attention with its log-sum-exp. Private, hence looked up: where one is gone, plain PyTorch stands in.
_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_GPU_FLASH = "_scaled_dot_product_flash_attention"


@dataclass(frozen=True)
class AttentionRule:
    """What a layer does to its attention scores beside making them causal.

    scale: their factor, D^-1/2 if None. softcap c: c tanh(score / c). window W: a query sees itself and the W - 1 tokens before it.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class Ops:
    """The ops of a model and its optimizer. `Ops()` is plain PyTorch; `choose` picks by flag, device and dtype.

    Everything but adamw_ is differentiable. Under torch.compile every op is the PyTorch one: the compiler fuses it with its
    neighbours, where a kernel of our own would be a wall between them.
    """

    kernels: str = "torch"  # torch, triton or native: of rms_norm and adamw_
    attention_backend: str = "auto"  # as --attention-backend

    def describe(self) -> str:
        """One line for the log: what each op runs on."""
        name = f"native ({native.simd()})" if self.kernels == "native" else self.kernels
        return f"kernels: rms_norm, adamw {name} | attention sdpa ({self.attention_backend}) | layer_norm, rope, activations torch"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., H] / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight [H] cast to that dtype; shape and dtype of x."""
        weight = weight.to(x.dtype)
        if self.kernels == "torch" or torch.compiler.is_compiling():
            return reference.rms_norm(x, weight, eps)
        if self.kernels == "native":
            return native.rms_norm(x, weight, eps)
        return triton_rms_norm.rms_norm(x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """x [..., H] to mean 0 and variance 1, times weight [H], plus bias [H]; both cast to x's dtype."""
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        """Rotate the first R of the D dims of every head of x [B, T, A, D] by the angles of cos and sin, [T, R/2] or [B, T, R/2].

        Dim i turns with dim i + R/2 (rotate-half, as Hugging Face's Llama), or 2i with 2i + 1 where `interleaved`. cos and sin are
        cast to x's dtype. Su et al. 2021, section 3.4.
        """
        return reference.rope(x, cos, sin, interleaved)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, elementwise (Shazeer 2020)."""
        return reference.swiglu(gate, up)

    def geglu(self, gate: torch.Tensor, up: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """gelu(gate) * up, elementwise (Shazeer 2020)."""
        return reference.geglu(gate, up, "none" if exact else "tanh")

    def gelu(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """GELU by its tanh approximation, as GPT-2 and Megatron's fused kernel have it, or `exact` (Hendrycks and Gimpel 2016)."""
        return F.gelu(x, approximate="none" if exact else "tanh")

    def squared_relu(self, x: torch.Tensor) -> torch.Tensor:
        """max(x, 0)^2 (So et al. 2021)."""
        return F.relu(x).square()

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        mask: torch.Tensor | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """softmax(q k^T * scale) v: q [B, T, A, D], k and v [B, S, K, D] where K divides A; returns [B, T, A, D].

        causal: the last query sees every key and each one before it sees one less (T < S with a KV cache, or where other ranks hold
        the other queries). mask: in place of causal, bool [B, T, S], true where a query sees a key; it must see at least one. scale
        None: D^-1/2. softcap c: scores become c tanh(score / c) before they are masked; scores are then stored, and there is no
        dropout. dropout: of the attention weights; give 0 when evaluating. What takes a mask is free in its choice of a backend,
        since flash has no such kernel on a GPU: a mask, and causal with 1 < T < S under dropout or where flash does not serve.
        Raises ValueError on causal with more queries than keys, or with a mask, and on dropout with a softcap.
        """
        queries, keys, grouped = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
        if causal and mask is not None:
            raise ValueError("attention is either causal or has a mask; a causal mask is one with nothing above its diagonal")
        if causal and queries > keys:
            raise ValueError(f"causal attention with {queries} queries and only {keys} keys: the first {queries - keys} queries would see nothing")
        if softcap is not None and dropout > 0.0:
            raise ValueError(f"attention with a softcap has no dropout, and {dropout} was asked for")
        # torch's is_causal aligns the first query with the first key, which is right only for T = S.
        if causal and 1 < queries < keys:
            if softcap is None and dropout == 0.0 and self._flash_serves(q, k, v) and not torch.compiler.is_compiling():
                return _LaterQueries.apply(q, k, v, self, scale)
            mask = torch.ones(1, queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        if softcap is not None:
            return _SoftCapped.apply(q, k, v, mask, self, causal and queries == keys, scale, softcap)
        if mask is not None and grouped and q.device.type != "cpu":
            # On a GPU the one kernel that takes a mask and stores no scores does not take grouped heads.
            k, v, grouped = *(t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v)), False
        with _restricted_to(self.attention_backend) if mask is None else nullcontext():
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=None if mask is None else mask.unsqueeze(1),
                dropout_p=dropout,
                is_causal=causal and queries == keys,
                scale=scale,
                enable_gqa=grouped,
            )
        return y.transpose(1, 2)

    @torch.no_grad()
    def attention_block(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        softcap: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q [B, T, A, D] to some of its keys and values [B, S, K, D]: o [B, T, A, D], and lse [B, A, T] to merge it by.

        lse is the log of the sum of exp(score), natural, in fp32 (float64 of float64); -inf, and o 0, for a query that sees nothing.
        causal: T = S, query i sees keys 0 to i. mask: bool [B, T, S]. softcap: as for attention. Made for an autograd function that
        calls attention_block_backward. By flash attention's kernel where it serves (also in place of cuDNN's), else, and for the
        backends unfused and local, and with a softcap or mask, in plain PyTorch.
        """
        if softcap is not None or mask is not None:
            return reference.attention_block(q, k, v, causal, scale, softcap, mask)
        if self._flash_serves(q, k, v):
            return _flash_forward(q, k, v, causal, scale)
        return reference.attention_block(q, k, v, causal, scale)

    @torch.no_grad()
    def attention_block_backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        softcap: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What one block adds to dq, dk and dv, in the dtype of q, given do [B, T, A, D] and the o and lse of all blocks merged.

        With those, each weight is exp(score - lse) whichever block it stands in, so the blocks' dq add up (Liu et al. 2023, section 3).
        """
        if softcap is not None or mask is not None:
            return reference.attention_block_backward(do, q, k, v, o, lse, causal, scale, softcap, mask)
        if self._flash_serves(q, k, v):
            return _flash_backward(do, q, k, v, o, lse, causal, scale)
        return reference.attention_block_backward(do, q, k, v, o, lse, causal, scale)

    def attention_merge_(self, o: torch.Tensor, lse: torch.Tensor, block_o: torch.Tensor, block_lse: torch.Tensor) -> None:
        """Fold one more block into o [B, T, A, D], in the dtype of lse, and lse [B, A, T], both in place.

        The block weighs exp(block_lse) / (exp(lse) + exp(block_lse)), as a sigmoid: nothing overflows, and both weights sum to 1
        whatever rounding is in a large lse.
        """
        weight = torch.sigmoid(block_lse - lse)
        o.lerp_(block_o.to(o.dtype), weight.transpose(1, 2).unsqueeze(-1))
        lse.copy_(torch.logaddexp(lse, block_lse))

    def _flash_serves(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether torch's own flash kernel may be called for these, as attention_block does."""
        if _ATTENTION[self.attention_backend] is SDPBackend.MATH or any(t.stride(-1) != 1 for t in (q, k, v)):
            return False
        if q.device.type == "cpu":
            return hasattr(torch.ops.aten, _CPU_FLASH) and q.is_floating_point()
        if (
            q.device.type != "cuda" or q.shape[-1] % 8 or not hasattr(torch.ops.aten, _GPU_FLASH)
        ):  # odd head sizes are padded behind sdpa's own door only
            return False
        params = SDPAParams(*(t.transpose(1, 2) for t in (q, k, v)), None, 0.0, False, q.shape[2] != k.shape[2])
        return can_use_flash_attention(params)

    @torch.no_grad()
    def sgd_(
        self,
        masters: torch.Tensor,
        momentum: torch.Tensor,
        grads: torch.Tensor,
        weights: torch.Tensor,
        *,
        lr: float,
        momentum_factor: float,
        weight_decay: float,
        grad_scale: torch.Tensor,
        skip: torch.Tensor,
    ) -> None:
        """One update by SGD with momentum and coupled weight decay, as torch.optim.SGD; buffers, grad_scale and skip as for adamw_."""
        step = momentum_factor * momentum + grads * grad_scale + weight_decay * masters
        updated = masters - lr * step
        torch.where(skip, weights, updated.to(weights.dtype), out=weights)
        torch.where(skip, momentum, step, out=momentum)
        if weights.data_ptr() != masters.data_ptr():
            torch.where(skip, masters, updated, out=masters)

    @torch.no_grad()
    def adamw_(
        self,
        masters: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        grads: torch.Tensor,
        weights: torch.Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: torch.Tensor,
        grad_scale: torch.Tensor,
        skip: torch.Tensor,
    ) -> None:
        """One AdamW update in place of four flat buffers: masters, exp_avg, exp_avg_sq (fp32) and weights (the working dtype).

        weights becomes a rounded copy of masters, and may be masters itself. grads (fp32) is read as grads * grad_scale. step (0-d)
        counts this update, from 1; grad_scale (0-d fp32) and skip (0-d bool) live on the device too: the host waits for none of
        them. Where skip is true nothing changes, whatever the gradients hold. Same arithmetic as torch.optim.AdamW (Loshchilov and
        Hutter 2019).
        """
        _check_flat(masters, exp_avg, exp_avg_sq, grads, weights)
        # In fp64, as torch.optim computes them on the host: 1 - 0.999**t in fp32 has lost three digits at t = 1.
        t = step.to(torch.float64)
        implementation = {"torch": reference, "native": native, "triton": triton_adamw}[self.kernels]
        implementation.adamw_(
            masters,
            exp_avg,
            exp_avg_sq,
            grads,
            weights,
            step_size=(lr / (1 - beta1**t)).float(),
            root_correction=(1 - beta2**t).sqrt().float(),
            grad_scale=grad_scale.float(),
            skip=skip.bool(),
            lr_decay=1 - lr * weight_decay,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )


class _LaterQueries(torch.autograd.Function):
    """Causal attention of the last T of S positions, 1 < T < S, without a mask: all see the first S - T keys, the rest is square."""

    @staticmethod
    def forward(ctx, q, k, v, ops, scale):
        past = k.shape[1] - q.shape[1]
        o, lse = ops.attention_block(q, k[:, :past], v[:, :past], causal=False, scale=scale)
        o = o.to(lse.dtype)
        ops.attention_merge_(o, lse, *ops.attention_block(q, k[:, past:], v[:, past:], causal=True, scale=scale))
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.ops, ctx.scale = ops, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        past = k.shape[1] - q.shape[1]
        blocks = [
            ctx.ops.attention_block_backward(do, q, k[:, keys], v[:, keys], o, lse, causal=causal, scale=ctx.scale)
            for keys, causal in ((slice(past), False), (slice(past, None), True))
        ]
        (dq, dk, dv), (more_dq, late_dk, late_dv) = blocks
        return dq + more_dq, torch.cat((dk, late_dk), dim=1), torch.cat((dv, late_dv), dim=1), None, None


class _SoftCapped(torch.autograd.Function):
    """Attention with a cap on the scores, which are computed again in backward instead of kept."""

    @staticmethod
    def forward(ctx, q, k, v, mask, ops, causal, scale, softcap):
        o, lse = ops.attention_block(q, k, v, causal=causal, scale=scale, softcap=softcap, mask=mask)
        ctx.save_for_backward(q, k, v, o, lse, mask)
        ctx.ops, ctx.rule = ops, {"causal": causal, "scale": scale, "softcap": softcap}
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, mask = ctx.saved_tensors
        return *ctx.ops.attention_block_backward(do, q, k, v, o, lse, mask=mask, **ctx.rule), None, None, None, None, None


def choose(kernels: str, device: torch.device, dtype: torch.dtype, attention_backend: str = "auto") -> Ops:
    """The ops for --kernels {auto, torch, triton, native} on `device` with activations of `dtype`.

    auto: native on a CPU, triton on a GPU, each where it can serve, else torch, and the log says why.
    Raises ValueError, naming the flag and the remedy, where an implementation or backend asked for by name cannot serve.
    """
    _check_attention_backend(attention_backend, device)
    if kernels not in ("auto", "torch", *_OBSTACLES):
        raise ValueError(f"--kernels {kernels} is not one of auto, torch, {', '.join(_OBSTACLES)}")
    if kernels == "torch":
        return Ops("torch", attention_backend)
    wanted = kernels if kernels != "auto" else "native" if device.type == "cpu" else "triton"
    obstacle = _OBSTACLES[wanted](device, dtype)
    if obstacle is None:
        return Ops(wanted, attention_backend)
    if kernels != "auto":
        raise ValueError(f"--kernels {kernels}: {obstacle}, or use --kernels auto")
    get_logger().info(f"kernels: PyTorch in place of {wanted}: {obstacle}")
    return Ops("torch", attention_backend)


def _native_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native kernels cannot serve, and what to do about it; None where they can."""
    if device.type != "cpu":
        return f"the native kernels run on the CPU and the device is {device.type}; use --kernels triton"
    if not native.AVAILABLE:
        return "trivium._native is not built; install a C++17 compiler and run `pip install --no-deps --no-build-isolation -e .`"
    if dtype not in native.DTYPES:
        return f"the native kernels have float32 and bfloat16, not {dtype}; use --bf16"
    return None


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot serve, and what to do about it; None where it can."""
    if triton_rms_norm is None:
        return "triton cannot be imported; install triton>=3.6"
    if device.type == "cpu" and not triton_rms_norm.INTERPRETED:
        return "Triton has no CPU target; set TRITON_INTERPRET=1 (slow, for tests)"
    if device.type == "cuda" and triton_rms_norm.INTERPRETED:
        return "TRITON_INTERPRET=1 would run the kernels on the CPU; unset it"
    return None


_OBSTACLES = {"triton": _triton_obstacle, "native": _native_obstacle}


def _check_attention_backend(backend: str, device: torch.device) -> None:
    if backend not in _ATTENTION:
        raise ValueError(f"--attention-backend {backend} is not one of {', '.join(_ATTENTION)}")
    if backend == "fused" and device.type != "cuda":
        raise ValueError(f"--attention-backend fused is cuDNN's and the device is {device.type}; use --attention-backend auto")


def _restricted_to(backend: str) -> AbstractContextManager:
    kernel = _ATTENTION[backend]
    return nullcontext() if kernel is None else sdpa_kernel(kernel)


def _check_flat(masters: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, grads: torch.Tensor, weights: torch.Tensor) -> None:
    """The kernels go by address: what has gaps, or ends early, they would write past."""
    for name, buffer in {"masters": masters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grads": grads, "weights": weights}.items():
        if buffer.shape != (masters.numel(),) or not buffer.is_contiguous():
            raise ValueError(f"adamw_ takes flat buffers of one size; masters has {masters.numel()} elements, {name} is {tuple(buffer.shape)}")
        if buffer.dtype != torch.float32 and name != "weights":
            raise ValueError(f"adamw_ keeps its state in float32; {name} is {buffer.dtype}")


def _flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See Ops.attention_block. torch's kernels want [B, A, T, D], of any strides but in D."""
    kernel = getattr(torch.ops.aten, _CPU_FLASH if q.device.type == "cpu" else _GPU_FLASH)
    o, lse = kernel(*(t.transpose(1, 2) for t in (q, k, v)), 0.0, causal, scale=scale)[:2]
    return o.transpose(1, 2), lse


def _flash_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """See Ops.attention_block_backward."""
    inputs = [t.transpose(1, 2) for t in (do, q, k, v, o)]
    if q.device.type == "cpu":
        grads = getattr(torch.ops.aten, _CPU_FLASH + "_backward")(*inputs, lse, 0.0, causal, scale=scale)
    else:
        # The kernel goes by lse's address alone. Without dropout the state of the generator is not read, only its type checked.
        state = torch.empty((), dtype=torch.int64 if torch.version.hip else torch.uint64, device=q.device)
        lengths = (None, None, q.shape[1], k.shape[1])  # no packed sequences
        kernel = getattr(torch.ops.aten, _GPU_FLASH + "_backward")
        grads = kernel(*inputs, lse.contiguous(), *lengths, 0.0, causal, state, state, scale=scale)
    return tuple(grad.transpose(1, 2) for grad in grads)
