"""mmbeam embed."""

import argparse
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

from mmbeam.commands.common import (
    SOME_UNITS_FAILED,
    job_arguments,
    libraries_quiet,
    modalities_of,
    shared_options,
)

if TYPE_CHECKING:
    from mmbeam.jobs.embed import EmbedOptions

ABOUT = "Embed every sample of the shards and write one Parquet row each."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job_arguments(parser)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="hub name with optional @revision, or a directory; NAME prefixes its columns; may be repeated",
    )
    parser.add_argument("--modalities", metavar="LIST", help="of image,audio,text (default: all the models encode)")
    parser.add_argument("--tokens", action="store_true", help="keep the sequence of token or patch features as well")
    parser.add_argument("--float16", action="store_true", help="store vectors as float16 (Spark cannot read it)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    options = _options(args)

    from mmbeam.jobs.embed import embed
    from mmbeam.report.progress import ProgressLine
    from mmbeam.report.summary import summary_text

    with ProgressLine(options.output, sys.stderr), libraries_quiet(args.verbose):
        report = embed(options)
    yield summary_text(report, options.output)
    return SOME_UNITS_FAILED if report.units_failed else 0


def _options(args: argparse.Namespace) -> "EmbedOptions":
    from mmbeam.config import ModelRef
    from mmbeam.jobs.embed import EmbedOptions

    modalities = modalities_of(args.modalities)
    return EmbedOptions(
        models=tuple(ModelRef.parse(model) for model in args.model),
        modalities=modalities,
        tokens=args.tokens,
        vector_type="float16" if args.float16 else "float32",
        **shared_options(args),
    )
