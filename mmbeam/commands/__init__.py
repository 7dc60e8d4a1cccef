"""The commands of the command line, one module each: its arguments, and what it does.

To add a command: write a module with ABOUT, `add_arguments` and `run`, and name it here. `run` yields the
lines to show and returns the exit status. What is slow to import is imported in `run`.
"""

import argparse
import importlib
from collections.abc import Generator, Sequence
from typing import NoReturn, Protocol, cast

from mmbeam import __version__
from mmbeam.errors import UsageError

COMMANDS = ("caption", "demo", "embed", "evaluate", "inspect", "status", "train")


class Command(Protocol):
    """What a module of this package has."""

    ABOUT: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> Generator[str, None, int]: ...


def command(name: str) -> Command:
    """The module of the command `name`."""
    return cast(Command, importlib.import_module(f"{__name__}.{name}"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the command's name in `command` and those left for Apache Beam in `beam_args`.

    Raises UsageError.
    """
    args, rest = _parser().parse_known_args(argv)
    if rest and not args.takes_beam_options:
        raise UsageError(f"unknown argument {rest[0]} (see `mmbeam {args.command} --help`)")
    args.beam_args = tuple(rest)
    return args


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="mmbeam",
        description="Embeddings and captions for buckets of image-text-audio shards.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmbeam {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = command(name)
        own = commands.add_parser(name, help=module.ABOUT, description=module.ABOUT, allow_abbrev=False)
        own.add_argument("--verbose", action="store_true", help="log what the libraries say; tracebacks of errors")
        own.set_defaults(takes_beam_options=False)
        module.add_arguments(own)
    return parser
