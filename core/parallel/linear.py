"""Linear layers cut over an axis, by rows (column parallel) or by columns (row parallel) of the weight. H in, O out features."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import comm, rng
from ..layout import Layout
from ..mesh import Axis


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b, with W cut by rows: each rank of `tp` computes its own slice of the output features.

    x: [B, T, H] on every rank.   y: [B, T, O/tp], the slices of the parts one after another.
    `parts` maps the name of each projection in the fused weight to its rows (q, k, v of one GEMM); each is cut by itself.
    Shoeybi et al. 2019, section 3.
    """

    def __init__(self, in_features: int, parts: dict[str, int], tp: Axis, *, bias: bool, init: rng.Init):
        super().__init__()
        self.tp = tp
        self.weight = rng.new_parameter(Layout.rows_cut(_named(parts, "weight"), (in_features,), tp), init)
        self.bias = rng.new_parameter(Layout.rows_cut(_named(parts, "bias"), (), tp), rng.Init(init.seed)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(comm.copy_to(x, self.tp), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b, with W cut by columns: each rank of `tp` holds a slice of the input features, and the products are summed.

    x: [B, T, H/tp].   y: [B, T, O] on every rank. The bias is whole on every rank and added once, after the sum.
    """

    def __init__(self, name: str, in_features: int, out_features: int, tp: Axis, *, bias: bool, init: rng.Init):
        super().__init__()
        self.tp = tp
        self.weight = rng.new_parameter(Layout.columns_cut(f"{name}.weight", out_features, in_features, tp), init)
        self.bias = rng.new_parameter(Layout.whole(f"{name}.bias", (out_features,), tp), rng.Init(init.seed)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = comm.reduce_from(F.linear(x, self.weight), self.tp)
        return y if self.bias is None else y + self.bias


def _named(parts: dict[str, int], kind: str) -> dict[str, int]:
    return {f"{name}.{kind}": rows for name, rows in parts.items()}
