"""The command `mmbeam inspect`."""

import argparse
from collections.abc import Generator

from mmbeam.commands.common import field_arguments, fields_of, listing_arguments

ABOUT = "Show the contents of shards, from their first samples."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam inspect`."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="path, glob, brace range, list file or directory")
    listing_arguments(parser)
    field_arguments(parser)


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Yield a description of the shards."""
    from mmbeam.report.inspect import inspect_text

    yield from inspect_text(args.shards, fields_of(args), args.strict_input, args.allow_local_paths)
    return 0
