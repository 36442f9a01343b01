"""Causal self-attention with grouped key-value heads, rotary positions and a cache for generation."""

import torch
from torch import nn

from .. import rng
from ..config import ModelConfig
from ..mesh import Axis
from ..ops import Ops
from ..parallel.linear import ColumnParallelLinear, RowParallelLinear
from .norm import Norm

Angles = tuple[torch.Tensor, torch.Tensor]


class KVCache:
    """Keys and values of one layer, [B, S, K, D] with room for `capacity` positions, filled from the left."""

    def __init__(self, batch: int, capacity: int, heads: int, head_size: int, dtype: torch.dtype, device: torch.device):
        self.keys, self.values = (torch.empty(batch, capacity, heads, head_size, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, T, K, D]; everything held so far comes back, as views."""
        start, self.length = self.length, self.length + keys.shape[1]
        self.keys[:, start : self.length] = keys
        self.values[:, start : self.length] = values
        return self.keys[:, : self.length], self.values[:, : self.length]


class Attention(nn.Module):
    """x [B, T, H] -> [B, T, H]. A query heads share K key-value heads of size D; each rank of `tp` holds A/tp and K/tp of them."""

    def __init__(self, name: str, config: ModelConfig, tp: Axis, ops: Ops, seed: int | None, residual_std: float):
        super().__init__()
        self.config, self.ops = config, ops
        self.local_heads, self.local_kv_heads = config.num_attention_heads // tp.size, config.num_kv_heads // tp.size
        size = config.head_size
        rows = {f"{name}.q": config.num_attention_heads * size, f"{name}.k": config.num_kv_heads * size, f"{name}.v": config.num_kv_heads * size}
        self.qkv = ColumnParallelLinear(config.hidden_size, rows, tp, bias=config.qkv_bias, init=rng.Init(seed, config.init_method_std))
        self.q_norm = Norm(f"{name}.q_norm", size, config, tp, ops, seed) if config.qk_layernorm else nn.Identity()
        self.k_norm = Norm(f"{name}.k_norm", size, config, tp, ops, seed) if config.qk_layernorm else nn.Identity()
        init = rng.Init(seed, residual_std)
        self.out = RowParallelLinear(f"{name}.out", rows[f"{name}.q"], config.hidden_size, tp, bias=config.linear_bias, init=init)

    def forward(self, x: torch.Tensor, angles: Angles | None, cache: KVCache | None = None) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.config.head_size)
        q, k, v = heads.split((self.local_heads, self.local_kv_heads, self.local_kv_heads), dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q = self.ops.rope(q, *angles, self.config.rotary_interleaved)
            k = self.ops.rope(k, *angles, self.config.rotary_interleaved)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.config.attention_dropout if self.training else 0.0
        return self.out(self.ops.attention(q, k, v, causal=True, dropout=dropout).reshape(batch, length, -1))
