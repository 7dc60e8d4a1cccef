"""mmbeam demo."""

import argparse
from collections.abc import Generator
from pathlib import Path

from mmbeam.commands.common import libraries_quiet

ABOUT = "Make a small corpus, embed it and show the result; offline, no GPU."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", default="demo", metavar="DIR", help="where to put it (default: demo)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    from mmbeam.demo import run_demo

    with libraries_quiet(args.verbose):
        yield from run_demo(Path(args.directory))
    return 0
