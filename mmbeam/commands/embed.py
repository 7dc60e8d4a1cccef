"""The command `mmbeam embed`."""

import argparse
from collections.abc import Generator
from typing import TYPE_CHECKING

from mmbeam.commands.common import (
    job_arguments,
    modalities_of,
    run_job,
    shared_options,
)

if TYPE_CHECKING:
    from mmbeam.jobs.embed import EmbedOptions

ABOUT = "Embed every sample of the shards, and write one Parquet row per sample."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam embed`."""
    job_arguments(parser)
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]MODEL",
        help="hub name with optional @revision, or a directory; NAME prefixes its columns; may be repeated "
        "(default: shipped, a small fusion model that knows only the samples of `mmbeam demo`)",
    )
    parser.add_argument(
        "--modalities", metavar="LIST", help="subset of image,audio,text (default: all that the models encode)"
    )
    parser.add_argument("--tokens", action="store_true", help="also write the sequence of token or patch vectors")
    parser.add_argument("--float16", action="store_true", help="store vectors as float16 (Spark cannot read them)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Run the job, and yield its summary."""
    options = _options(args)  # checked before the slow import

    from mmbeam.jobs.embed import prepare

    return (yield from run_job(prepare, options, args.verbose))


def _options(args: argparse.Namespace) -> "EmbedOptions":
    from mmbeam.config import ModelRef
    from mmbeam.jobs.embed import EmbedOptions

    modalities = modalities_of(args.modalities)
    return EmbedOptions(
        models=tuple(ModelRef.parse(model) for model in args.model or ()),
        modalities=modalities,
        tokens=args.tokens,
        vector_type="float16" if args.float16 else "float32",
        **shared_options(args),
    )
