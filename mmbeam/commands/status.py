"""mmbeam status."""

import argparse
from collections.abc import Generator

from mmbeam.commands.common import check_url

ABOUT = "Show how far the run in an output directory is."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    from mmbeam.report.status import status_text

    check_url("OUT", args.output)
    yield from status_text(args.output)
    return 0
