"""Count the bytes that a rank sends."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    """The rule that counts one operation of torch.distributed.

    name: how tables call it
    argument: position of the argument that holds what is moved
    shares: bytes sent over bytes held, in units of (n - 1) / n for n ranks; None: all of them
    """

    name: str
    argument: int
    shares: int | None


COLLECTIVES = {
    "allreduce_": Collective("all-reduce", 0, 2),
    "_reduce_scatter_base_": Collective("reduce-scatter", 1, 1),
    "_allgather_base_": Collective("all-gather", 0, 1),
    "alltoall_base_": Collective("all-to-all", 0, 1),
    "send": Collective("send", 0, None),
}


class Traffic(TorchDispatchMode):
    """A counter of the bytes that this rank sends while it is entered.

    Collectives count by their ring algorithms: (n - 1) / n of a tensor, twice that to all-reduce.
    `sent` holds the bytes of each kind of operation.
    """

    def __init__(self):
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func._opname in COLLECTIVES:
            kind = COLLECTIVES[func._opname]
            self.sent[kind.name] = self.sent.get(kind.name, 0) + bytes_sent(kind, args)
        return func(*args, **(kwargs or {}))


def bytes_sent(kind: Collective, arguments: tuple) -> int:
    """Return the bytes that this rank sends in one operation."""
    moved = arguments[kind.argument]
    tensors = moved if isinstance(moved, list | tuple) else [moved]
    size = sum(tensor.nbytes for tensor in tensors)
    if kind.shares is None:
        return size
    handles = [argument for argument in arguments if isinstance(argument, torch.ScriptObject)]
    ranks = dist.ProcessGroup.unbox(handles[0]).size()
    return size * kind.shares * (ranks - 1) // ranks
