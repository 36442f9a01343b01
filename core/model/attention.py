"""Causal self-attention with grouped key-value heads, rotary positions and a cache for generation."""

from functools import partial

import torch
from torch import nn

from .. import rng
from ..config import ModelConfig
from ..layout import Rows
from ..ops import AttentionRule, BlockStep, Ops
from ..parallel import context
from ..parallel.linear import ColumnParallelLinear, RowParallelLinear
from ..parallel.sharding import Sharding
from .norm import Norm, ProjectionNorm
from .recompute import Recompute
from .rotary import Angles


class KVCache:
    """Keys and values of one layer, [B, S, K, D] with room for `capacity` positions, filled from the left.

    step: what passes one more token through the layer in one call, where there is such a thing.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        step: BlockStep | None,
    ):
        self.step = step
        self.keys, self.values = (
            torch.empty(batch, capacity, heads, head_size, dtype=dtype, device=device)
            for _ in range(2)
        )
        self.length = 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, T, K, D]; everything held so far comes back, as views."""
        start, self.length = self.length, self.length + keys.shape[1]
        self.keys[:, start : self.length] = keys
        self.values[:, start : self.length] = values
        return self.keys[:, : self.length], self.values[:, : self.length]

    def take_step(self, x: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """The layer's output for one more token, x [B, 1, H], by `step`."""
        y = self.step(x, *(angles or (None, None)), self.keys, self.values, self.length)
        self.length += 1
        return y


class Attention(nn.Module):
    """x [B, T, H] -> [B, T, H]. A query heads share K key-value heads of size D; each rank of `tp` holds A/tp and K/tp of them, or one of K < tp."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        sharding: Sharding,
        ops: Ops,
        seed: int | None,
        residual_std: float,
        recompute: Recompute,
        window: int | None,
    ):
        super().__init__()
        self.rule = AttentionRule(config.softmax_scale, config.attn_logit_softcapping, window)
        self.config, self.sharding, self.ops, self.recompute = config, sharding, ops, recompute
        tp, size = sharding.tp, config.head_size
        self.local_heads, self.local_kv_heads = (
            config.num_attention_heads // tp.size,
            config.num_kv_heads * sharding.kv.size // tp.size,
        )
        kv = Rows(config.num_kv_heads * size, sharding.kv)
        rows = {f"{name}.q": config.num_attention_heads * size, f"{name}.k": kv, f"{name}.v": kv}
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            rows,
            sharding,
            ops,
            bias=config.qkv_bias,
            init=rng.Init(seed, config.init_method_std),
        )
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_layernorm and config.qk_layernorm_width == "projection":
            self.q_norm = ProjectionNorm(
                f"{name}.q_norm", Rows(rows[f"{name}.q"]), config, sharding, seed
            )
            self.k_norm = ProjectionNorm(f"{name}.k_norm", kv, config, sharding, seed)
        elif config.qk_layernorm:
            self.q_norm, self.k_norm = (
                Norm(f"{name}.{kind}_norm", size, config, sharding, ops, seed, cut_input=True)
                for kind in "qk"
            )
        init = rng.Init(seed, residual_std)
        self.out = RowParallelLinear(
            f"{name}.out",
            rows[f"{name}.q"],
            config.hidden_size,
            sharding,
            ops,
            bias=config.attention_out_bias,
            init=init,
        )

    def forward(
        self,
        x: torch.Tensor,
        angles: Angles | None,
        documents: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        qkv = self.qkv(x)
        batch, length, _ = qkv.shape
        heads = qkv.view(batch, length, -1, self.config.head_size)
        sizes = self.local_heads, self.local_kv_heads, self.local_kv_heads
        if angles is not None and not self.config.qk_layernorm:
            q, k, v = self.ops.split_heads(heads, sizes, *angles, self.config.rotary_interleaved)
        else:
            q, k, v = heads.split(sizes, dim=2)
            q, k = self.q_norm(q), self.k_norm(k)
            if angles is not None:
                q, k = (self.ops.rope(t, *angles, self.config.rotary_interleaved) for t in (q, k))
        return self.out(self._mix(q, k, v, documents, cache).reshape(batch, length, -1))

    def _mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        if cache is not None:
            return context.causal(q, *cache.extend(k, v), self.ops, self.rule)
        dropout = self.config.attention_dropout if self.training else 0.0
        cp, comm_type = self.sharding.cp, self.sharding.cp_comm_type
        core = partial(
            context.attention,
            cp=cp,
            comm_type=comm_type,
            ops=self.ops,
            rule=self.rule,
            documents=documents,
            dropout=dropout,
        )
        return self.recompute.attention(core, q, k, v)
