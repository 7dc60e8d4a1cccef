"""mmbeam inspect."""

import argparse
from collections.abc import Generator

from mmbeam.commands.common import field_arguments, fields_of

ABOUT = "Show what the first samples of the shards hold."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="SHARDS")
    field_arguments(parser)


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    from mmbeam.report.inspect import inspect_text

    yield from inspect_text(args.shards, fields_of(args))
    return 0
