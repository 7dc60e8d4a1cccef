"""The command `mmbeam inspect`."""

import argparse
import json
from collections.abc import Generator
from dataclasses import asdict

from mmbeam.commands.common import SOME_UNITS_FAILED, field_arguments, fields_of, listing_arguments

ABOUT = "Show the contents of shards, from their first samples."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam inspect`."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="path, glob, brace range, list file or directory")
    parser.epilog = "Example: mmbeam inspect 'shards/*.tar'"
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    listing_arguments(parser)
    field_arguments(parser)


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Yield a description of the shards. The exit status is 3 if a shard is missing, cut off or not readable."""
    from mmbeam.report.inspect import inspect, inspect_text

    contents = inspect(args.shards, fields_of(args), args.strict_input, args.allow_local_paths)
    yield from [json.dumps(asdict(contents), ensure_ascii=False)] if args.json else inspect_text(contents)
    return SOME_UNITS_FAILED if contents.bad else 0
