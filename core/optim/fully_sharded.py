"""ZeRO-3: the parameters themselves cut over data parallel by torch's fully_shard, and each of them updated like a bucket."""

from collections.abc import Iterable

import torch
from torch import nn

from .. import comm
from ..layout import attach_layout, layout_of
from .buckets import Reduction, Shard


class ShardedParameter(Shard):
    """The rows of one parameter that this rank holds, fp32: those that torch.chunk gives it over `shards`, for the last ranks perhaps none.

    fully_shard gathers the parameters of a unit in the working dtype before its passes and frees them after. Their gradients it sums
    over the shards after each micro-batch, and adds up the sums in fp32.
    """

    def __init__(self, parameter: nn.Parameter, unit: nn.Module, reduction: Reduction):
        self.parameters, self.slots, self.reduction, self._unit = (
            [parameter],
            [(0, parameter.numel())],
            reduction,
            unit,
        )
        rows, shards = parameter.shape[0], reduction.shards
        self.start = min(shards.rank * -(-rows // shards.size), rows) * (parameter.numel() // rows)
        self.decayed = self.masters.numel() if parameter.dim() > 1 else 0

    @property
    def masters(self) -> torch.Tensor:
        return _local(
            self.parameters[0]
        )  # looked up again each time: the first forward pass may move it

    @property
    def gradients(self) -> torch.Tensor:
        return _local(self.parameters[0].grad)

    @property
    def own_weights(self) -> torch.Tensor:
        return self.masters

    def begin(self, micro_batches: int) -> None:
        self.parameters[0].grad = None

    def start_reduction(self) -> None:
        if self.parameters[0].grad is None:
            raise RuntimeError(f"{self}: no gradient: no micro-batch used it")

    def finish(self) -> None:
        comm.all_reduce(self.gradients, self.reduction.copies)

    def start_gather(self) -> None:
        self._unit.reshard()  # the next pass gathers, even where an evaluation has left old weights in place

    def wait_for_weights(self) -> None:
        pass

    def __str__(self) -> str:
        return f"shard of {layout_of(self.parameters[0]).parts[0].name}"


def cut_parameters(
    model: nn.Module,
    units: Iterable[nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    reduction: Reduction,
) -> list[ShardedParameter]:
    """Cut the fp32 parameters of `model` over the shards of `reduction` (2 or more), and move them to `device` unit by unit.

    Each of `units`, and then what is left of the model, is gathered by itself, in `dtype`. Zhao et al. 2023; Rajbhandari et al. 2020, P_os+g+p.
    """
    # Imported here: they take a second, which runs without ZeRO-3 need not wait for.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = DeviceMesh.from_group(reduction.shards.group, device.type)
    # Inputs keep their dtype: what a module is given in fp32, such as the angles of positions, is meant to be fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    cut: list[ShardedParameter] = []
    for unit in (*units, model):
        layouts = {
            name: layout_of(parameter)
            for name, parameter in unit.named_parameters()
            if not isinstance(parameter, DTensor)
        }
        # What is left of the model (embedding, head) is used last and first of all: freed in between, it would be gathered again at once.
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not model, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)  # the sum; by default it would be the mean
        unit.set_force_sum_reduction_for_comms(
            True
        )  # and by plain sums, the only ones that gloo has
        parameters = dict(unit.named_parameters())
        for name, layout in layouts.items():
            attach_layout(parameters[name], layout)
            cut.append(ShardedParameter(parameters[name], unit, reduction))
    return cut


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a DTensor on this rank, flat."""
    with torch.no_grad():
        return tensor.to_local().view(-1)
