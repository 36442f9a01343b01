"""Attention: softmax(q k^T) v, whole or in blocks that a ring or a cache merges.

A query block attended to one block of keys gives an output o and, for every query, the log of the
sum of exp(score), lse. With these, blocks merge exactly: a block weighs exp(its lse) / exp(lse of
all). Torch's flash kernels give both; where they do not serve, reference.py stands in.

Letters: B batch, T queries, S keys, A query heads, K key-value heads, D head size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import FlagError
from . import reference
from .products import ProductOps

# --attention-backend, in Megatron's words. None: torch picks the fastest that fits.
_BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fused": SDPBackend.CUDNN_ATTENTION,
    "unfused": SDPBackend.MATH,
    "local": SDPBackend.MATH,
}
# torch's flash attention with its log-sum-exp. These are private to torch, hence looked up by name:
# where a release has none, plain PyTorch stands in.
_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_GPU_FLASH = "_scaled_dot_product_flash_attention"


@dataclass(frozen=True)
class AttentionRule:
    """The changes that a layer makes to its attention scores beside the causal mask.

    scale: their factor, D^-1/2 if None.
    softcap: c, for scores of c tanh(score / c).
    window: W, where a query sees itself and the W - 1 tokens before it.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None


class AttentionOps(ProductOps):
    """Attention by one backend, --attention-backend."""

    attention_backend: str

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute softmax(q k^T * scale) v: [B, T, A, D].

        q: [B, T, A, D].
        k, v: [B, S, K, D], where K divides A.
        causal: the last query sees every key and each one before it sees one less; T < S with a KV
            cache, or where other ranks hold the other queries.
        mask: in place of causal, bool [B, T, S], true where a query sees a key, at least one.
        dropout: of the attention weights; give 0 when evaluating.
        scale: D^-1/2 if None.
        softcap: c, for scores of c tanh(score / c) before they are masked. Scores are then stored,
            and there is no dropout.

        On a GPU flash has no kernel with a mask. So a mask, and causal with 1 < T < S under dropout
        or where flash does not serve, may run on any backend.
        Raises ValueError on causal with more queries than keys, or with a mask, and on dropout with
        a softcap.
        """
        queries = q.shape[1]
        keys = k.shape[1]
        _check(queries, keys, causal, mask, dropout, softcap)
        dtype = q.dtype
        q = self.operand(q)
        k = self.operand(k)
        v = self.operand(v)
        # torch's is_causal aligns the first query with the first key, which is right only if T = S.
        if causal and 1 < queries < keys:
            plain = softcap is None and dropout == 0.0
            if plain and self._flash_serves(q, k, v) and not torch.compiler.is_compiling():
                return _LaterQueries.apply(q, k, v, self, scale).to(dtype)
            everything = torch.ones(1, queries, keys, dtype=torch.bool, device=q.device)
            mask = everything.tril(keys - queries)
        # One query (T = 1) sees every key, so it needs neither the mask nor the causal kernel.
        square = causal and queries == keys
        if softcap is not None:
            return _SoftCapped.apply(q, k, v, mask, self, square, scale, softcap).to(dtype)
        return self._by_torch(q, k, v, mask, square, dropout, scale).to(dtype)

    def _by_torch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        dropout: float,
        scale: float | None,
    ) -> Tensor:
        """Call torch's scaled_dot_product_attention, which wants [B, A, T, D]."""
        group = q.shape[2] // k.shape[2]
        if mask is not None and group > 1 and q.device.type != "cpu":
            # On a GPU the one kernel that takes a mask and stores no scores takes no grouped heads.
            k = k.repeat_interleave(group, dim=2)
            v = v.repeat_interleave(group, dim=2)
            group = 1
        with _restricted_to(self.attention_backend) if mask is None else nullcontext():
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=None if mask is None else mask.unsqueeze(1),
                dropout_p=dropout,
                is_causal=causal,
                scale=scale,
                enable_gqa=group > 1,
            )
        return y.transpose(1, 2)

    @torch.no_grad()
    def attention_block(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to some of the keys: returns o [B, T, A, D] and lse [B, A, T] to merge it by.

        lse is the natural log of the sum of exp(score), in fp32 (float64 of float64). A query that
        sees nothing has lse -inf and o 0. Without a gradient: made for an autograd function that
        calls attention_block_backward.

        By flash attention's kernel where it serves (also in place of cuDNN's). Plain PyTorch takes
        the rest: the backends unfused and local, a softcap, a mask.

        q: [B, T, A, D].
        k, v: [B, S, K, D].
        causal: T = S, query i sees keys 0 to i.
        mask: bool [B, T, S].
        scale, softcap: as for attention.
        """
        stored = softcap is not None or mask is not None
        if stored or not self._flash_serves(q, k, v):
            return reference.attention_block(q, k, v, causal, scale, softcap, mask)
        inputs = [self.operand(tensor) for tensor in (q, k, v)]
        o, lse = _flash_forward(inputs, causal, scale)
        return o.to(q.dtype), lse

    @torch.no_grad()
    def attention_block_backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute what one block adds to dq, dk and dv, in the dtype of q.

        o and lse are those of all blocks merged: with them a weight is exp(score - lse) whichever
        block it stands in, so the blocks' dq add up (Liu et al. 2023, section 3).

        do: the gradient of o, [B, T, A, D].
        """
        stored = softcap is not None or mask is not None
        if stored or not self._flash_serves(q, k, v):
            return reference.attention_block_backward(
                do, q, k, v, o, lse, causal, scale, softcap, mask
            )
        inputs = [self.operand(tensor) for tensor in (do, q, k, v, o)]
        gradients = _flash_backward(inputs, lse, causal, scale)
        return tuple(gradient.to(q.dtype) for gradient in gradients)

    def attention_merge_(self, o: Tensor, lse: Tensor, block_o: Tensor, block_lse: Tensor) -> None:
        """Fold one more block into o and lse, both in place.

        The block weighs exp(block_lse) / (exp(lse) + exp(block_lse)), computed as a sigmoid:
        nothing overflows, and both weights sum to 1 whatever rounding is in a large lse.

        o: [B, T, A, D] in the dtype of lse.
        lse: [B, A, T].
        """
        weight = torch.sigmoid(block_lse - lse)
        o.lerp_(block_o.to(o.dtype), weight.transpose(1, 2).unsqueeze(-1))
        lse.copy_(torch.logaddexp(lse, block_lse))

    def _flash_serves(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Return whether torch's own flash kernel may be called for these."""
        if _BACKENDS[self.attention_backend] is SDPBackend.MATH:
            return False
        if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
            return False
        kind = q.device.type
        if kind == "cpu":
            return hasattr(torch.ops.aten, _CPU_FLASH) and q.is_floating_point()
        if kind != "cuda" or not hasattr(torch.ops.aten, _GPU_FLASH):
            return False
        # torch pads odd head sizes, but only behind scaled_dot_product_attention.
        if q.shape[-1] % 8:
            return False
        grouped = q.shape[2] != k.shape[2]
        parameters = SDPAParams(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, 0.0, False, grouped
        )
        return can_use_flash_attention(parameters)


def check_backend(backend: str, device: torch.device) -> None:
    """Raise FlagError, naming flag and remedy, for a backend that does not exist on this device."""
    if backend not in _BACKENDS:
        raise FlagError(f"--attention-backend {backend} is not one of {', '.join(_BACKENDS)}")
    if backend == "fused" and device.type != "cuda":
        raise FlagError(
            f"--attention-backend fused is cuDNN's and the device is {device.type}; "
            "use --attention-backend auto"
        )


def _check(
    queries: int,
    keys: int,
    causal: bool,
    mask: Tensor | None,
    dropout: float,
    softcap: float | None,
) -> None:
    """Raise ValueError on what AttentionOps.attention cannot compute."""
    if causal and mask is not None:
        raise ValueError(
            "attention is either causal or has a mask; "
            "a causal mask is one with nothing above its diagonal"
        )
    if causal and queries > keys:
        raise ValueError(
            f"causal attention with {queries} queries and only {keys} keys: "
            f"the first {queries - keys} queries would see nothing"
        )
    if softcap is not None and dropout > 0.0:
        raise ValueError(f"attention with a softcap has no dropout, and {dropout} was asked for")


class _LaterQueries(torch.autograd.Function):
    """Causal attention of the last T of S positions, 1 < T < S, without a mask.

    All T queries see the first S - T keys; among the rest attention is square and causal.
    """

    @staticmethod
    def forward(ctx, q, k, v, ops, scale):
        early, late = _cut(q, k, v)
        # The first block by itself, the second merged into it. In fp32, as in a ring.
        o, lse = ops.attention_block(q, *early, causal=False, scale=scale)
        o = o.to(lse.dtype)
        square = ops.attention_block(q, *late, causal=True, scale=scale)
        ops.attention_merge_(o, lse, *square)
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.ops = ops
        ctx.scale = scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        early, late = _cut(q, k, v)
        block = partial(ctx.ops.attention_block_backward, scale=ctx.scale)
        dq, dk, dv = block(do, q, *early, o, lse, causal=False)
        late_dq, late_dk, late_dv = block(do, q, *late, o, lse, causal=True)
        dk = torch.cat((dk, late_dk), dim=1)
        dv = torch.cat((dv, late_dv), dim=1)
        # Each key is in one block, so dk and dv stand side by side; a query is in both.
        return dq + late_dq, dk, dv, None, None


def _cut(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return keys and values before the queries' own positions, and those at them."""
    past = k.shape[1] - q.shape[1]
    return (k[:, :past], v[:, :past]), (k[:, past:], v[:, past:])


class _SoftCapped(torch.autograd.Function):
    """Attention with a cap on the scores, which backward computes again instead of keeping them."""

    @staticmethod
    def forward(ctx, q, k, v, mask, ops, causal, scale, softcap):
        ctx.rule = {"causal": causal, "scale": scale, "softcap": softcap}
        o, lse = ops.attention_block(q, k, v, mask=mask, **ctx.rule)
        ctx.save_for_backward(q, k, v, o, lse, mask)
        ctx.ops = ops
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        *tensors, mask = ctx.saved_tensors
        gradients = ctx.ops.attention_block_backward(do, *tensors, mask=mask, **ctx.rule)
        return *gradients, None, None, None, None, None


def _restricted_to(backend: str) -> AbstractContextManager:
    """Return a context in which torch uses this backend alone."""
    kernel = _BACKENDS[backend]
    return nullcontext() if kernel is None else sdpa_kernel(kernel)


def _flash_forward(
    inputs: list[Tensor], causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Call torch's kernel for attention_block.

    inputs: q, k, v as attention_block takes them. The kernel wants [B, A, T, D], of any strides but
        in D.
    """
    on_cpu = inputs[0].device.type == "cpu"
    kernel = _aten(_CPU_FLASH if on_cpu else _GPU_FLASH)
    heads_first = [tensor.transpose(1, 2) for tensor in inputs]
    o, lse, *_ = kernel(*heads_first, 0.0, causal, scale=scale)
    return o.transpose(1, 2), lse


def _flash_backward(
    inputs: list[Tensor], lse: Tensor, causal: bool, scale: float | None
) -> list[Tensor]:
    """Call torch's kernel for attention_block_backward: dq, dk, dv.

    inputs: do, q, k, v, o as attention_block_backward takes them.
    """
    _, q, k, _, _ = inputs
    heads_first = [tensor.transpose(1, 2) for tensor in inputs]
    if q.device.type == "cpu":
        kernel = _aten(_CPU_FLASH + "_backward")
        gradients = kernel(*heads_first, lse, 0.0, causal, scale=scale)
    else:
        # Without dropout the generator's state is not read, but its type is checked.
        kind = torch.int64 if torch.version.hip else torch.uint64
        state = torch.empty((), dtype=kind, device=q.device)
        rest = (None, None, q.shape[1], k.shape[1], 0.0, causal, state, state)
        lse = lse.contiguous()  # the kernel goes by its address alone
        kernel = _aten(_GPU_FLASH + "_backward")
        gradients = kernel(*heads_first, lse, *rest, scale=scale)
    return [gradient.transpose(1, 2) for gradient in gradients]


def _aten(name: str) -> Callable[..., tuple[Tensor, ...]]:
    return getattr(torch.ops.aten, name)
