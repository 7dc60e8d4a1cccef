"""The command `mmbeam status`."""

import argparse
import json
import time
from collections.abc import Generator

from mmbeam.commands.common import check_url, positive

ABOUT = "Show the progress of the run in an output directory, and the processes that are at work on it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam status`."""
    parser.epilog = "Example: mmbeam status out --watch 10"
    parser.add_argument("output", metavar="OUT", help="the --output of a job")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--watch", type=positive, metavar="SECONDS", help="show it again every SECONDS, until nothing is left to do"
    )


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Yield a description of the run."""
    from mmbeam.report.status import read_status, status_text

    check_url("OUT", args.output)
    while True:
        if args.json:
            yield json.dumps(read_status(args.output).to_json(), ensure_ascii=False)
        else:
            yield from status_text(args.output)
        if args.watch is None or not read_status(args.output).left:
            return 0
        time.sleep(args.watch)
        if not args.json:
            yield ""
