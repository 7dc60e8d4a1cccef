"""The command `mmbeam caption`."""

import argparse
import importlib.util
from collections.abc import Generator
from typing import TYPE_CHECKING

from mmbeam.commands.common import (
    check_model,
    fraction,
    job_arguments,
    number,
    positive,
    run_job,
    shared_options,
    whole,
)
from mmbeam.errors import UsageError
from mmbeam.names import ENGINES, TASKS

if TYPE_CHECKING:
    from mmbeam.jobs.caption import CaptionOptions

ABOUT = "Write a text about every sample: a caption, transcript, translation, summary or reply."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam caption`."""
    parser.epilog = (
        "Example: mmbeam caption --input 'shards/*.tar' --output out --model Salesforce/blip-image-captioning-base."
    )
    job_arguments(parser, features=True)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="hub name with optional @revision, or a directory (default: shipped, a small fusion model that knows only "
        "the samples of `mmbeam demo`)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="transformers",
        help="library that runs the model; vllm must be installed, and needs a GPU (default: transformers)",
    )
    parser.add_argument("--task", choices=TASKS, help="task of the model (default: its own)")
    parser.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="prompt instead of the task's own: 'What is this? Its title is {metadata[title]}.'; fields are "
        "{text}, {key} and {metadata[a][b]}, and {{ is a brace",
    )
    parser.add_argument(
        "--language",
        metavar="LANG",
        help="language of the generated text: German, de; for Whisper, the spoken language",
    )
    parser.add_argument(
        "--source-language", metavar="LANG", help="language of the text to translate, for models that need it"
    )
    parser.add_argument(
        "--explain", action="store_true", help="add each caption's attribution to image, audio and text"
    )
    parser.add_argument("--with-embeddings", action="store_true", help="also write the model's vectors")
    decoding = parser.add_argument_group("decoding (default: greedy)")
    decoding.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="maximum length of a text, or of each window of Whisper (default: by task, 64 for a caption)",
    )
    decoding.add_argument(
        "--num-beams",
        type=positive,
        default=1,
        metavar="N",
        help="number of beams of beam search (default: 1, greedy decoding)",
    )
    decoding.add_argument("--temperature", type=number, metavar="T", help="sample at this temperature")
    decoding.add_argument(
        "--top-p",
        type=fraction,
        metavar="P",
        help="nucleus sampling: sample from the smallest set of tokens with this probability",
    )
    decoding.add_argument(
        "--robust",
        action="store_true",
        help="Whisper: decode windows of a repetitive or unlikely text again at higher temperatures, and leave out "
        "windows without speech",
    )
    decoding.add_argument(
        "--word-timestamps", action="store_true", help="Whisper: also write the times of words (transcript_words)"
    )
    decoding.add_argument("--seed", type=whole, metavar="S", help="random seed of sampling (default: 0)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Run the job, and yield its summary."""
    options = _options(args)  # checked before the slow import

    from mmbeam.jobs.caption import prepare

    return (yield from run_job(prepare, options, args))


def _options(args: argparse.Namespace) -> "CaptionOptions":
    for name in ("top_p", "seed"):
        if args.temperature is None and getattr(args, name) is not None and not (name == "seed" and args.robust):
            raise UsageError(f"`{name}` needs sampling: pass `temperature` too")

    from mmbeam.prompts.ask import Decoding
    from mmbeam.prompts.template import parse_template

    if args.prompt is not None:
        parse_template(args.prompt)
    if args.model is not None:
        check_model(args.model)
    if args.engine == "vllm" and not args.beam_args and importlib.util.find_spec("vllm") is None:
        raise UsageError("`engine` vllm: vLLM is not installed here; see the README, or leave `engine` out")
    shared = shared_options(args, features=True)

    from mmbeam.jobs.caption import CaptionOptions  # slow

    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed or 0,
        robust=args.robust,
        word_timestamps=args.word_timestamps,
    )
    return CaptionOptions(
        model=args.model,
        task=args.task,
        prompt=args.prompt,
        language=args.language,
        source_language=args.source_language,
        decoding=decoding,
        engine=args.engine,
        explain=args.explain,
        with_embeddings=args.with_embeddings,
        **shared,
    )
