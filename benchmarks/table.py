"""Print tables: columns that know their title, their width and how to write a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table, aligned to the right.

    title: the word at its head
    width: characters
    text: writes the column's cell of a row
    """

    title: str
    width: int
    text: Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """A table whose rows begin with a name.

    title: what stands above the names
    width: characters of the names
    """

    title: str
    width: int
    columns: Sequence[Column]

    def header(self) -> str:
        """Return the line of titles."""
        titles = "".join(f"{column.title:>{column.width}}" for column in self.columns)
        return f"{self.title:<{self.width}}{titles}"

    def line(self, name: str, row: Row) -> str:
        """Return the line of one row."""
        cells = "".join(f"{column.text(row):>{column.width}}" for column in self.columns)
        return f"{name:<{self.width}}{cells}"


def number(key: str, digits: int = 0, scale: float = 1.0) -> Callable[[Row], str]:
    """Return a writer of row[key] * scale with so many decimal places.

    scale: for example 1e-6 to write bytes as MB
    """

    def text(row: Row) -> str:
        return f"{row[key] * scale:.{digits}f}"

    return text


def share(key: str, digits: int = 0) -> Callable[[Row], str]:
    """Return a writer of row[key] as a percentage."""
    return lambda row: f"{row[key]:.{digits}%}"


def ratio(key: str) -> Callable[[Row], str]:
    """Return a writer of row[key] with two decimal places, or - where the row has none."""
    return lambda row: f"{row[key]:.2f}" if key in row else "-"
