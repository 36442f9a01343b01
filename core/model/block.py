"""One layer of the model: attention and feed-forward layer, each a branch off the residual stream."""

import math
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from .. import rng
from ..config import ModelConfig
from ..ops import BlockShape, BlockStep, Ops
from ..parallel.sharding import Sharding
from .attention import Attention, KVCache
from .mlp import MLP
from .norm import NoNorm, Norm
from .recompute import Recompute
from .rotary import Angles
from .tokens import TokenContext


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch under hidden dropout. x: [B, T, H], cut by tokens with sequence parallel.

    With --norm-placement post x + norm(attention(x)), with both x + norm(attention(norm(x))); with --parallel-residual both branches
    read the same x.
    """

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        sharding: Sharding,
        ops: Ops,
        seed: int | None,
        recompute: Recompute,
    ):
        super().__init__()
        name = self.name = f"layers.{layer}"
        self.dropout = config.hidden_dropout
        residual_std = config.init_method_std / math.sqrt(2 * config.num_layers)
        norm = partial(
            Norm,
            size=config.hidden_size,
            config=config,
            sharding=sharding,
            ops=ops,
            seed=seed,
            cut_input=sharding.sequence_parallel,
        )
        before, after = (
            norm if config.norm_placement in (place, "both") else lambda name: NoNorm()
            for place in ("pre", "post")
        )
        window = config.window(layer)
        self.windowed, self.parallel_residual = window is not None, config.parallel_residual
        self.attention_norm = before(f"{name}.attention_norm")
        self.attention = Attention(
            f"{name}.attention", config, sharding, ops, seed, residual_std, recompute, window
        )
        self.attention_post_norm = after(f"{name}.attention_post_norm")
        self.mlp_norm = before(f"{name}.mlp_norm")
        self.mlp = MLP(f"{name}.mlp", config, sharding, ops, seed, residual_std)
        self.mlp_post_norm = after(f"{name}.mlp_post_norm")

    def forward(
        self,
        x: torch.Tensor,
        angles: Angles | None,
        context: TokenContext,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        branch = self.attention_post_norm(
            self.attention(self.attention_norm(x), angles, context.documents, cache)
        )
        branch = rng.dropout(branch, self.dropout, context.stream, f"{self.name}.attention")
        attended, normalized = (
            (x + branch, self.mlp_norm(x))
            if self.parallel_residual
            else self.mlp_norm.add(x, branch)
        )
        branch = self.mlp_post_norm(self.mlp(normalized))
        return attended + rng.dropout(branch, self.dropout, context.stream, f"{self.name}.mlp")

    def step(self, sequences: int) -> BlockStep | None:
        """What does the same for one more token of each of some sequences in one call, where there is such a thing."""
        attention, mlp, config = self.attention, self.mlp, self.attention.config
        if attention.sharding.tp.size > 1 or config.apply_layernorm_1p:
            return None
        shape = BlockShape(
            hidden=config.hidden_size,
            ffn=config.ffn_hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_kv_heads,
            size=config.head_size,
            **asdict(attention.rule),
            eps=config.norm_epsilon,
            interleaved=config.rotary_interleaved,
            norm_of_projection=config.qk_layernorm_width == "projection",
            gated=config.gated,
            parallel_residual=config.parallel_residual,
            activation=config.activation,
        )
        attends = (
            self.attention_norm,
            attention.qkv,
            attention.q_norm,
            attention.k_norm,
            attention.out,
            self.attention_post_norm,
        )
        parts = (*attends, self.mlp_norm, mlp.up, mlp.down, self.mlp_post_norm)
        return attention.ops.block_step(
            shape,
            [getattr(part, kind, None) for part in parts for kind in ("weight", "bias")],
            sequences,
        )
