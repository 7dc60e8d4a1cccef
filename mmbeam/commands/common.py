"""What the commands share: argument groups and types, and the job options that come of them.

Nothing slow is imported before a job's options are made, so that --help and a bad argument are answered at once.
"""

import argparse
import io
import math
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmbeam.errors import UsageError

if TYPE_CHECKING:
    from mmbeam.config import FieldMap
    from mmbeam.names import Modality
    from mmbeam.types import RunReport

SOME_UNITS_FAILED = 3  # exit status: done, but run again to retry some units
DTYPES = ("float32", "float16", "bfloat16")
Group = argparse.ArgumentParser | argparse._ArgumentGroup


def job_arguments(parser: argparse.ArgumentParser, features: bool = False) -> None:
    """What every job over shards takes, or over `features` too, and Apache Beam's own options."""
    parser.set_defaults(takes_beam_options=True)
    parser.epilog = "Every Apache Beam pipeline option is taken as Beam spells it, --runner=FlinkRunner for example."
    input_arguments(parser, features)
    parser.add_argument("--output", required=True, metavar="DIR", help="directory or URL for the Parquet files")
    run = parser.add_argument_group("how it runs")
    device_arguments(run)
    run.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes of this machine that share the work, each with a model of its own and its part of the cores or "
        "of the GPUs (default: 1, which has them all)",
    )
    run.add_argument("--limit", type=positive, metavar="N", help="the first N samples only, as one unit")
    run.add_argument(
        "--max-failure-rate",
        type=share,
        default=0.05,
        metavar="R",
        help="stop when more than this share of the samples failed (default: 0.05)",
    )
    run.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote to the output")
    run.add_argument("--retry-failures", action="store_true", help="do units that hold failed samples again")
    run.add_argument(
        "--shared-output", action="store_true", help="a local --output is the same directory on every worker"
    )
    _cleaning_arguments(parser)


def device_arguments(group: Group) -> None:
    """Where a model runs, in which dtype, on how many samples at once."""
    group.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default: auto, the GPUs if there are any)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, bfloat16 on cuda)")
    group.add_argument(
        "--batch-size", type=_batch_size, metavar="N", help="samples that the model gets at once (default: auto)"
    )


def input_arguments(parser: argparse.ArgumentParser, features: bool = False) -> None:
    """The shards, and which of their fields is what."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHARDS_OR_FEATURES" if features else "SHARDS",
        help="glob, brace range, list file, directory; local or any fsspec URL; may be repeated"
        + ("; features are what `mmbeam embed` wrote: its output, or Parquet files" if features else ""),
    )
    field_arguments(group)


def field_arguments(parser: Group) -> None:
    """Which field is the image, audio, text, metadata."""
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


def positive(text: str) -> int:
    """The type of a count."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def share(text: str) -> float:
    """The type of a number from 0 to 1."""
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


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `job_arguments` took, as the fields of JobOptions. Raises UsageError."""
    from mmbeam.config import Cleaning, Reading

    check_url("--output", args.output)
    _check_beam(args.beam_args)
    steps = tuple(args.clean_text.split(",")) if args.clean_text else ()
    cleaning = Cleaning(text=steps, where=tuple(args.where), image_filter=args.image_filter)
    return {
        "input": tuple(args.input),
        "output": args.output,
        "device": args.device,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "limit": args.limit,
        "max_failure_rate": args.max_failure_rate,
        "overwrite": args.overwrite,
        "retry_failures": args.retry_failures,
        "shared_output": args.shared_output,
        "workers": args.workers,
        "reading": Reading(fields=fields_of(args), cleaning=cleaning, draft=args.draft),
        "beam_args": args.beam_args,
    }


def modalities_of(text: str | None) -> "tuple[Modality, ...] | None":
    """The modalities of --modalities. Raises UsageError for a name that is none."""
    from mmbeam.names import MODALITIES

    if text is None:
        return None
    asked = text.split(",")
    for name in asked:
        if name not in MODALITIES:
            raise UsageError(f"--modalities {text}: {name!r} is none of {', '.join(MODALITIES)}")
    return tuple(modality for modality in MODALITIES if modality in asked)


def outcome(report: "RunReport | None", output: str) -> Generator[str, None, int]:
    """What to show of a job at its end, or of one that nobody waits for; the exit status."""
    from mmbeam.report.summary import summary_text

    if report is None:
        yield f"Handed over, and not waited for: `mmbeam status {output}` shows how far it is."
        return 0
    yield summary_text(report, output)
    return SOME_UNITS_FAILED if report.units_failed else 0


@contextmanager
def libraries_quiet(verbose: bool) -> Iterator[None]:
    """Drop what libraries print on stderr past all logging: Beam a traceback of 90 lines for each error of a step.

    mmbeam's log and its progress line hold the stream itself, and go on.
    """
    if verbose:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


def check_url(name: str, url: str) -> None:
    """Raise UsageError for a URL that no installed package opens."""
    from fsspec.core import url_to_fs

    from mmbeam.readers.paths import public_path, public_text

    try:
        url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{name} {public_path(url)}: {public_text(str(error))}") from error


def _check_beam(args: Sequence[str]) -> None:
    """Raise UsageError for an argument that Apache Beam refuses; argparse, which Beam asks, would end the process."""
    from mmbeam.jobs.options import pipeline_options

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            pipeline_options(args)
    except SystemExit as error:
        raise UsageError(said.getvalue().strip().rpartition("error: ")[2]) from error
