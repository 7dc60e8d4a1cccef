"""The command `mmbeam rerun`."""

import argparse
import os
from collections.abc import Generator, Sequence
from pathlib import Path

from mmbeam.errors import UsageError, redact

ABOUT = "Repeat the command that made an output: it resumes the run, or retries its failed units."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam rerun`."""
    parser.epilog = "Example: mmbeam rerun out --retry-failures. Options given here are added to those of the run."
    parser.add_argument("output", metavar="OUT", help="the --output of a job that a command started")


def words_of(output: str, added: Sequence[str]) -> list[str]:
    """Return the words of the command that made `output`, with those `added`; change to its working directory.

    Raises UsageError if run.json does not hold them, or holds them without a secret.
    """
    from mmbeam.commands.common import check_url
    from mmbeam.readers.paths import is_local
    from mmbeam.runs.run import find_run

    check_url("OUT", output)
    run = find_run(output)
    recorded = run.recorded.get("command")
    if recorded is None:
        raise UsageError(
            f"{run.store}: expected the command of the run in run.json, found none (a run started from Python, or by "
            "mmbeam 0.1); repeat the command itself"
        )
    if not recorded["is_whole"]:
        raise UsageError(f"{run.store}: the command held a secret, which run.json does not keep; repeat the command")
    words = [word for word in recorded["words"] if word not in ("--overwrite", "--dry-run")]
    directory = Path(recorded["directory"])
    if not directory.is_dir():
        raise UsageError(f"{run.store}: the command ran in {directory}, which does not exist here; repeat it there")
    target = str(Path(output).expanduser().absolute()) if is_local(output) else output
    os.chdir(directory)
    return [*words, "--output", target, *added]


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Raise UsageError: `parse` replaces the words of this command by those of the run."""
    yield from ()
    raise UsageError(f"rerun {redact(args.output)}: expected the output first")
