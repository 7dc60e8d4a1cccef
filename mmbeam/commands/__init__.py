"""The commands, one module each: parsing and printing only.

To add a command, write a module with ABOUT, `add_arguments` and `run`, and add its name to COMMANDS. `run` yields the
lines to print and returns the exit status. Slow imports belong in `run`.
"""

import argparse
import importlib
from collections.abc import Generator, Sequence
from typing import NoReturn, Protocol, cast

from mmbeam.errors import UsageError
from mmbeam.names import VERSION

COMMANDS = ("caption", "demo", "embed", "evaluate", "export", "inspect", "report", "search", "status", "train")


class Command(Protocol):
    """The interface of a module of this package."""

    ABOUT: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the command."""

    def run(self, args: argparse.Namespace) -> Generator[str, None, int]:
        """Run the command: yield the lines to print, return the exit status."""


def command(name: str) -> Command:
    """Return the module of the command `name`."""
    return cast(Command, importlib.import_module(f"{__name__}.{name}"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. `command` is the command's name, `beam_args` are the arguments left for Apache Beam.

    Raise UsageError for invalid arguments.
    """
    args, unknown = _parser().parse_known_args(argv)
    if unknown and not args.takes_beam_options:
        raise UsageError(f"unknown argument {unknown[0]} (see `mmbeam {args.command} --help`)")
    args.beam_args = tuple(unknown)
    return args


class _Parser(argparse.ArgumentParser):
    """Reports invalid arguments in one line, as UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="mmbeam",
        description="Embeddings and captions for buckets of image-text-audio shards.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmbeam {VERSION}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = command(name)
        subparser = commands.add_parser(name, help=module.ABOUT, description=module.ABOUT, allow_abbrev=False)
        subparser.add_argument("--verbose", action="store_true", help="show logs of libraries and tracebacks")
        subparser.set_defaults(takes_beam_options=False)
        module.add_arguments(subparser)
    return parser
