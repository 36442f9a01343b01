"""Write the sentences that several checks share: numbers that are out of range."""

from collections.abc import Iterator

from ..fields import flag_of


def positive(section: object, *names: str) -> Iterator[str]:
    """Yield a problem for each field that is given and not above 0."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            yield f"{flag_of(name)} {value} must be above 0"


def not_negative(section: object, *names: str) -> Iterator[str]:
    """Yield a problem for each field that is negative."""
    for name in names:
        value = getattr(section, name)
        if value < 0:
            yield f"{flag_of(name)} {value} must not be negative"


def share(section: object, *names: str) -> Iterator[str]:
    """Yield a problem for each field that is not in [0, 1)."""
    for name in names:
        value = getattr(section, name)
        if not 0 <= value < 1:
            yield f"{flag_of(name)} {value} is not in [0, 1)"


def nearest_multiples(value: int, unit: int) -> str:
    """Return the multiples of `unit` next to `value`, as a remedy."""
    below = value // unit * unit
    above = below + unit
    return f"{below}, {above}" if below else str(above)
