"""The error of everything in this folder: one line that says which file, what is wrong with it, where, and the remedy."""


class DataError(ValueError):
    """Data that cannot be used as it is. A message about a flag begins with the flag."""
