"""What every job does before and after its pipe expression: options checked, runner chosen, errors made plain."""

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import SimpleNamespace

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    TestOptions,
)
from apache_beam.runners.portability.fn_api_runner import fn_runner, worker_handlers
from apache_beam.runners.runner import PipelineResult, PipelineState
from apache_beam.utils.thread_pool_executor import UnboundedThreadPoolExecutor

from mmbeam import errors, runs
from mmbeam.config import Reading, Windows
from mmbeam.errors import FailureRateError, JobError, MissingModalityError, UsageError
from mmbeam.jobs.cluster import runner_error, runner_of, workers_are_here
from mmbeam.models.placement import devices_of
from mmbeam.names import Modality
from mmbeam.readers.paths import public_text
from mmbeam.report.inspect import Probe
from mmbeam.report.progress import progress
from mmbeam.runs import Run
from mmbeam.types import RunReport, WorkUnit

log = logging.getLogger(__name__)

DIRECT = ("direct", "switchingdirect")  # would be Prism, a program to be downloaded, or FnApiRunner, as Beam sees fit
IN_PROCESS = ("", *DIRECT)  # the runners, as runner_of names them, that are this process
UNITS_PER_DEVICE = 2  # at once: one computes while the other opens, decodes or writes
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
    shared_output: bool = False  # a local output is the same directory on every worker
    workers: int = 1  # processes of this machine that share the work; 1: this one does it
    reading: Reading = field(default_factory=Reading)
    windows: Windows = field(default_factory=Windows)
    beam_args: tuple[str, ...] = ()  # Beam's own options, as Beam spells them


def pipeline_options(args: Sequence[str] = (), devices: int = 1) -> PipelineOptions:
    """Beam's options; with no runner named, this process with two units at once for each of its `devices`.

    Raises UsageError for an argument that Beam does not know: Beam itself only logs and drops it.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, conflict_handler="resolve")
    for options in _subclasses(PipelineOptions):
        options._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(args))
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]}: neither mmbeam nor Apache Beam has it (see mmbeam --help)")
    runner = runner_of(args)
    if runner in IN_PROCESS:
        threads = ["--direct_running_mode=multi_threading", f"--direct_num_workers={UNITS_PER_DEVICE * devices}"]
        args = [*threads, *args, "--runner=FnApiRunner"]
    elif runner == "dataflow":
        args = [*_one_model_per_machine(args), *args]
    _send_when_full()
    _wait_for_bundles()
    return PipelineOptions(list(args))


def _one_model_per_machine(args: Sequence[str]) -> list[str]:
    """For Dataflow, which would start a process for each core, with a model in each, and pickle all of __main__.

    Here one process of a machine holds the model, with two units at once, and the image holds the package.
    """
    made = ["--no_save_main_session", f"--number_of_worker_harness_threads={UNITS_PER_DEVICE}"]
    if not PipelineOptions(list(args)).view_as(DebugOptions).lookup_experiment("use_multiple_sdk_containers"):
        made.append("--experiments=no_use_multiple_sdk_containers")
    return made


def is_waited_for(args: Sequence[str]) -> bool:
    """Whether a launch sees the job's end: not if it makes a template of it, only tries it, or is told not to wait."""
    options = PipelineOptions(list(args))
    template = options.view_as(GoogleCloudOptions).template_location
    tried = options.view_as(TestOptions).dry_run
    return not (template or tried or options.view_as(StandardOptions).no_wait_until_finish)


def _send_when_full() -> None:
    """Keep FnApiRunner's harnesses from sending what they have every second, from a thread of its own.

    That thread empties the buffer without a lock against the one that fills it, so elements got lost: 51,446
    of 2,870,845 in one run of Beam 2.77. Without a time limit a buffer is sent when it is full, and at the end.
    """
    worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = -1


