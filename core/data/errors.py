"""Define the errors of data: one line each, with the file, the place, the fault and the remedy."""

from ..config import FlagError


class DataError(ValueError):
    """Data that cannot be used as it is."""


class DataFlagError(DataError, FlagError):
    """Data or a tokenizer that a flag asks for and that cannot be had.

    The message begins with the flag.
    """
