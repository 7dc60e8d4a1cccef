"""The command `mmbeam plan`."""

import argparse
from collections.abc import Generator, Sequence

from mmbeam.errors import UsageError, did_you_mean

ABOUT = "Show what a job will take before it runs: units, samples, time, memory, output and cost. Nothing is written."
JOBS = ("caption", "embed", "generate", "label")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam plan`."""
    parser.epilog = "Example: mmbeam plan embed --input 'shards/*.tar' --output out --model MODEL --price-per-hour 1.2"
    parser.add_argument("job", metavar="JOB", help=f"{', '.join(JOBS)}, followed by its options")
    price_argument(parser)


def price_argument(parser: argparse.ArgumentParser) -> None:
    """Add the price of the machines."""
    parser.add_argument(
        "--price-per-hour", type=float, metavar="PRICE", help="of the machines, for the cost of the job"
    )


def words_of(words: Sequence[str]) -> tuple[list[str], float | None]:
    """Return the words of the planned job as a dry run, and the price. Raises UsageError for an unknown job."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    price_argument(parser)
    try:
        args, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UsageError(f"{error} (see `mmbeam plan --help`)") from error
    if rest[:1] == [] or rest[0] not in JOBS:
        found = rest[0] if rest else "none"
        raise UsageError(f"JOB: expected {', '.join(JOBS)}, found {found}{did_you_mean(found, JOBS)}")
    return [*rest, "--dry-run"], args.price_per_hour


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Raise UsageError: `parse` replaces the words of this command by those of the job."""
    yield from ()
    raise UsageError(f"plan {args.job}: expected the job first, then its options")
