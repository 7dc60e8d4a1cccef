"""Argument groups and types that the commands share, and the job options made from them.

Nothing slow is imported before the options are made; --help and errors about arguments are printed immediately.
"""

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mmbeam.errors import ModelError, UsageError, did_you_mean, redact
from mmbeam.names import DTYPES, KINDS, MODALITIES

if TYPE_CHECKING:
    from mmbeam.config import FieldMap, Limits
    from mmbeam.jobs.execute import Job
    from mmbeam.jobs.options import JobOptions
    from mmbeam.names import Modality

OptionsT = TypeVar("OptionsT", bound="JobOptions")

MAX_FPS = 240
SOME_UNITS_FAILED = 3  # exit status: done, but some units or all samples failed, or shards break off
LIMITS = {  # the fields of config.Limits: what each limits
    "member_bytes": "size of a member; a sample may have 5 times as much",
    "pixels": "width x height of an image or a frame",
    "seconds": "length of a sound or a video",
    "channels": "channels of a sound",
    "frames": "frames in a video, chosen or not",
    "streams": "streams of a video",
    "text_chars": "characters of a text",
    "metadata_bytes": "size of a sample's JSON",
    "decode_bytes": "memory for decoding one image, sound or video",
    "expansion": "decompressed size of a shard divided by its stored size, beyond the first GiB",
}
_QUANTITY = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?(?:([kKMGT])(i?))?B?")


class Group(Protocol):
    """A parser, or a group of arguments of one."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add an argument, as `argparse.ArgumentParser.add_argument` does."""


def job_arguments(parser: argparse.ArgumentParser, features: bool = False) -> None:
    """Add the arguments that all jobs share, and accept Apache Beam's options.

    With `features`, the input may also be features.
    """
    parser.set_defaults(takes_beam_options=True)
    parser.epilog = (
        f"{'' if parser.epilog is None else parser.epilog + ' '}Every Apache Beam pipeline option is accepted as Beam "
        "spells it, for example --runner=FlinkRunner."
    )
    input_arguments(parser, features)
    parser.add_argument("--output", required=True, metavar="DIR", help="directory or URL for the Parquet files")
    run = parser.add_argument_group("execution")
    device_arguments(run)
    run.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="worker processes on this machine, each with its own copy of the model and its share of the cores or GPUs "
        "(default: 1, with all of them)",
    )
    run.add_argument("--limit", type=positive, metavar="N", help="process only the first N samples, as one unit")
    run.add_argument(
        "--max-failure-rate",
        type=fraction,
        default=0.05,
        metavar="R",
        help="stop when more than this fraction of the samples failed (default: 0.05)",
    )
    run.add_argument("--overwrite", action="store_true", help="delete the results of an earlier run in --output first")
    run.add_argument("--retry-failures", action="store_true", help="redo units that contain failed samples")
    run.add_argument(
        "--redo-changed", action="store_true", help="redo units whose shards have changed since they were committed"
    )
    run.add_argument("--dry-run", action="store_true", help="check and plan the job, and write nothing")
    run.add_argument(
        "--config",
        metavar="FILE.toml",
        help="read options from a file: `batch-size = 32`, `where = ['...']`; the command line takes precedence",
    )
    run.add_argument(
        "--shared-output", action="store_true", help="--output is a local directory that all workers share"
    )
    _cleaning_arguments(parser)
    limit_arguments(parser)


def device_argument(group: Group) -> None:
    """Add the argument for the device."""
    group.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default: auto, all GPUs, or the CPU if there is none)",
    )


def device_arguments(group: Group) -> None:
    """Add the arguments for device, dtype and batch size."""
    device_argument(group)
    group.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: float32 on cpu, bfloat16 on cuda)"
    )
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="samples per model batch; a batch of short texts may hold up to 4 times as many (default: auto)",
    )


def input_arguments(parser: argparse.ArgumentParser, features: bool = False) -> None:
    """Add the arguments for shards and their fields."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHARDS_OR_FEATURES" if features else "SHARDS",
        help="path, glob, brace range, list file or directory; local or any fsspec URL; may be repeated"
        + ("; features are an output of `mmbeam embed`, or Parquet files of it" if features else ""),
    )
    listing_arguments(group)
    group.add_argument(
        "--moved",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="the shards under the path NEW are those that this run knows under OLD; their rows keep OLD; may be "
        "repeated",
    )
    field_arguments(group)
    frame_arguments(group)
    table_arguments(group)


def table_arguments(group: Group) -> None:
    """Add the arguments that name the columns of a table."""
    for kind, what in (("path", "paths of files, relative to it"), ("url", "URLs"), ("bytes", "media as bytes")):
        group.add_argument(
            f"--{kind}-column",
            action="append",
            default=[],
            metavar="COLUMN",
            help=f"column of a table with {what} (default: by name and type); may be repeated",
        )


def listing_arguments(group: Group) -> None:
    """Add the arguments that decide how patterns of shards are listed."""
    group.add_argument("--strict-input", action="store_true", help="a pattern or path that matches nothing is an error")
    group.add_argument(
        "--allow-local-paths",
        action="store_true",
        help="trust tables and fetched lists of shards (http://, s3://, ...): they may name local paths, other servers "
        "and other buckets",
    )


def field_arguments(parser: Group) -> None:
    """Add the arguments that name the field of each kind."""
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}-field", metavar="FIELD", help=f"field that holds the {kind} (default: by extension)"
        )


def frame_arguments(parser: Any) -> None:
    """Add the arguments that choose the frames of a video."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help="frames of a video, at equal distances in time (default: as many as the model takes, or 8)",
    )
    group.add_argument("--fps", type=_rate, metavar="F", help="frames of a video per second, instead of --frames")


