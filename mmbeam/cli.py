"""The command line. Quick to start: what a command needs is imported when the command runs.

Exit status: 0 done, 1 the job failed, 2 bad arguments, 3 done but some units failed (run again).
"""

import argparse
import logging
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmbeam import __version__
from mmbeam.errors import MmbeamError, UsageError

if TYPE_CHECKING:
    from mmbeam.config import FieldMap
    from mmbeam.jobs.embed import EmbedOptions
    from mmbeam.types import RunReport

SOME_UNITS_FAILED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_beam_options", False):
        parser.error(f"unknown argument {rest[0]}")
    args.beam_args = tuple(rest)
    _set_up_logging(args.verbose)
    try:
        return int(args.command(args))
    except UsageError as error:
        return _say(error, 2)
    except (MmbeamError, OSError) as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return _say("interrupted; the same command again goes on from what is committed", 130)


def _say(error: object, status: int) -> int:
    print(f"mmbeam: {error}", file=sys.stderr)
    return status


def _set_up_logging(verbose: bool) -> None:
    """mmbeam's own messages to stderr; the libraries' only with --verbose: what fails, mmbeam says itself."""
    level = logging.INFO if verbose else logging.CRITICAL
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level, stream=sys.stderr)
    logging.getLogger("mmbeam").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmbeam", description="Embeddings and captions for buckets of image-text-audio shards.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mmbeam {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _demo_command(commands)
    _embed_command(commands)
    _inspect_command(commands)
    _status_command(commands)
    return parser


Commands = argparse._SubParsersAction


def _command(commands: "Commands[argparse.ArgumentParser]", name: str, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="log what the libraries say, too")
    return parser


def _demo_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "demo", "Make a small corpus, embed it and show the result; offline, no GPU.")
    parser.add_argument("directory", nargs="?", default="demo", metavar="DIR", help="where to put it (default: demo)")
    parser.set_defaults(command=_demo)


def _embed_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "embed", "Embed every sample of the shards and write one Parquet row each.")
    _job_arguments(parser)
    parser.set_defaults(command=_embed)


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
    run.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    run.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 on cpu, bfloat16 on cuda"
    )
    run.add_argument("--batch-size", type=_batch_size, metavar="auto|N")
    run.add_argument("--limit", type=_positive, metavar="N", help="the first N samples only")
    run.add_argument("--max-failure-rate", type=_share, default=0.05, metavar="R", help="stop above it (default: 0.05)")
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
    group.add_argument("--clean-text", metavar="STEPS", help="of nfc,control,markup,whitespace,lower, in that order")
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


def _inspect_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "inspect", "Show what the first samples of the shards hold.")
    parser.add_argument("shards", nargs="+", metavar="SHARDS")
    _field_arguments(parser)
    parser.set_defaults(command=_inspect)


def _status_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = _command(commands, "status", "Show how far the run in an output directory is.")
    parser.add_argument("output", metavar="OUT")
    parser.set_defaults(command=_status)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, found {value}")
    return value


def _fields(args: argparse.Namespace) -> "FieldMap":
    from mmbeam.config import FieldMap

    return FieldMap(image=args.image_field, audio=args.audio_field, text=args.text_field, metadata=args.metadata_field)


def _options(args: argparse.Namespace) -> "EmbedOptions":
    from mmbeam.config import Cleaning, ModelRef, Reading
    from mmbeam.jobs.embed import EmbedOptions
    from mmbeam.types import MODALITIES

    asked = None if args.modalities is None else args.modalities.split(",")
    for name in asked or ():
        if name not in MODALITIES:
            raise UsageError(f"--modalities {args.modalities}: {name!r} is none of {', '.join(MODALITIES)}")
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
        reading=Reading(fields=_fields(args), cleaning=cleaning, draft=args.draft),
        beam_args=args.beam_args,
    )


def _embed(args: argparse.Namespace) -> int:
    from mmbeam.jobs.embed import embed
    from mmbeam.report.summary import summary_text

    options = _options(args)
    with _ShowProgress():
        report = embed(options)
    print(summary_text(report, options.output))
    return _status_of(report)


def _status_of(report: "RunReport") -> int:
    return SOME_UNITS_FAILED if report.units_failed else 0


def _inspect(args: argparse.Namespace) -> int:
    from mmbeam.report.inspect import inspect_text

    for line in inspect_text(args.shards, _fields(args)):
        print(line)
    return 0


def _status(args: argparse.Namespace) -> int:
    raise UsageError("status")


def _demo(args: argparse.Namespace) -> int:
    from mmbeam.demo import run_demo

    for line in run_demo(Path(args.directory)):
        print(line, flush=True)
    return 0


class _ShowProgress:
    """A line on stderr that is rewritten on a terminal, and said once in a while where there is none."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._show, name="mmbeam-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _show(self) -> None:
        from mmbeam.report.progress import progress

        shown = False
        while not self._end.wait(0.5 if self._terminal else 10):
            if progress.units:
                print(
                    f"\r\x1b[K{progress.line()}" if self._terminal else progress.line(),
                    end="" if self._terminal else "\n",
                    file=sys.stderr,
                    flush=True,
                )  # noqa: E501
                shown = True
        if shown and self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
