"""The end of a run by an error: the message for the user, and the exit status."""

import sys
from typing import NamedTuple

from .. import launch
from ..checkpoint.manifest import CheckpointError
from ..comm import CommunicationError
from ..config import ConfigError, FlagError
from ..data.errors import DataError

BAD_CONFIGURATION = 2  # as argparse has it
FAILED = 1
INTERRUPTED = 128 + 2  # a shell's word for an end by SIGINT


class Failure(NamedTuple):
    """An error that the user can do something about.

    on_every_rank: all ranks have found the same, so that one message is enough.
    """

    message: str
    status: int
    on_every_rank: bool = False


def failure_of(error: BaseException, process: launch.Process) -> Failure | None:
    """Return what to tell the user about an error; None for one that is ours to mend."""
    # The kinds of ValueError stand before the wider kinds, which a bug may raise as well.
    match error:
        case ConfigError():
            return Failure(str(error), BAD_CONFIGURATION, on_every_rank=True)
        case FlagError():
            return Failure(str(error), BAD_CONFIGURATION)
        case CheckpointError() | DataError() | CommunicationError():
            return Failure(str(error), FAILED)
        case OSError():
            reason = (error.strerror or str(error)).lower()
            return Failure(f"{error.filename or 'a file'}: {reason}", FAILED)
        case RuntimeError():
            # PyTorch has no class of its own for processes that did not meet.
            missed = launch.missed_meeting(error, process)
            return Failure(missed, FAILED) if missed else None
        case KeyboardInterrupt():
            remedy = "the same command with --load resumes from the last checkpoint"
            return Failure(f"interrupted; {remedy}", INTERRUPTED)
    return None


def tell(failure: Failure, program: str, process: launch.Process) -> int:
    """Write the message of a failure to stderr; return the exit status.

    One that every rank has found is told by rank 0 alone, and the others wait meanwhile.
    """
    if failure.on_every_rank and process.rank > 0:
        launch.wait_to_leave()
        return failure.status
    rank = f"[rank {process.rank}] " if process.rank else ""
    sys.stderr.write(f"{rank}{program}: {failure.message}\n")
    return failure.status