def _rate(text: str) -> float:
    """Parse a positive number of frames per second (argument type)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_FPS:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most {MAX_FPS}, found {text!r}")
    return value


def _cleaning_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cleaning")
    group.add_argument(
        "--clean-text",
        metavar="STEPS",
        help="steps from nfc,nfkc,control,markup,whitespace,lower, applied in this order",
    )
    group.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="EXPR",
        help="keep a sample only if the expression is true, for example 'image_width >= 64'; may be repeated",
    )
    group.add_argument("--image-filter", metavar="median:SIDE|gaussian:SIGMA", help="filter images on the device")
    group.add_argument(
        "--draft",
        action="store_true",
        help="decode large JPEGs at a fraction of their size: faster, but pixel values differ slightly",
    )


def limit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the limits on what a member may hold."""
    from mmbeam.config import Limits

    group = parser.add_argument_group("limits", "A member beyond a limit is a failure. N may have a unit: 100M, 2GiB.")
    for name, what in LIMITS.items():
        default = getattr(Limits, name)
        unit = "B" * name.endswith("bytes")
        scale = next((s for s in ("Mi", "M") if not default % quantity(f"1{s}")), "")
        shown = f"{default / quantity(f'1{scale}'):g}{scale}{unit}"
        option = f"--max-{name.replace('_', '-')}"
        group.add_argument(option, type=quantity, metavar="N", help=f"{what} (default: {shown})")
    group.add_argument(
        "--isolate-decoding",
        action="store_true",
        help="decode in child processes, one per core: a codec that crashes costs its sample, and no attempt at its "
        "unit (70 MB per process, and about twice the CPU time of decoding)",
    )


def limits_of(args: argparse.Namespace) -> "Limits":
    """Return the limits of `limit_arguments`. Raises UsageError."""
    from mmbeam.config import Limits

    values = {name: value for name in LIMITS if (value := getattr(args, f"max_{name}")) is not None}
    return Limits(**{name: type(getattr(Limits, name))(value) for name, value in values.items()})


def quantity(text: str) -> float:
    """Parse a positive number with an optional unit, such as 100M, 256MiB or 1.5GB (argument type)."""
    match = _QUANTITY.fullmatch(text) if text.isascii() else None
    value = 0.0
    if match is not None:
        value = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper())
    if not value:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 100, 100M or 256MiB, found {text!r}")
    return value


def positive(text: str) -> int:
    """Parse a positive integer (argument type)."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def whole(text: str) -> int:
    """Parse an integer (argument type)."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None


def number(text: str) -> float:
    """Parse a number (argument type)."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1 (argument type)."""
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
    """Return the fields that --image-field and the like name."""
    from mmbeam.config import FieldMap

    return FieldMap(**{kind: getattr(args, f"{kind}_field") for kind in KINDS})


def shared_options(args: argparse.Namespace, features: bool = False) -> dict[str, Any]:
    """Return the arguments of `job_arguments` as fields of JobOptions, checked as far as possible without torch.

    With `features`, the input may also be features. Raise UsageError, NoShardsError or ShardError.
    """
    from mmbeam.clean import parse_image_filter
    from mmbeam.clean.text import check_steps
    from mmbeam.clean.where import compile_where
    from mmbeam.config import Cleaning, Reading, Table
    from mmbeam.jobs.inputs import look_up

    check_url("`output`", args.output)
    steps = tuple(args.clean_text.split(",")) if args.clean_text else ()
    cleaning = Cleaning(text=steps, where=tuple(args.where), image_filter=args.image_filter)
    table = Table(
        path_columns=tuple(args.path_column), url_columns=tuple(args.url_column), bytes_columns=tuple(args.bytes_column)
    )
    reading = Reading(
        fields=fields_of(args),
        table=table,
        limits=limits_of(args),
        cleaning=cleaning,
        draft=args.draft,
        frames=args.frames,
        fps=args.fps,
        isolate_decoding=args.isolate_decoding,
    )
    _check_output(args.output)
    check_steps(steps)
    for where in args.where:
        compile_where(where)
    if args.image_filter is not None:
        parse_image_filter(args.image_filter)
    inputs = None
    if not args.beam_args:  # with a runner, check first whether the workers can reach the input
        inputs = look_up(
            args.input,
            reading,
            strict=args.strict_input,
            allow_local_paths=args.allow_local_paths,
            features=features,
            moved=args.moved,
        )
    else:
        _check_beam(args.beam_args)
    return {
        "input": tuple(args.input),
        "strict_input": args.strict_input,
        "allow_local_paths": args.allow_local_paths,
        "output": args.output,
        "device": args.device,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "limit": args.limit,
        "max_failure_rate": args.max_failure_rate,
        "overwrite": args.overwrite,
        "retry_failures": args.retry_failures,
        "redo_changed": args.redo_changed,
        "dry_run": args.dry_run,
        "price_per_hour": args.price_per_hour,
        "command": args.words,
        "shared_output": args.shared_output,
        "workers": args.workers,
        "reading": reading,
        "inputs": inputs,
        "moved": tuple(args.moved),
        "beam_args": args.beam_args,
    }