class _Bundles(UnboundedThreadPoolExecutor):
    """The threads of a stage's bundles. Who leaves them by an error waits for them, but for Ctrl-C."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(wait=kind is None or issubclass(kind, Exception))


def _wait_for_bundles() -> None:
    """Have FnApiRunner end a failed job once its bundles have ended, which is soon: see runs.running_here.

    Its own pool of threads is never shut down, so that it would tear down the steps of bundles at work, and let them
    run on when the job has ended; such a bundle then prints a KeyError of its own number. Seen with Beam 2.77.
    """
    fn_runner.thread_pool_executor = SimpleNamespace(shared_unbounded_instance=_Bundles)


def _subclasses(cls: type[PipelineOptions]) -> list[type[PipelineOptions]]:
    return [cls, *(each for sub in cls.__subclasses__() for each in _subclasses(sub))]


def device_of(options: JobOptions) -> str:
    """The workers' device; of several GPUs, their kind. Looked for here only if the workers are here, since
    "auto" cannot be known elsewhere."""
    if workers_are_here(options.beam_args):
        found = devices_of(options.device)
        return found[0] if len(found) == 1 else found[0].partition(":")[0]
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
    return {name: metadata.version(name) for name in PACKAGES} | _installed("vllm")


def _installed(name: str) -> dict[str, str]:
    """The version of a package that may be missing."""
    try:
        return {name: metadata.version(name)}
    except metadata.PackageNotFoundError:
        return {}


def execute(
    run: Run,
    units: Sequence[WorkUnit],
    args: Sequence[str],
    build: Callable[[beam.Pipeline], object],
    check: Callable[[RunReport], None],
    devices: int = 1,
) -> RunReport:
    """Run the pipeline that `build` makes, unless every unit is committed, and read the run's report.

    Raises UsageError if Beam's options say that nobody waits for its end: that is for `submit`.
    """
    if not is_waited_for(args):
        raise UsageError(
            "--template_location, --dry_run, --no_wait_until_finish: nobody waits for its report: launch()"
        )
    progress.start(len(units))
    if not to_do(run, units):
        return confirm(run, units, check)
    with runs.running_here(run) as raised:
        try:
            state = submit(run, args, build, devices).wait_until_finish()
        except Exception as error:
            raise (raised[0] if raised else _plain(run, error, args)) from error
    if state != PipelineState.DONE:
        raise JobError(f"the pipeline ended as {state}; the runner's log says why")
    return runs.read_summary(run)


def to_do(run: Run, units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """The units that are not committed, or are to be replaced."""
    done = runs.committed(run)
    return [unit for unit in units if unit.replace or unit.id not in done]


def confirm(run: Run, units: Sequence[WorkUnit], check: Callable[[RunReport], None]) -> RunReport:
    """The report of a run of which nothing is left to do."""
    log.info("every unit is committed already")
    report = runs.confirm_summary(run, list(runs.load_reports(run, [unit.id for unit in units])))
    check(report)
    return report


def submit(run: Run, args: Sequence[str], build: Callable[[beam.Pipeline], object], devices: int = 1) -> PipelineResult:
    """Hand the pipeline that `build` makes to its runner, even if every unit is committed, and do not wait."""
    runs.clear_stop(run)
    pipeline = beam.Pipeline(options=pipeline_options(args, devices))
    build(pipeline)
    return pipeline.run()


def _plain(run: Run, error: Exception, args: Sequence[str]) -> Exception:
    reason = runs.stopped(run)
    return plain_error(error, args) if reason is None else FailureRateError(reason)


def plain_error(error: Exception, args: Sequence[str] = ()) -> Exception:
    """The error that a step raised in another process, read out of the traceback text that a runner keeps of it."""
    found = _RAISED.findall(str(error))
    if not found:
        return runner_error(error, args) or error
    name, message, step = found[-1]
    kind = getattr(errors, name.rpartition(".")[2], None)
    if isinstance(kind, type) and issubclass(kind, JobError):
        return kind(message)
    return JobError(f"step {step}: {name}: {message} (the same command again goes on from what is committed)")


# The last line of a traceback as Beam's harness decorates it.
_RAISED = re.compile(r"^([\w.]+): (.*?) \[while running '([^']*)'\]", re.MULTILINE)
