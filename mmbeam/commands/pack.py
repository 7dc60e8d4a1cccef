"""The command `mmbeam pack`."""

import argparse
import sys
from collections.abc import Generator

from mmbeam.commands.common import (
    SOME_UNITS_FAILED,
    check_url,
    field_arguments,
    fields_of,
    listing_arguments,
    positive,
    quantity,
    table_arguments,
    whole,
)

ABOUT = "Write any input (shards, zip archives, folders, tables) as WebDataset shards with an index of checksums."
_FAILED_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam pack`."""
    parser.epilog = "Example: mmbeam pack photos/ --output shards --shuffle"
    parser.add_argument(
        "input", nargs="+", metavar="INPUT", help="path, glob, brace range, list file or directory, or any fsspec URL"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory or URL for the shards")
    parser.add_argument(
        "--shard-bytes", type=quantity, default=500e6, metavar="N", help="maximum size of a shard (default: 500M)"
    )
    parser.add_argument(
        "--shard-samples", type=positive, default=10_000, metavar="N", help="maximum of its samples (default: 10000)"
    )
    parser.add_argument(
        "--shuffle",
        type=whole,
        nargs="?",
        const=0,
        metavar="SEED",
        help="write the samples in a random order that depends on SEED (default: 0) alone; needs as much temporary "
        "disk space as the input",
    )
    parser.add_argument(
        "--max-member-bytes", type=quantity, metavar="N", help="a larger member is a failure (default: 256MiB)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the shards of an earlier pack in --output first"
    )
    listing_arguments(parser)
    field_arguments(parser)
    table_arguments(parser)


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Pack, and yield what was written. The exit status is 3 if an input could not be read to its end."""
    from mmbeam.config import Limits, Reading, Table
    from mmbeam.jobs.pack import PackOptions, pack
    from mmbeam.names import PACK_FAILURES, PACK_INDEX
    from mmbeam.report.plan import size_text
    from mmbeam.report.progress import ProgressLine

    check_url("`output`", args.output)
    limits = Limits() if args.max_member_bytes is None else Limits(member_bytes=int(args.max_member_bytes))
    table = Table(
        path_columns=tuple(args.path_column), url_columns=tuple(args.url_column), bytes_columns=tuple(args.bytes_column)
    )
    options = PackOptions(
        input=tuple(args.input),
        output=args.output,
        reading=Reading(fields=fields_of(args), table=table, limits=limits),
        strict_input=args.strict_input,
        allow_local_paths=args.allow_local_paths,
        shard_bytes=int(args.shard_bytes),
        shard_samples=args.shard_samples,
        shuffle=args.shuffle,
        overwrite=args.overwrite,
    )
    with ProgressLine(args.output, sys.stderr):
        packed = pack(options)
    yield (
        f"{packed.samples:,} samples in {len(packed.shards):,} shard{'s' * (len(packed.shards) != 1)}, "
        f"{size_text(packed.bytes)}: {packed.output}"
    )
    yield f"index: {packed.output}/{PACK_INDEX}"
    if packed.failures:
        left_out = f", {packed.left_out:,} samples were left out" if packed.left_out else ""
        yield f"failures: {packed.failures:,} records{left_out}: {packed.output}/{PACK_FAILURES}"
    if packed.renames:
        examples = ", ".join(f"{before!r} is {after!r}" for before, after in packed.renamed)
        yield f"keys: {packed.renames:,} repeat or are not plain paths, and were changed: {examples}"
    if packed.members:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in packed.members.most_common())
        yield f"members that belong to no sample: {counts}"
    for path, reason in list(packed.failed.items())[:_FAILED_SHOWN]:
        yield f"FAILED {path}: {reason.removeprefix(f'{path}: ')}"
    if len(packed.failed) > _FAILED_SHOWN:
        yield f"FAILED: {len(packed.failed) - _FAILED_SHOWN:,} more inputs"
    return SOME_UNITS_FAILED if packed.failed else 0