def modalities_of(text: str | None) -> "tuple[Modality, ...] | None":
    """Parse the modalities of --modalities. Raise UsageError for an unknown one."""
    if text is None:
        return None
    names = text.split(",")
    for name in names:
        if name not in MODALITIES:
            expected = ", ".join(MODALITIES) + did_you_mean(name, MODALITIES)
            raise UsageError(f"`modalities` {text}: unknown modality {name!r}; expected {expected}")
    return tuple(modality for modality in MODALITIES if modality in names)


def run_job(
    job: "Callable[[OptionsT], Job]", options: "OptionsT", args: argparse.Namespace
) -> Generator[str, None, int]:
    """Run the job that `job` makes of the options. Yield its summary, and return the exit status.

    If Beam's options say not to wait for the job's end, it is only submitted.
    """
    from mmbeam.jobs.options import is_waited_for
    from mmbeam.report.plan import estimate_text, plan_text, units_left
    from mmbeam.report.progress import ProgressLine
    from mmbeam.report.summary import outcome_warnings, summary_text

    with ProgressLine(options.output, sys.stderr), libraries_quiet(args.verbose):
        prepared = job(options)
        if options.dry_run:
            report, calibration = None, prepared.calibrate() if args.estimate and prepared.units else None
        elif is_waited_for(options.beam_args):
            report = prepared.execute()
        else:
            report = None
            prepared.submit()
    if options.writes_nothing:
        yield from plan_text(prepared.run, prepared.units, options.overwrite)
        if not options.dry_run:
            yield "The job was described, and nothing was handed over to the runner. Omit --dry_run to submit it."
            return 0
        if calibration is not None:
            left = units_left(prepared.run, prepared.units, options.overwrite)
            devices = max(options.workers, prepared.devices)
            yield from estimate_text(left, calibration, devices, options.price_per_hour)
        return 0
    if report is None:
        yield f"Submitted, without waiting for the end. `mmbeam status {redact(options.output)}` shows its progress."
        return 0
    yield summary_text(report, options.output)
    for note in prepared.run.recorded.get("notes", ()):
        yield f"note: {note}"
    for warning in (*prepared.warnings, *outcome_warnings(report.tally, prepared.run.configuration)):
        yield f"warning: {warning}"
    all_failed = report.tally.failed > 0 and not report.tally.rows
    return SOME_UNITS_FAILED if report.units_failed or report.broken or all_failed else 0


@contextmanager
def libraries_quiet(verbose: bool) -> Iterator[None]:
    """Discard what libraries print on stderr without logging it, such as Beam's traceback of each error of a step.

    mmbeam's log and progress line are not affected: they keep a reference to the original stream.
    """
    if verbose:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


def check_url(name: str, url: str) -> None:
    """Raise UsageError if no installed package opens `url`."""
    from mmbeam.readers.paths import file_system, public_path

    try:
        file_system(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{name} {public_path(url)}: {error}") from error


def _check_output(output: str) -> None:
    """Raise UsageError if a local output, or a part of its path, is a file."""
    from mmbeam.readers.paths import is_local, local_path

    if is_local(output):
        path = Path(local_path(output))
        for place in (path, *path.parents):
            if place.is_file():
                raise UsageError(f"`output` {output}: expected a directory, found a file, {place}; choose another one")


def check_model(model: str) -> None:
    """Raise ModelError for a model that is a file, or a path that does not exist, before torch is imported."""
    from mmbeam.readers.paths import is_local

    package, colon, rest = model.partition(":")
    model = rest if colon and package in ("open_clip", "timm") else model
    path = Path(model).expanduser()
    if not is_local(model) or path.is_dir():
        return
    if path.exists():
        raise ModelError(f"{model}: expected a directory with config.json and model.safetensors, found a file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: expected an existing directory, or a hub name like org/model")


def _check_beam(args: Sequence[str]) -> None:
    """Raise UsageError for an argument that Apache Beam rejects; Beam's argparse would end the process."""
    from mmbeam.jobs.options import pipeline_options

    message = io.StringIO()
    try:
        with redirect_stderr(message):
            pipeline_options(args)
    except SystemExit as error:
        raise UsageError(message.getvalue().strip().rpartition("error: ")[2]) from error
