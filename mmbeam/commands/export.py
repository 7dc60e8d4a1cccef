"""The command `mmbeam export`."""

import argparse
from collections.abc import Generator

from mmbeam.commands.common import check_url

ABOUT = "Write the rows of a run as CSV, JSON lines, text files, subtitles, NumPy arrays or shards."
_FORMATS = {
    "csv": "one file; null is an empty field",
    "jsonl": "one object per line",
    "txt": "a directory with one text file per row, KEY.txt",
    "srt": "a directory of subtitles, KEY.srt, from a transcript with segments",
    "vtt": "a directory of subtitles as WebVTT, KEY.vtt",
    "npy": "a directory of float16 arrays and metadata, as clip-retrieval and autofaiss read them",
    "tar": "a directory of shards: the members of each sample as in the input, and KEY.caption.txt for its caption",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam export`."""
    parser.epilog = "Example: mmbeam export out captions.csv --columns key,caption"
    parser.add_argument("run", metavar="OUT", help="the --output of a job")
    parser.add_argument("target", metavar="TARGET", help="a file that ends in .csv or .jsonl, or a new directory")
    parser.add_argument(
        "--format",
        choices=tuple(_FORMATS),
        help="; ".join(f"{name}: {text}" for name, text in _FORMATS.items()) + " (default: by the extension of TARGET)",
    )
    parser.add_argument(
        "--columns",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        metavar="LIST",
        help="columns to export (default: all but vectors; txt: the generated text; srt, vtt: the segments of the "
        "transcript; npy: every column of vectors; tar: the generated text and labels)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Export, and yield what was written."""
    from mmbeam.jobs.export import ExportOptions, export

    check_url("OUT", args.run)
    check_url("TARGET", args.target)
    result = export(
        ExportOptions(
            run=args.run, target=args.target, format=args.format, columns=args.columns, overwrite=args.overwrite
        )
    )
    yield f"{result.rows:,} rows in {result.files:,} file{'' if result.files == 1 else 's'}: {result.target}"
    for reason, count in result.left_out.items():
        yield f"warning: {count:,} rows {reason} were left out"
    return 0
