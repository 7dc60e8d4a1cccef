"""The command `mmbeam report`."""

import argparse
from collections.abc import Generator

from mmbeam.commands.common import check_url, positive, whole

ABOUT = "Write an HTML page to look at: counts, failures, distributions, maps of the vectors, and samples."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam report`."""
    parser.epilog = "Example: mmbeam report out --html report.html --color license"
    parser.add_argument("run", metavar="OUT", help="the --output of a job, finished or not")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="file to write (default: OUT/_mmbeam/report.html, or report.html if OUT is not local)",
    )
    parser.add_argument(
        "--samples", type=positive, default=48, metavar="N", help="number of random samples to show (default: 48)"
    )
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="S", help="seed of every random choice of samples (default: 0)"
    )
    parser.add_argument(
        "--color",
        metavar="FIELD",
        help="column or metadata field (a.b is b in a) that colours the maps (default: clusters of the vectors)",
    )


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Write the report, and yield where it is."""
    from mmbeam.report.page import ReportOptions, write_report

    check_url("OUT", args.run)
    report = write_report(
        ReportOptions(run=args.run, html=args.html, samples=args.samples, seed=args.seed, color=args.color)
    )
    yield f"report of {report.rows:,} rows, {report.samples:,} samples shown: {report.path}"
    return 0
