"""Parameters from their shapes: the one place where a ParameterShape becomes a Layout."""

from torch import nn

from .. import rng
from ..layout import Layout, Rows
from ..ops import Ops
from ..parallel.linear import ColumnParallelLinear, RowParallelLinear
from ..parallel.sharding import Sharding
from .shape import LinearShape, ParameterShape, TensorCut


def layout_for(shape: ParameterShape, sharding: Sharding) -> Layout:
    """Return which boxes of the parts this rank holds."""
    part, tp = shape.parts[0], sharding.tp
    if shape.cut == TensorCut.ROWS:
        return Layout.rows_cut(_rows(shape, sharding), part.shape[1:], tp, role=shape.role)
    if shape.cut == TensorCut.COLUMNS:
        return Layout.columns_cut(part.name, *part.shape, tp, role=shape.role)
    if shape.cut == TensorCut.VOCABULARY:
        rows, columns = part.shape
        padded = shape.local_numel(tp.size) // columns * tp.size
        return Layout.vocabulary_cut(part.name, rows, padded, columns, tp, role=shape.role)
    partial = sharding.sequence_parallel or shape.cut == TensorCut.HEADS
    return Layout.whole(part.name, part.shape, tp, partial=partial, role=shape.role)


def new_parameter(shape: ParameterShape, sharding: Sharding, seed: int | None) -> nn.Parameter:
    """Make this rank's part of a parameter, with its initial values; seed None leaves them zero."""
    init = rng.Init(seed, shape.std, shape.fill)
    return rng.new_parameter(layout_for(shape, sharding), init)


def new_bias(
    shape: ParameterShape | None, sharding: Sharding, seed: int | None
) -> nn.Parameter | None:
    """Make a bias, where there is one."""
    return None if shape is None else new_parameter(shape, sharding, seed)


def column_parallel(
    shape: LinearShape, sharding: Sharding, ops: Ops, seed: int | None
) -> ColumnParallelLinear:
    """Make a layer whose weight is cut by rows."""
    weight = new_parameter(shape.weight, sharding, seed)
    return ColumnParallelLinear(weight, new_bias(shape.bias, sharding, seed), sharding, ops)


def row_parallel(
    shape: LinearShape, sharding: Sharding, ops: Ops, seed: int | None
) -> RowParallelLinear:
    """Make a layer whose weight is cut by columns."""
    weight = new_parameter(shape.weight, sharding, seed)
    return RowParallelLinear(weight, new_bias(shape.bias, sharding, seed), sharding, ops)


def _rows(shape: ParameterShape, sharding: Sharding) -> dict[str, int | Rows]:
    """Return the rows of each part; those of shared heads have copies where ranks outnumber heads."""
    found: dict[str, int | Rows] = {}
    for part in shape.parts:
        rows = part.shape[0]
        found[part.name] = rows if part.shared_heads is None else Rows(rows, sharding.kv)
    return found
