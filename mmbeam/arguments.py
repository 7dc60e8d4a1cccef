"""The arguments of the command line: what there is, what may be said, and the job options that come of it.

Nothing slow is imported before a job's options are made, so that --help and a bad argument are answered at once.
"""

import argparse
import io
import math
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, NoReturn

from mmbeam import __version__
from mmbeam.errors import UsageError

if TYPE_CHECKING:
    from mmbeam.config import FieldMap
    from mmbeam.jobs.embed import EmbedOptions

DTYPES = ("float32", "float16", "bfloat16")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the command's name in `command` and those left for Apache Beam in `beam_args`.

    Raises UsageError.
    """
    args, rest = _parser().parse_known_args(argv)
    if rest and not args.takes_beam_options:
        raise UsageError(f"unknown argument {rest[0]} (see `mmbeam {args.command} --help`)")
    args.beam_args = tuple(rest)
    return args


def _parser() -> _Parser:
    parser = _Parser(
        prog="mmbeam", description="Embeddings for buckets of image-text-audio shards.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mmbeam {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    _demo_command(commands)
    _embed_command(commands)
    _inspect_command(commands)
    _status_command(commands)
    return parser


Commands = argparse._SubParsersAction


def _command(commands: "Commands[_Parser]", name: str, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="log what the libraries say; tracebacks of errors")
    parser.set_defaults(takes_beam_options=False)
    return parser


def _demo_command(commands: "Commands[_Parser]") -> None:
    parser = _command(commands, "demo", "Make a small corpus, embed it and show the result; offline, no GPU.")
    parser.add_argument("directory", nargs="?", default="demo", metavar="DIR", help="where to put it (default: demo)")


def _embed_command(commands: "Commands[_Parser]") -> None:
    parser = _command(commands, "embed", "Embed every sample of the shards and write one Parquet row each.")
    _job_arguments(parser)


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_beam_options=True)
    parser.epilog = "Every Apache Beam pipeline option is taken as Beam spells it, --runner=FlinkRunner for example."
    _input_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="directory or URL for the Parquet files")
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
    run = parser.add_argument_group("how it runs")
    run.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)",
    )
    run.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, bfloat16 on cuda)")
    run.add_argument(
        "--batch-size", type=_batch_size, metavar="N", help="samples that the model gets at once (default: auto)"
    )
    run.add_argument("--limit", type=_positive, metavar="N", help="the first N samples only, as one unit")
    run.add_argument(
        "--max-failure-rate",
        type=_share,
        default=0.05,
        metavar="R",
        help="stop when more than this share of the samples failed (default: 0.05)",
    )
    run.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote to the output")
    run.add_argument("--retry-failures", action="store_true", help="do units that hold failed samples again")
    _cleaning_arguments(parser)


def _input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHARDS",
        help="glob, brace range, list file, directory; local or any fsspec URL; may be repeated",
    )
    _field_arguments(group)


def _field_arguments(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    for kind in ("image", "audio", "text", "metadata"):
        parser.add_argument(
            f"--{kind}-field", metavar="FIELD", help=f"the field that is the {kind} (default: by extension)"
        )


def _cleaning_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cleaning")
    group.add_argument(
        "--clean-text", metavar="STEPS", help="of nfc,nfkc,control,markup,whitespace,lower, done in the order given"
    )
    group.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="EXPR",
        help="keep a sample only if it holds: 'image_width >= 64'",
    )
    group.add_argument("--image-filter", metavar="median:SIDE|gaussian:SIGMA", help="filter pictures on the device")
    group.add_argument(
        "--draft", action="store_true", help="decode large JPEGs at a fraction: faster, not the same pixels"
    )


def _inspect_command(commands: "Commands[_Parser]") -> None:
    parser = _command(commands, "inspect", "Show what the first samples of the shards hold.")
    parser.add_argument("shards", nargs="+", metavar="SHARDS")
    _field_arguments(parser)


def _status_command(commands: "Commands[_Parser]") -> None:
    parser = _command(commands, "status", "Show how far the run in an output directory is.")
    parser.add_argument("output", metavar="OUT")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, found {text!r}")
    return text


def fields_of(args: argparse.Namespace) -> "FieldMap":
    """The fields that --image-field and its kin name."""
    from mmbeam.config import FieldMap

    return FieldMap(image=args.image_field, audio=args.audio_field, text=args.text_field, metadata=args.metadata_field)


def embed_options(args: argparse.Namespace) -> "EmbedOptions":
    """The options of the embed job. Raises UsageError."""
    from mmbeam.config import Cleaning, ModelRef, Reading
    from mmbeam.jobs.embed import EmbedOptions
    from mmbeam.types import MODALITIES

    asked = None if args.modalities is None else args.modalities.split(",")
    for name in asked or ():
        if name not in MODALITIES:
            raise UsageError(f"--modalities {args.modalities}: {name!r} is none of {', '.join(MODALITIES)}")
    check_url("--output", args.output)
    _check_beam(args.beam_args)
    steps = tuple(args.clean_text.split(",")) if args.clean_text else ()
    cleaning = Cleaning(text=steps, where=tuple(args.where), image_filter=args.image_filter)
    return EmbedOptions(
        input=tuple(args.input),
        output=args.output,
        models=tuple(ModelRef.parse(model) for model in args.model),
        modalities=None if asked is None else tuple(asked),
        tokens=args.tokens,
        vector_type="float16" if args.float16 else "float32",
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        limit=args.limit,
        max_failure_rate=args.max_failure_rate,
        overwrite=args.overwrite,
        retry_failures=args.retry_failures,
        reading=Reading(fields=fields_of(args), cleaning=cleaning, draft=args.draft),
        beam_args=args.beam_args,
    )


def check_url(name: str, url: str) -> None:
    """Raise UsageError for a URL that no installed package opens."""
    from fsspec.core import url_to_fs

    from mmbeam.io.paths import public_path, public_text

    try:
        url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{name} {public_path(url)}: {public_text(str(error))}") from error


def _check_beam(args: Sequence[str]) -> None:
    """Raise UsageError for an argument that Apache Beam refuses; argparse, which Beam asks, would end the process."""
    from mmbeam.jobs.launch import pipeline_options

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            pipeline_options(args)
    except SystemExit as error:
        raise UsageError(said.getvalue().strip().rpartition("error: ")[2]) from error
