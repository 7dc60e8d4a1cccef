"""The command `mmbeam status`."""

import argparse
from collections.abc import Generator

from mmbeam.commands.common import check_url

ABOUT = "Show the progress of the run in an output directory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam status`."""
    parser.epilog = "Example: mmbeam status out"
    parser.add_argument("output", metavar="OUT", help="the --output of a job")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Yield a description of the run."""
    from mmbeam.report.status import status_text

    check_url("OUT", args.output)
    yield from status_text(args.output)
    return 0
