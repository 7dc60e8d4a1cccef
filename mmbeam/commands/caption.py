"""mmbeam caption."""

import argparse
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

from mmbeam.commands.common import job_arguments, libraries_quiet, outcome, positive, share, shared_options
from mmbeam.errors import UsageError

if TYPE_CHECKING:
    from mmbeam.jobs.caption import CaptionOptions

ABOUT = "Write a text about every sample: a caption, transcript, translation, summary or reply."
TASKS = ("caption", "transcribe", "translate", "summarize", "dialogue")  # config.TASKS, whose imports take a while
ENGINES = ("transformers", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job_arguments(parser, features=True)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="hub name with optional @revision, or a directory (default: the small fusion model of this package)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="transformers",
        help="what runs the model: transformers, or vLLM where it is installed beside a GPU (default: transformers)",
    )
    parser.add_argument("--task", choices=TASKS, help="what is wanted (default: what the model is for)")
    parser.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="how to ask for it, in place of the task's own words: 'What is this? Its title is {metadata[title]}.'; "
        "{text}, {key}, {metadata[a][b]} are the sample's, {{ is a brace",
    )
    parser.add_argument(
        "--language", metavar="LANG", help="of the text that is wanted: German, de; to a Whisper the one that is spoken"
    )
    parser.add_argument("--source-language", metavar="LANG", help="of the text to translate, for models that want it")
    parser.add_argument(
        "--explain", action="store_true", help="add each caption's attribution to image, audio and text"
    )
    parser.add_argument("--with-embeddings", action="store_true", help="write the model's vectors as well")
    decoding = parser.add_argument_group("decoding (default: the most likely token each time)")
    decoding.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="of a text, or of each window of a Whisper (default: by the task, 64 for a caption)",
    )
    decoding.add_argument("--num-beams", type=positive, default=1, metavar="N", help="beam search of so many beams")
    decoding.add_argument("--temperature", type=float, metavar="T", help="sample, at this temperature")
    decoding.add_argument("--top-p", type=share, metavar="P", help="sample from the likeliest tokens of this much")
    decoding.add_argument("--seed", type=int, metavar="S", help="of sampling (default: 0)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    options = _options(args)

    from mmbeam.jobs.caption import prepare
    from mmbeam.report.progress import ProgressLine

    with ProgressLine(options.output, sys.stderr), libraries_quiet(args.verbose):
        report = prepare(options).start()
    return (yield from outcome(report, options.output))


def _options(args: argparse.Namespace) -> "CaptionOptions":
    for name in ("top_p", "seed"):
        if args.temperature is None and getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} goes with sampling: give --temperature too")

    from mmbeam.jobs.caption import CaptionOptions
    from mmbeam.names import SHIPPED_MODEL
    from mmbeam.prompts.ask import Decoding
    from mmbeam.prompts.template import parse_template

    if args.prompt is not None:
        parse_template(args.prompt)
    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed or 0,
    )
    return CaptionOptions(
        model=args.model or SHIPPED_MODEL,
        task=args.task,
        prompt=args.prompt,
        language=args.language,
        source_language=args.source_language,
        decoding=decoding,
        engine=args.engine,
        explain=args.explain,
        with_embeddings=args.with_embeddings,
        **shared_options(args),
    )
