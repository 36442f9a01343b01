"""The one logger: every line a rank writes goes through here, rank 0 bare, the others with their rank in front."""

import logging
import os
import sys

LOGGER_NAME = "trivium"


class _Formatter(logging.Formatter):
    """`message` on rank 0; `[rank 3] message` elsewhere; WARNING and ERROR say so."""

    def __init__(self, rank: int):
        super().__init__()
        self.prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.prefix}{level}{record.getMessage()}"


class _StdoutHandler(logging.StreamHandler):
    """Writes to what sys.stdout is at the moment: a progress bar puts itself in its place, to keep below the lines."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:
        """A reader that has gone away (`| head`, a dead tee) does not end a run: it goes on in silence."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        else:
            super().handleError(record)


def get_logger() -> logging.Logger:
    """The logger of the engine. Without `setup` it is silent below WARNING, as a library should be."""
    return logging.getLogger(LOGGER_NAME)


def setup(rank: int = 0) -> logging.Logger:
    """Lines go to stdout, each flushed as it is written. Ranks other than 0 speak only from WARNING up."""
    logger = get_logger()
    handler = _StdoutHandler()
    handler.setFormatter(_Formatter(rank))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger
