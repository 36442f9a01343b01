"""Linear layers of a test: made from the rows of their parts, without the shape of a model."""

from trivium.layout import Layout, Role, Rows
from trivium.ops import Ops
from trivium.parallel.layers import ColumnParallelLinear, RowParallelLinear
from trivium.parallel.sharding import Sharding
from trivium.rng import Init, new_parameter


def column_parallel(
    inputs: int, parts: dict[str, int | Rows], sharding: Sharding, init: Init, *, bias: bool
) -> ColumnParallelLinear:
    """Make a layer from `inputs` features to the rows of all parts, its bias zero."""
    weight = new_parameter(Layout.rows_cut(_named(parts, "weight"), (inputs,), sharding.tp), init)
    added = None
    if bias:
        layout = Layout.rows_cut(_named(parts, "bias"), (), sharding.tp, role=Role.BIAS)
        added = new_parameter(layout, Init(init.seed))
    return ColumnParallelLinear(weight, added, sharding, Ops())


def row_parallel(
    name: str, inputs: int, outputs: int, sharding: Sharding, init: Init
) -> RowParallelLinear:
    """Make a layer of `inputs` features to `outputs`, with a bias of zeros."""
    weight = Layout.columns_cut(f"{name}.weight", outputs, inputs, sharding.tp)
    bias = Layout.whole(
        f"{name}.bias",
        (outputs,),
        sharding.tp,
        partial=sharding.sequence_parallel,
        role=Role.BIAS,
    )
    parameters = new_parameter(weight, init), new_parameter(bias, Init(init.seed))
    return RowParallelLinear(*parameters, sharding, Ops())


def _named(parts: dict[str, int | Rows], kind: str) -> dict[str, int | Rows]:
    return {f"{name}.{kind}": rows for name, rows in parts.items()}
