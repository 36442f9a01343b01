"""The one logger: every line that a rank writes goes through here.

Lines of rank 0 stand bare; those of other ranks have their rank in front.
"""

import logging
import os
import sys
from typing import TextIO

LOGGER_NAME = "trivium"


class _Formatter(logging.Formatter):
    """`message` on rank 0, `[rank 3] message` elsewhere; WARNING and ERROR say so."""

    def __init__(self, rank: int):
        super().__init__()
        self.prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno < logging.WARNING:
            return self.prefix + message
        level = record.levelname.lower()
        return f"{self.prefix}{level}: {message}"


class _StdoutHandler(logging.StreamHandler):
    """Writes to what sys.stdout is at the moment.

    A progress bar puts itself in the place of stdout, so that it stays below the lines.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:
        # A reader that has gone away (`| head`, a dead tee) does not end a run: it goes on in
        # silence.
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        else:
            super().handleError(record)


def get_logger() -> logging.Logger:
    """Return the logger of the engine.

    Without `setup` it is silent below WARNING, as a library should be.
    """
    return logging.getLogger(LOGGER_NAME)


def setup(rank: int = 0) -> logging.Logger:
    """Send the lines to stdout, each flushed as it is written; return the logger.

    Ranks other than 0 speak only from WARNING up.
    """
    logger = get_logger()
    handler = _StdoutHandler()
    handler.setFormatter(_Formatter(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger
