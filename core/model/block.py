"""One layer of the model: attention and feed-forward layer, each a branch off the residual stream.

Letters: model/shape.py.
"""

from torch import Tensor, nn

from .. import rng
from ..ops import Ops
from ..parallel.sharding import Sharding
from .attention import Attention
from .mlp import MLP
from .norm import norm_at
from .recompute import Recompute
from .rotary import Angles
from .shape import LayerShape
from .tokens import TokenContext


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch under hidden dropout.

    x: [B, T, H], or [B, T/tp, H] under sequence parallel. With --norm-placement post a block is
    x + norm(attention(x)), with both x + norm(attention(norm(x))), and so on for the mlp; with
    --parallel-residual both branches read the same x.
    """

    def __init__(
        self,
        shape: LayerShape,
        sharding: Sharding,
        ops: Ops,
        seed: int | None,
        recompute: Recompute,
    ):
        super().__init__()
        self.shape = shape
        self.name, self.layer = shape.name, shape.layer
        self.dropout = shape.dropout
        self.windowed = shape.attention.window is not None
        self.parallel_residual = shape.parallel_residual
        self.attention_norm = norm_at(shape.attention_norm, sharding, ops, seed)
        self.attention = Attention(shape.layer, shape.attention, sharding, ops, seed, recompute)
        self.attention_post_norm = norm_at(shape.attention_post_norm, sharding, ops, seed)
        self.mlp_norm = norm_at(shape.mlp_norm, sharding, ops, seed)
        self.mlp = MLP(shape.mlp, sharding, ops, seed)
        self.mlp_post_norm = norm_at(shape.mlp_post_norm, sharding, ops, seed)

    def forward(self, x: Tensor, angles: Angles | None, context: TokenContext) -> Tensor:
        if context.past is not None:
            whole = context.past.step(self.layer, x, angles)
            if whole is not None:
                return whole
        drops = self.dropout > 0.0 and context.stream is not None
        branch = self.attention(self.attention_norm(x), angles, context)
        branch = self.attention_post_norm(branch)
        if drops:
            branch = rng.dropout(branch, self.dropout, context.stream, f"{self.name}.attention")
        if self.parallel_residual:
            attended, normalized = x + branch, self.mlp_norm(x)
        else:
            attended, normalized = self.mlp_norm.add(x, branch)
        branch = self.mlp_post_norm(self.mlp(normalized))
        if drops:
            branch = rng.dropout(branch, self.dropout, context.stream, f"{self.name}.mlp")
        return attended + branch
