"""What every job does before and after its pipe expression: options checked, runner chosen, errors made plain."""

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, StandardOptions
from apache_beam.runners.runner import PipelineState

from mmbeam import errors
from mmbeam.config import Reading, Windows
from mmbeam.errors import FailureRateError, JobError, MissingModalityError, UsageError
from mmbeam.io import runs
from mmbeam.io.paths import public_text
from mmbeam.io.runs import Run
from mmbeam.models.placement import resolve_device
from mmbeam.report.inspect import Probe
from mmbeam.report.progress import progress
from mmbeam.types import Modality, RunReport, WorkUnit

log = logging.getLogger(__name__)
PACKAGES = (
    "mmbeam",
    "apache-beam",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "pillow",
    "simplejpeg",
    "soundfile",
    "soxr",
)
LOCAL_RUNNERS = (None, "DirectRunner", "FnApiRunner", "SwitchingDirectRunner", "PrismRunner")


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What all jobs share."""

    input: tuple[str, ...]
    output: str
    device: str = "auto"
    dtype: str | None = None
    batch_size: int | None = None  # None: by the device
    limit: int | None = None  # the first so many samples, as one unit
    max_failure_rate: float = 0.05
    overwrite: bool = False
    retry_failures: bool = False
    reading: Reading = field(default_factory=Reading)
    windows: Windows = field(default_factory=Windows)
    beam_args: tuple[str, ...] = ()  # Beam's own options, as Beam spells them


def pipeline_options(args: Sequence[str] = ()) -> PipelineOptions:
    """Beam's options; with no runner named, this process with two units at once.

    Raises UsageError for an argument that Beam does not know: Beam itself only logs and drops it.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, conflict_handler="resolve")
    for options in _subclasses(PipelineOptions):
        options._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(args))
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]}: neither mmbeam nor Apache Beam has it (see mmbeam --help)")
    runner = _named_runner(args)
    if runner in (None, "DirectRunner", "SwitchingDirectRunner"):
        if runner:
            log.info("--runner=%s runs in this process, by Beam's FnApiRunner", runner)
        args = ["--direct_running_mode=multi_threading", "--direct_num_workers=2", *args, "--runner=FnApiRunner"]
    return PipelineOptions(list(args))


def _subclasses(cls: type[PipelineOptions]) -> list[type[PipelineOptions]]:
    return [cls, *(each for sub in cls.__subclasses__() for each in _subclasses(sub))]


def _named_runner(args: Sequence[str]) -> str | None:
    runner = PipelineOptions(list(args)).view_as(StandardOptions).runner
    return None if runner is None else str(runner)


def workers_are_here(args: Sequence[str]) -> bool:
    """Whether the workers run on this machine, so that its devices are theirs."""
    environment = PipelineOptions(list(args)).view_as(PortableOptions).environment_type
    return _named_runner(args) in LOCAL_RUNNERS or environment == "LOOPBACK"


def device_of(options: JobOptions) -> str:
    """The workers' device. Looked for here only if the workers are here; elsewhere "auto" cannot be known."""
    if workers_are_here(options.beam_args):
        return resolve_device(options.device)
    if options.device == "auto":
        raise UsageError("--device auto: the workers are elsewhere; say --device cuda or --device cpu")
    return options.device


def check_modalities(found: Probe, able: Sequence[Modality], asked: bool) -> None:
    """Raise MissingModalityError if nothing can come of the job; warn if it looks so but is not certain."""
    missing = [modality for modality in able if modality not in found.modalities]
    if not found.samples or not missing or (not asked and len(missing) < len(able)):
        return
    message = f"no {' and no '.join(missing)} in the first samples of the input, which hold {_list(found.modalities)}"
    if found.whole:
        raise MissingModalityError(f"{message}; see `mmbeam inspect`, and --image-field, --audio-field, --text-field")
    log.warning("%s; going on, since there are more samples", message)


def _list(names: frozenset[Modality]) -> str:
    return ", ".join(sorted(names)) or "no image, audio or text"


def public_args(args: Sequence[str]) -> list[str]:
    """Beam's options as run.json may hold them: no secret's value, no user part or query string of a URL."""
    shown, secret = [], False
    for arg in args:
        name, equals, _ = arg.partition("=")
        if name.startswith("--"):
            secret = _SECRET.search(name) is not None
            shown.append(f"{name}=..." if secret and equals else public_text(arg))
        else:
            shown.append("..." if secret else public_text(arg))
    return shown


# Options whose value is kept out of every file: --s3_secret_access_key, --azure_connection_string, ...
_SECRET = re.compile("secret|token|password|credential|key|connection_string", re.IGNORECASE)


def versions() -> dict[str, str]:
    """The packages whose version may change a value, as installed."""
    return {name: metadata.version(name) for name in PACKAGES}


def execute(
    run: Run,
    units: Sequence[WorkUnit],
    args: Sequence[str],
    build: Callable[[beam.Pipeline], object],
    check: Callable[[RunReport], None],
) -> RunReport:
    """Run the pipeline that `build` makes, unless every unit is committed, and read the run's report."""
    progress.start(len(units))
    done = runs.committed(run)
    if all(unit.id in done and not unit.replace for unit in units):
        log.info("every unit is committed already")
        reports = list(runs.load_reports(run, [unit.id for unit in units]))
        report = runs.confirm_summary(run, reports)
        check(report)
        return report
    runs.clear_stop(run)
    pipeline = beam.Pipeline(options=pipeline_options(args))
    build(pipeline)
    with runs.running_here(run) as raised:
        try:
            state = pipeline.run().wait_until_finish()
        except Exception as error:
            raise (raised[0] if raised else _plain(run, error)) from error
    if state != PipelineState.DONE:
        raise JobError(f"the pipeline ended as {state}; the runner's log says why")
    return runs.read_summary(run)


def _plain(run: Run, error: Exception) -> Exception:
    """The error that a step raised in another process, read out of the traceback text that a runner keeps of it."""
    reason = runs.stopped(run)
    if reason is not None:
        return FailureRateError(reason)
    found = _RAISED.findall(str(error))
    if not found:
        return error
    name, message, step = found[-1]
    kind = getattr(errors, name.rpartition(".")[2], None)
    if isinstance(kind, type) and issubclass(kind, JobError):
        return kind(message)
    return JobError(f"step {step}: {name}: {message} (the same command again goes on from what is committed)")


# The last line of a traceback as Beam's harness decorates it.
_RAISED = re.compile(r"^([\w.]+): (.*?) \[while running '([^']*)'\]", re.MULTILINE)
