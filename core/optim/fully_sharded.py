"""ZeRO-3: the parameters themselves cut over data parallel by torch's fully_shard.

Each of them is a shard of its own to the optimizer, as a bucket is.

A unit of the model (a block) runs on all ranks in every pass, because its weights are gathered for
it. A parameter inside that a pass does not use has a gradient of zeros there (torch 2.13 and later;
before, all ranks must use the same ones).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import comm
from ..layout import attach_layout, layout_of
from .buckets import Reduction, Shard


class ShardedParameter(Shard):
    """The rows of one parameter that this rank holds, fp32; for the last ranks there may be none.

    They are those that torch.chunk gives it over `shards`. fully_shard gathers the parameters of a
    unit in the working dtype before its passes and frees them after. It sums their gradients over
    the shards after each micro-batch, and adds up the sums in fp32.
    """

    def __init__(self, parameter: nn.Parameter, unit: Any, reduction: Reduction):
        self._parameter = parameter
        self._unit = unit
        rows = parameter.shape[0]
        shards = reduction.shards
        first_row = min(shards.rank * -(-rows // shards.size), rows)
        start = first_row * (parameter.numel() // rows)
        slots = [(0, parameter.numel())]
        super().__init__([parameter], slots, reduction, start, self.masters.numel())

    @property
    def masters(self) -> torch.Tensor:
        # Looked up each time: the first forward pass may move it.
        return _local(self._parameter)

    @property
    def gradients(self) -> torch.Tensor:
        gradient = self._parameter.grad
        assert gradient is not None, f"{self}: gradients before the end of an update"
        return _local(gradient)

    @property
    def own_weights(self) -> torch.Tensor:
        return self.masters

    def begin(self, micro_batches: int) -> None:
        self._parameter.grad = None

    def start_reduction(self) -> None:
        if self._parameter.grad is None:  # no micro-batch used it, on any rank
            self._parameter.grad = torch.zeros_like(self._parameter.detach())

    def finish(self) -> None:
        comm.all_reduce(self.gradients, self.reduction.copies)

    def start_gather(self) -> None:
        # The next pass gathers, even if an evaluation has left old weights in place.
        self._unit.reshard()

    def wait_for_weights(self) -> None:
        pass

    def __str__(self) -> str:
        return f"shard of {self.layouts[0].parts[0].name}"


def cut_parameters(
    model: nn.Module,
    units: Iterable[nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    reduction: Reduction,
) -> list[ShardedParameter]:
    """Cut the fp32 parameters of `model` over the shards of `reduction`, which are 2 or more.

    They are moved to `device` unit by unit. Each of `units`, and then what is left of the model, is
    gathered by itself, in `dtype`. Zhao et al. 2023; Rajbhandari et al. 2020, P_os+g+p.
    """
    # Imported here: they take a second, which runs without ZeRO-3 need not wait for.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    group = reduction.shards.group
    assert group is not None, "ZeRO-3 over a mesh that is not connected"
    mesh = DeviceMesh.from_group(group, device.type)
    # Inputs keep their dtype: what a module is given in fp32, such as the angles of positions, is
    # meant to be fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    cut: list[ShardedParameter] = []
    for unit in (*units, model):
        # What is left of the model (embedding, head) is used last and first of all: freed in
        # between, it would be gathered again at once.
        for parameter in _cut_unit(unit, mesh, policy, frees=unit is not model):
            cut.append(ShardedParameter(parameter, unit, reduction))
    return cut


def _cut_unit(unit: nn.Module, mesh: Any, policy: Any, *, frees: bool) -> list[nn.Parameter]:
    """Cut the parameters of a unit that are still whole, and return them with their layouts.

    frees: free the gathered parameters after a forward pass.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layouts = {
        name: layout_of(parameter)
        for name, parameter in unit.named_parameters()
        if not isinstance(parameter, DTensor)
    }
    sharded: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=frees, mp_policy=policy)
    sharded.set_gradient_divide_factor(1.0)  # the sum; by default it would be the mean
    sharded.set_force_sum_reduction_for_comms(True)  # plain sums, the only ones that gloo has
    if hasattr(sharded, "set_reduce_scatter_unused_params"):  # torch 2.13 and later
        # A rank that leaves a parameter out adds zeros, so that all ranks reduce the same ones.
        sharded.set_reduce_scatter_unused_params(True)
    parameters = dict(unit.named_parameters())
    for name, layout in layouts.items():
        attach_layout(parameters[name], layout)
    return [parameters[name] for name in layouts]


def _local(tensor: Any) -> torch.Tensor:
    """Return the memory of a DTensor on this rank, flat."""
    with torch.no_grad():
        return tensor.to_local().view(-1)
