"""The command `mmbeam embed`."""

import argparse
from collections.abc import Generator
from typing import TYPE_CHECKING

from mmbeam.commands.common import (
    check_model,
    job_arguments,
    modalities_of,
    positive,
    run_job,
    shared_options,
)

if TYPE_CHECKING:
    from mmbeam.jobs.embed import EmbedOptions

ABOUT = "Embed every sample of the shards, and write one Parquet row per sample."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam embed`."""
    parser.epilog = "Example: mmbeam embed --input 'shards/*.tar' --output out --model openai/clip-vit-base-patch32."
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
    parser.add_argument(
        "--text-prompt",
        metavar="NAME|TEXT",
        help="put this before each text: a prompt that the checkpoint defines, or a text such as 'query: ' (default: "
        "the checkpoint's default prompt, mostly none)",
    )
    parser.add_argument(
        "--dims",
        type=positive,
        metavar="N",
        help="keep the first N numbers of each vector, normalised again: for models trained so (Matryoshka)",
    )
    parser.add_argument("--float16", action="store_true", help="store vectors as float16 (Spark cannot read them)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Run the job, and yield its summary."""
    options = _options(args)  # checked before the slow import

    from mmbeam.jobs.embed import prepare

    return (yield from run_job(prepare, options, args))


def _options(args: argparse.Namespace) -> "EmbedOptions":
    from mmbeam.config import ModelRef

    modalities = modalities_of(args.modalities)
    models = tuple(ModelRef.parse(model) for model in args.model or ())
    for model in models:
        check_model(model.model)
    shared = shared_options(args)

    from mmbeam.jobs.embed import EmbedOptions  # slow

    return EmbedOptions(
        models=models,
        modalities=modalities,
        tokens=args.tokens,
        vector_type="float16" if args.float16 else "float32",
        text_prompt=args.text_prompt,
        dims=args.dims,
        **shared,
    )
