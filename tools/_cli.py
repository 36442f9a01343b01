"""How every tool ends: one line on stderr for whatever went wrong, status 2 for a bad argument and 1 for anything else."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trivium.config import FlagError


class BadArgument(ValueError):
    """An argument of a tool that cannot be meant."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage lines in front of an error; its epilog is an example, kept as written."""

    def __init__(self, description: str, example: str):
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise BadArgument(message.removeprefix("argument "))


def positive(text: str) -> int:
    """An integer of 1 or more, as an argparse type."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """An integer of 0 or more, as an argparse type."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 0 or more")
    return int(text)


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Call `main` with the arguments and exit: 0, 2 on a bad argument, 1 on other errors of value or system, 130 on Ctrl-C."""
    status, message = 0, ""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except ValueError as error:
        message = str(error)
        status = 2 if isinstance(error, BadArgument | FlagError) else 1
    except OSError as error:
        status, message = (
            1,
            f"{error.filename or 'system'}: {(error.strerror or str(error)).lower()}",
        )
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
