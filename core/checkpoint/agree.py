"""What every rank must know alike before a checkpoint is published or applied: did one fail, why, and which iteration it is about."""

from collections.abc import Callable

import torch

from ..comm import all_reduce
from ..mesh import Axis
from .manifest import CheckpointError, one_line

_MESSAGE_BYTES = 2000


def together(action: Callable[[], None], world: Axis, device: torch.device) -> None:
    """Run `action` on this rank; raise the same CheckpointError on every rank if it failed on one, the lowest failing rank's.

    Any exception counts: a rank that left alone would keep the others waiting for their timeout.
    """
    message, cause = None, None
    try:
        action()
    except Exception as error:
        cause = error
        message = one_line(error)
    shared = _lowest_message(message, world, device)
    if shared is not None:
        raise CheckpointError(shared) from cause


def from_first(value: int, world: Axis, device: torch.device) -> int:
    """The first rank's `value`, a non-negative integer or -1, on every rank."""
    mine = value if world.rank == 0 else -1
    return int(
        all_reduce(torch.tensor(mine, dtype=torch.int64, device=device), world, "max").item()
    )


def _lowest_message(message: str | None, world: Axis, device: torch.device) -> str | None:
    failed = torch.tensor(
        world.size if message is None else world.rank, dtype=torch.int64, device=device
    )
    lowest = int(all_reduce(failed, world, "min").item())
    if lowest == world.size:
        return None
    text = torch.zeros(_MESSAGE_BYTES, dtype=torch.int32)
    if lowest == world.rank:
        line = message.encode()[:_MESSAGE_BYTES]
        text[: len(line)] = torch.tensor(list(line), dtype=torch.int32)
    codes = all_reduce(text.to(device), world, "max").tolist()
    line = bytes(code for code in codes if code).decode(errors="replace")
    return line if world.size == 1 else f"rank {lowest}: {line}"
