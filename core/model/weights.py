"""Parameters from their shapes: the one place where a ParameterShape becomes a Layout.

A shape is global and knows no ranks; a layout says what this rank holds of it. So [2 F, H] of two
parts gate and up, cut by rows, becomes over two ranks of tp a local tensor [F, H]: the upper half
of gate's rows on rank 0, the lower half on rank 1, and below them the same half of up's.
"""

from torch import nn

from .. import rng
from ..layout import Layout, Rows
from ..ops import Ops
from ..parallel.layers import ColumnParallelLinear, RowParallelLinear
from ..parallel.sharding import Sharding
from .shape import LinearShape, ParameterShape, TensorCut


def layout_for(shape: ParameterShape, sharding: Sharding) -> Layout:
    """Return which boxes of the parts this rank holds."""
    part = shape.parts[0]
    tp = sharding.tp
    role = shape.role
    if shape.cut == TensorCut.ROWS:
        rows = _rows_of_parts(shape, sharding)
        return Layout.rows_cut(rows, part.shape[1:], tp, role=role)
    if shape.cut == TensorCut.COLUMNS:
        outputs, inputs = part.shape
        return Layout.columns_cut(part.name, outputs, inputs, tp, role=role)
    if shape.cut == TensorCut.VOCABULARY:
        words, columns = part.shape
        padded = shape.local_numel(tp.size) // columns * tp.size
        return Layout.vocabulary_cut(part.name, words, padded, columns, tp, role=role)
    # Whole on every rank. Its gradient is not where ranks see other heads, or other tokens.
    partial = sharding.sequence_parallel or shape.cut == TensorCut.HEADS
    return Layout.whole(part.name, part.shape, tp, partial=partial, role=role)


def new_parameter(shape: ParameterShape, sharding: Sharding, seed: int | None) -> nn.Parameter:
    """Make this rank's part of a parameter, with the initial values that `seed` gives.

    seed None: memory alone, for a checkpoint to be loaded into.
    """
    init = rng.Init(seed, shape.std, shape.fill)
    return rng.new_parameter(layout_for(shape, sharding), init)


def new_bias(
    shape: ParameterShape | None,
    sharding: Sharding,
    seed: int | None,
) -> nn.Parameter | None:
    """Make a bias, where there is one."""
    if shape is None:
        return None
    return new_parameter(shape, sharding, seed)


def new_column_parallel(
    shape: LinearShape,
    sharding: Sharding,
    ops: Ops,
    seed: int | None,
) -> ColumnParallelLinear:
    """Make a layer whose weight is cut by rows: each rank computes its own features."""
    weight = new_parameter(shape.weight, sharding, seed)
    bias = new_bias(shape.bias, sharding, seed)
    return ColumnParallelLinear(weight, bias, sharding, ops)


def new_row_parallel(
    shape: LinearShape,
    sharding: Sharding,
    ops: Ops,
    seed: int | None,
) -> RowParallelLinear:
    """Make a layer whose weight is cut by columns: the ranks' products are summed."""
    weight = new_parameter(shape.weight, sharding, seed)
    bias = new_bias(shape.bias, sharding, seed)
    return RowParallelLinear(weight, bias, sharding, ops)


def _rows_of_parts(shape: ParameterShape, sharding: Sharding) -> dict[str, int | Rows]:
    """Return the rows of each part by name.

    Heads that are fewer than the ranks are held by several of them: the ranks of `kv` are copies.
    """
    found: dict[str, int | Rows] = {}
    for part in shape.parts:
        rows = part.shape[0]
        found[part.name] = rows
        if part.shared_heads is not None:
            found[part.name] = Rows(rows, sharding.kv)
    return found
