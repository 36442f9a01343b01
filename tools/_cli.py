"""Parse arguments and end in the same way in every tool.

Whatever goes wrong is one line on stderr. The exit status is 2 for a bad argument, 1 for any other
error.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trivium.config import FlagError


class BadArgument(ValueError):
    """An argument of a tool that makes no sense."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage lines in front of an error.

    example: a command, printed as it is written at the end of --help
    """

    def __init__(self, description: str, example: str):
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise BadArgument, which `run` prints."""
        raise BadArgument(message.removeprefix("argument "))


def positive(text: str) -> int:
    """Parse an integer of 1 or more (an argparse type)."""
    if not is_number(text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """Parse an integer of 0 or more (an argparse type)."""
    if not is_number(text):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 0 or more")
    return int(text)


def is_number(text: str) -> bool:
    """Return whether a text has digits alone."""
    return text.isascii() and text.isdigit()


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Call `main` with the arguments and exit.

    The status is 0; 2 on a bad argument; 1 on other errors of value or system; 130 on Ctrl-C.
    """
    status = 0
    message = ""
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
        what = error.strerror or str(error)
        message = f"{error.filename or 'system'}: {what.lower()}"
        status = 1
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)
