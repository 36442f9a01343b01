"""Attention: softmax(q k^T) v whole, and in blocks that a ring or a cache merges, on torch's kernels or in plain PyTorch."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import FlagError
from . import reference

# --attention-backend, Megatron's words. None: torch picks the fastest that fits.
_BACKENDS = {
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


class AttentionOps:
    """Attention by one backend, --attention-backend.

    fp32_matmul: products of 16-bit numbers are computed in fp32 and rounded at the end, since this processor is faster at those.
    """

    attention_backend: str
    fp32_matmul: bool

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """x as matrix products take it: in fp32 where this processor multiplies 16-bit numbers more slowly than those, else as it is."""
        return x.float() if self.fp32_matmul and x.dtype in (torch.bfloat16, torch.float16) else x

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
        dtype, (q, k, v) = q.dtype, (self.operand(t) for t in (q, k, v))
        queries, keys, grouped = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
        if causal and mask is not None:
            raise ValueError(
                "attention is either causal or has a mask; a causal mask is one with nothing above its diagonal"
            )
        if causal and queries > keys:
            raise ValueError(
                f"causal attention with {queries} queries and only {keys} keys: the first {queries - keys} queries would see nothing"
            )
        if softcap is not None and dropout > 0.0:
            raise ValueError(
                f"attention with a softcap has no dropout, and {dropout} was asked for"
            )
        # torch's is_causal aligns the first query with the first key, which is right only for T = S.
        if causal and 1 < queries < keys:
            if (
                softcap is None
                and dropout == 0.0
                and self._flash_serves(q, k, v)
                and not torch.compiler.is_compiling()
            ):
                return _LaterQueries.apply(q, k, v, self, scale).to(dtype)
            mask = torch.ones(1, queries, keys, dtype=torch.bool, device=q.device).tril(
                keys - queries
            )
        if softcap is not None:
            return _SoftCapped.apply(
                q, k, v, mask, self, causal and queries == keys, scale, softcap
            ).to(dtype)
        if mask is not None and grouped and q.device.type != "cpu":
            # On a GPU the one kernel that takes a mask and stores no scores does not take grouped heads.
            k, v, grouped = (
                *(t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v)),
                False,
            )
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
        return y.transpose(1, 2).to(dtype)

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
        if softcap is not None or mask is not None or not self._flash_serves(q, k, v):
            return reference.attention_block(q, k, v, causal, scale, softcap, mask)
        o, lse = _flash_forward(*(self.operand(t) for t in (q, k, v)), causal, scale)
        return o.to(q.dtype), lse

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
        if softcap is not None or mask is not None or not self._flash_serves(q, k, v):
            return reference.attention_block_backward(
                do, q, k, v, o, lse, causal, scale, softcap, mask
            )
        gradients = _flash_backward(
            *(self.operand(t) for t in (do, q, k, v, o)), lse, causal, scale
        )
        return tuple(gradient.to(q.dtype) for gradient in gradients)

    def attention_merge_(
        self, o: torch.Tensor, lse: torch.Tensor, block_o: torch.Tensor, block_lse: torch.Tensor
    ) -> None:
        """Fold one more block into o [B, T, A, D], in the dtype of lse, and lse [B, A, T], both in place.

        The block weighs exp(block_lse) / (exp(lse) + exp(block_lse)), as a sigmoid: nothing overflows, and both weights sum to 1
        whatever rounding is in a large lse.
        """
        weight = torch.sigmoid(block_lse - lse)
        o.lerp_(block_o.to(o.dtype), weight.transpose(1, 2).unsqueeze(-1))
        lse.copy_(torch.logaddexp(lse, block_lse))

    def _flash_serves(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether torch's own flash kernel may be called for these, as attention_block does."""
        if _BACKENDS[self.attention_backend] is SDPBackend.MATH or any(
            t.stride(-1) != 1 for t in (q, k, v)
        ):
            return False
        if q.device.type == "cpu":
            return hasattr(torch.ops.aten, _CPU_FLASH) and q.is_floating_point()
        if (
            q.device.type != "cuda" or q.shape[-1] % 8 or not hasattr(torch.ops.aten, _GPU_FLASH)
        ):  # odd head sizes are padded behind sdpa's own door only
            return False
        params = SDPAParams(
            *(t.transpose(1, 2) for t in (q, k, v)), None, 0.0, False, q.shape[2] != k.shape[2]
        )
        return can_use_flash_attention(params)


def check_backend(backend: str, device: torch.device) -> None:
    """Raises FlagError, naming the flag and the remedy, for a backend that there is not, or not on this device."""
    if backend not in _BACKENDS:
        raise FlagError(f"--attention-backend {backend} is not one of {', '.join(_BACKENDS)}")
    if backend == "fused" and device.type != "cuda":
        raise FlagError(
            f"--attention-backend fused is cuDNN's and the device is {device.type}; use --attention-backend auto"
        )


class _LaterQueries(torch.autograd.Function):
    """Causal attention of the last T of S positions, 1 < T < S, without a mask: all see the first S - T keys, the rest is square."""

    @staticmethod
    def forward(ctx, q, k, v, ops, scale):
        past = k.shape[1] - q.shape[1]
        o, lse = ops.attention_block(q, k[:, :past], v[:, :past], causal=False, scale=scale)
        o = o.to(lse.dtype)
        ops.attention_merge_(
            o, lse, *ops.attention_block(q, k[:, past:], v[:, past:], causal=True, scale=scale)
        )
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
            ctx.ops.attention_block_backward(
                do, q, k[:, keys], v[:, keys], o, lse, causal=causal, scale=ctx.scale
            )
            for keys, causal in ((slice(past), False), (slice(past, None), True))
        ]
        (dq, dk, dv), (more_dq, late_dk, late_dv) = blocks
        return (
            dq + more_dq,
            torch.cat((dk, late_dk), dim=1),
            torch.cat((dv, late_dv), dim=1),
            None,
            None,
        )


class _SoftCapped(torch.autograd.Function):
    """Attention with a cap on the scores, which are computed again in backward instead of kept."""

    @staticmethod
    def forward(ctx, q, k, v, mask, ops, causal, scale, softcap):
        o, lse = ops.attention_block(
            q, k, v, causal=causal, scale=scale, softcap=softcap, mask=mask
        )
        ctx.save_for_backward(q, k, v, o, lse, mask)
        ctx.ops, ctx.rule = ops, {"causal": causal, "scale": scale, "softcap": softcap}
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, mask = ctx.saved_tensors
        return (
            *ctx.ops.attention_block_backward(do, q, k, v, o, lse, mask=mask, **ctx.rule),
            None,
            None,
            None,
            None,
            None,
        )


def _restricted_to(backend: str) -> AbstractContextManager:
    kernel = _BACKENDS[backend]
    return nullcontext() if kernel is None else sdpa_kernel(kernel)


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
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
        grads = getattr(torch.ops.aten, _CPU_FLASH + "_backward")(
            *inputs, lse, 0.0, causal, scale=scale
        )
    else:
        # The kernel goes by lse's address alone. Without dropout the state of the generator is not read, only its type checked.
        state = torch.empty(
            (), dtype=torch.int64 if torch.version.hip else torch.uint64, device=q.device
        )
        lengths = (None, None, q.shape[1], k.shape[1])  # no packed sequences
        kernel = getattr(torch.ops.aten, _GPU_FLASH + "_backward")
        grads = kernel(*inputs, lse.contiguous(), *lengths, 0.0, causal, state, state, scale=scale)
    return tuple(grad.transpose(1, 2) for grad in grads)
