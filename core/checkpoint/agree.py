"""Agreement of all ranks before a checkpoint is published or applied.

Did one fail, and why? Which iteration is it about? A rank that answered for itself alone would go
on, or leave, while the others wait for it in the next collective until their timeout.
"""

from collections.abc import Callable

import torch

from ..comm import all_reduce
from ..mesh import Axis
from .manifest import CheckpointError, one_line

_MESSAGE_BYTES = 2000


def together(action: Callable[[], None], world: Axis, device: torch.device) -> None:
    """Run `action` on this rank; raise on every rank if it failed on one.

    All raise the same CheckpointError, that of the lowest failing rank. Any exception counts: a
    rank that left alone would keep the others waiting for their timeout.
    """
    message: str | None = None
    cause: Exception | None = None
    try:
        action()
    except Exception as error:
        cause = error
        message = one_line(error)
    shared = _lowest_message(message, world, device)
    if shared is not None:
        raise CheckpointError(shared) from cause


def from_first(value: int, world: Axis, device: torch.device) -> int:
    """Return the first rank's `value`, a non-negative integer or -1, on every rank."""
    mine = value if world.rank == 0 else -1
    number = _number(mine, device)
    shared = all_reduce(number, world, "max")
    return int(shared.item())


def _lowest_message(message: str | None, world: Axis, device: torch.device) -> str | None:
    """Return the message of the lowest rank that has one; None if there is none."""
    mine = world.size if message is None else world.rank
    number = _number(mine, device)
    shared = all_reduce(number, world, "min")
    lowest = int(shared.item())
    if lowest == world.size:
        return None
    # A text travels as the maximum of its bytes: all ranks but one give zeros.
    codes = torch.zeros(_MESSAGE_BYTES, dtype=torch.int32)
    if message is not None and lowest == world.rank:
        line = message.encode()[:_MESSAGE_BYTES]
        own = torch.tensor(list(line), dtype=torch.int32)
        codes[: len(line)] = own
    codes = codes.to(device)
    shared = all_reduce(codes, world, "max")
    filled = [code for code in shared.tolist() if code]
    # "replace": the cut at _MESSAGE_BYTES may have split a character.
    text = bytes(filled).decode(errors="replace")
    if world.size == 1:
        return text
    return f"rank {lowest}: {text}"


def _number(value: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)
