"""Causal self-attention with grouped key-value heads and rotary positions.

Letters: model/shape.py.
"""

from functools import partial

from torch import Tensor, nn

from ..ops import AttentionRule, Ops
from ..parallel import context as parallel_context
from ..parallel.sharding import Sharding
from .norm import Norm, ProjectionNorm
from .recompute import Recompute, again
from .rotary import Angles
from .shape import AttentionShape, NormShape
from .tokens import TokenContext
from .weights import new_column_parallel, new_row_parallel


class Attention(nn.Module):
    """x [B, T, H] -> [B, T, H] through A query heads that share K key-value heads of size D.

    Each rank of tensor parallel holds A/tp and K/tp of them, or one where K < tp.
    """

    def __init__(
        self,
        layer: int,
        shape: AttentionShape,
        sharding: Sharding,
        ops: Ops,
        seed: int | None,
        recompute: Recompute,
    ):
        super().__init__()
        self.layer = layer
        self.ops = ops
        self.rule = AttentionRule(shape.scale, shape.softcap, shape.window)
        self.head_size = shape.head_size
        self.interleaved = shape.interleaved
        self.dropout = shape.dropout
        self.recomputes = recompute.selective

        heads = shape.heads // sharding.tp.size
        kv_heads = shape.kv_heads * sharding.kv.size // sharding.tp.size
        self.heads = heads, kv_heads, kv_heads  # of q, k and v on this rank
        self.qkv = new_column_parallel(shape.qkv, sharding, ops, seed)
        self.normalizes = shape.q_norm is not None
        self.q_norm = _head_norm(shape.q_norm, sharding, ops, seed)
        self.k_norm = _head_norm(shape.k_norm, sharding, ops, seed)
        self.out = new_row_parallel(shape.out, sharding, ops, seed)
        self.mix_over_ranks = partial(
            parallel_context.attention,
            cp=sharding.cp,
            comm_type=sharding.cp_comm_type,
            ops=ops,
            rule=self.rule,
        )

    def forward(self, x: Tensor, angles: Angles | None, context: TokenContext) -> Tensor:
        qkv = self.qkv(x)
        batch, length, _ = qkv.shape
        heads = qkv.view(batch, length, -1, self.head_size)
        if angles is not None and not self.normalizes:
            # Our own kernel turns q and k where they stand, without a copy.
            q, k, v = self.ops.split_heads(heads, self.heads, *angles, self.interleaved)
        else:
            q, k, v = heads.split(self.heads, dim=2)
            q = self.q_norm(q)
            k = self.k_norm(k)
            if angles is not None:
                q = self.ops.rope(q, *angles, self.interleaved)
                k = self.ops.rope(k, *angles, self.interleaved)
        if context.past is not None:
            mixed = context.past.attend(self.layer, q, k, v)
        else:
            mixed = self._mix(q, k, v, context)
        return self.out(mixed.reshape(batch, length, -1))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, context: TokenContext) -> Tensor:
        """Mix values over the whole sequence, which the ranks of cp hold together."""
        mix = partial(
            self.mix_over_ranks,
            documents=context.documents,
            dropout=self.dropout if self.training else 0.0,
        )
        if self.recomputes:
            return again(mix, q, k, v)
        return mix(q, k, v)


def _head_norm(
    shape: NormShape | None, sharding: Sharding, ops: Ops, seed: int | None
) -> nn.Module:
    """Make the norm of queries or keys: of each head, of the projection, or none."""
    if shape is None:
        return nn.Identity()
    if shape.over_projection:
        return ProjectionNorm(shape, sharding, seed)
    return Norm(shape, sharding, ops, seed)
