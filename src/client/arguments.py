"""What the command lines of the client's programs have in common."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

_DEFAULT_URL: Final = "http://127.0.0.1:23333"


class Parser(argparse.ArgumentParser):
    """Takes underscores for dashes; a mistake is one line on standard error and exit code 2."""

    def __init__(self, program: str, description: str) -> None:
        super().__init__(prog=program, description=description, allow_abbrev=False)
        self.add_argument(
            "url", nargs="?", default=_DEFAULT_URL, metavar="URL", help=f"the server (default {_DEFAULT_URL})"
        )
        self.add_argument(
            "--api-key", default=os.environ.get("SHOAL_API_KEY"), metavar="KEY", help="default: $SHOAL_API_KEY"
        )
        self.add_argument(
            "--ca-file", metavar="PATH", help="the certificates that an https server is checked against"
        )
        self.add_argument(
            "--timeout",
            type=positive,
            default=600.0,
            metavar="S",
            help="seconds of silence to bear (default 600)",
        )

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Ends the program after --help and after a mistake."""
        return self.parse_args([_with_dashes(one) for one in argv])

    def error(self, message: str) -> NoReturn:
        """One line; --help has the rest."""
        sys.stderr.write(f"error: {message.removeprefix('argument ')}; see {self.prog} --help\n")
        sys.exit(2)


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, least=0.0, above=True)


def not_negative(text: str) -> float:
    """A number of at least 0."""
    return _number(text, least=0.0)


def share(text: str) -> float:
    """A number above 0, at most 1."""
    return _number(text, least=0.0, above=True, most=1.0)


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 0")
    return int(text)


def _number(text: str, *, least: float, most: float = float("inf"), above: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if (least < number if above else least <= number) and number <= most and number != float("inf"):
        return number
    limit = f"{'above' if above else 'at least'} {least:g}" + (
        f", at most {most:g}" if most < float("inf") else ""
    )
    raise argparse.ArgumentTypeError(f"{text}: must be a number {limit}")


def _with_dashes(argument: str) -> str:
    """``--session_id=3`` as ``--session-id=3``: both are customary."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
