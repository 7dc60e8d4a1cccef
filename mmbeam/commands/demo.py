"""The command `mmbeam demo`."""

import argparse
from collections.abc import Generator
from pathlib import Path

from mmbeam.commands.common import libraries_quiet

ABOUT = "Make a small corpus, caption and embed it, and show the result; offline, no GPU."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam demo`."""
    parser.epilog = "Example: mmbeam demo demo"
    parser.add_argument(
        "directory", nargs="?", default="demo", metavar="DIR", help="directory for corpus and result (default: demo)"
    )


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Run the demo, and yield the lines to show."""
    from mmbeam.demo import SAMPLES, SHARDS, describe_next_steps, describe_rows, make_corpus
    from mmbeam.jobs.caption import CaptionOptions, caption
    from mmbeam.models.placement import compute_on_one_thread
    from mmbeam.report.page import ReportOptions, write_report
    from mmbeam.report.summary import summary_text

    output = Path(args.directory, "captions")
    with libraries_quiet(args.verbose):
        shards = make_corpus(Path(args.directory))
        yield f"Made a corpus of {SAMPLES} samples: {shards}/corpus-{{00000..{SHARDS - 1:05d}}}.tar"
        yield "  Each has an image (jpg, png, webp), audio (wav, flac, ogg, mp3), text, and the true caption (json)."
        yield "Captioning and embedding it in one pass, with the small fusion model that ships with mmbeam:"
        compute_on_one_thread()
        options = CaptionOptions(
            input=(f"{shards}/corpus-*.tar",),
            output=str(output),
            explain=True,
            with_embeddings=True,
            device="cpu",
            overwrite=True,
        )
        yield from (f"  {line}" for line in summary_text(caption(options), str(output)).splitlines())
        yield from describe_rows(shards, output)
        yield from describe_next_steps(shards, output)
        write_report(ReportOptions(run=str(output), samples=24))
        yield f"The report of this run, to open in a browser: {output}/_mmbeam/report.html"
    return 0
