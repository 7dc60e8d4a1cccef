"""The options of all jobs, and every check of them that needs no model."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    TestOptions,
)

from mmbeam.clean import parse_image_filter
from mmbeam.clean.text import check_steps
from mmbeam.clean.where import compile_where
from mmbeam.config import ModelRef, Reading, Windows
from mmbeam.errors import SECRET_NAME, UsageError, public_url, redact
from mmbeam.jobs.cluster import check_cluster, check_ended, check_input, check_output, runner_of, workers_are_here
from mmbeam.models.placement import devices_of
from mmbeam.names import UNNAMED_MODEL
from mmbeam.process import cores

log = logging.getLogger(__name__)

DIRECT = ("direct", "switchingdirect")  # in Beam this is Prism, a program to be downloaded, or FnApiRunner
IN_PROCESS = ("", *DIRECT)  # names that `runner_of` returns for a runner in this process
RUNNER = "mmbeam.jobs.runner.InProcessRunner"
UNITS_PER_DEVICE = 2  # in flight: one computes while the other opens, decodes or writes

# The options of other runners that correspond to `workers`.
_INSTEAD = {
    "flink": "--parallelism (units in flight) and --sdk_worker_parallelism (processes of a TaskManager)",
    "dataflow": "--num_workers and --max_num_workers (machines)",
    "fnapi": "--direct_num_workers (units in flight)",
    "portable": "the job service's own options, and --sdk_worker_parallelism",
}


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The options that all jobs share."""

    input: tuple[str, ...]
    strict_input: bool = False  # a pattern that matches nothing is an error
    allow_local_paths: bool = False  # lists that are fetched may name local paths, other servers and other buckets
    output: str
    device: str = "auto"
    dtype: str | None = None
    batch_size: int | None = None  # None: by the device
    limit: int | None = None  # the first N samples, as one unit
    max_failure_rate: float = 0.05
    overwrite: bool = False
    retry_failures: bool = False
    redo_changed: bool = False  # redo the units whose inputs have changed since they were committed
    dry_run: bool = False  # plan, and write nothing
    price_per_hour: float | None = None  # of the machines, for the estimate of a plan
    shared_output: bool = False  # a local output is the same directory on every worker
    workers: int = 1  # processes of this machine that share the work; 1: this process does it
    reading: Reading = field(default_factory=Reading)
    windows: Windows = field(default_factory=Windows)
    moved: tuple[str, ...] = ()  # OLD=NEW: the shards under NEW are those that this run knows under OLD
    beam_args: tuple[str, ...] = ()  # Beam's own options, as Beam spells them
    command: tuple[str, ...] = ()  # the words of the command line, for `mmbeam rerun`; () from Python
    inputs: Any = field(default=None, repr=False, compare=False)  # inputs.Inputs, if they were looked up already

    @property
    def image_filter(self) -> tuple[str, float] | None:
        """The filter of `reading`, parsed. Raises UsageError."""
        name = self.reading.cleaning.image_filter
        return None if name is None else parse_image_filter(name)

    @property
    def writes_nothing(self) -> bool:
        """Whether the job is only planned, or by Beam's own `--dry_run` only described."""
        return self.dry_run or is_dry_run(self.beam_args)

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that run.json records although they change no row."""
        beam_args = public_args(self.beam_args)
        recorded: dict[str, Any] = {
            "windows": asdict(self.windows.on(device_of(self))),
            "workers": self.workers,
            "beam_args": beam_args,
        }
        if self.command:
            words = public_args(self.command)
            is_whole = words == list(self.command)  # no secret was removed
            recorded["command"] = {"words": words, "is_whole": is_whole, "directory": str(Path.cwd())}
        return recorded


def pipeline_options(args: Sequence[str] = (), devices: int = 1) -> PipelineOptions:
    """Return Beam's options. With no runner named it is InProcessRunner, with two units in flight per device.

    `devices` is the number of devices that compute. Raises UsageError for an argument that Beam does not know: Beam
    itself only logs and drops it. Raises it also for Beam's multi_processing mode.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, conflict_handler="resolve")
    classes = [PipelineOptions]
    for options in classes:
        options._add_argparse_args(parser)  # the hook that Beam documents for options of a user
        classes += options.__subclasses__()
    _, unknown = parser.parse_known_args(list(args))
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]}: neither mmbeam nor Apache Beam has it (see mmbeam --help)")
    runner = runner_of(args)
    if (
        runner in (*IN_PROCESS, "fnapi")
        and PipelineOptions(list(args)).view_as(DirectOptions).direct_running_mode == "multi_processing"
    ):
        raise UsageError(
            "--direct_running_mode=multi_processing: the job hangs when one of Beam's processes ends; use `workers`"
        )
    if runner in IN_PROCESS:
        threads = ["--direct_running_mode=multi_threading", f"--direct_num_workers={UNITS_PER_DEVICE * devices}"]
        args = [*threads, *args, f"--runner={RUNNER}"]
    elif runner == "fnapi":
        args = [*args, f"--runner={RUNNER}"]
    elif runner == "dataflow":
        # Dataflow would start a process per core, with a model in each, and pickle all of __main__. One process of a
        # machine holds the model instead, with two units in flight, and the image holds the package.
        one_model = ["--no_save_main_session", f"--number_of_worker_harness_threads={UNITS_PER_DEVICE}"]
        if not PipelineOptions(list(args)).view_as(DebugOptions).lookup_experiment("use_multiple_sdk_containers"):
            one_model.append("--experiments=no_use_multiple_sdk_containers")
        args = [*one_model, *args]
    return PipelineOptions(list(args))


def is_dry_run(args: Sequence[str]) -> bool:
    """Return whether Beam's options say to describe the job and to hand nothing over."""
    return bool(PipelineOptions(list(args)).view_as(TestOptions).dry_run)


def is_waited_for(args: Sequence[str]) -> bool:
    """Return whether the launcher waits for the job to end: not for a template, a dry run or no_wait_until_finish."""
    options = PipelineOptions(list(args))
    template = options.view_as(GoogleCloudOptions).template_location
    return not (template or is_dry_run(args) or options.view_as(StandardOptions).no_wait_until_finish)


def device_of(options: JobOptions) -> str:
    """Return the workers' device, such as "cuda:0", or "cuda" for several. Checked only if they run on this machine."""
    if workers_are_here(options.beam_args):
        devices = devices_of(options.device)
        return devices[0] if len(devices) == 1 else devices[0].partition(":")[0]
    if options.device == "auto":
        raise UsageError("`device` auto: the workers are on other machines; choose cuda or cpu")
    return options.device


def check_options(options: JobOptions) -> None:
    """Raise UsageError for invalid or contradictory options, JobError for a cluster that does not answer."""
    pipeline_options(options.beam_args)
    if runner_of(options.beam_args) in DIRECT:
        log.warning(
            "--runner=DirectRunner: the job runs in this process (Beam's FnApiRunner); --runner=PrismRunner is Prism"
        )
    check_steps(options.reading.cleaning.text)
    for where in options.reading.cleaning.where:
        compile_where(where)
    check_workers(options)
    check_output(options.output, options.beam_args, options.shared_output)
    check_input(options.input, options.beam_args, options.shared_output, options.allow_local_paths)
    check_ended(options.beam_args, is_waited_for(options.beam_args))
    check_cluster(options.beam_args, options.device)


def check_workers(options: JobOptions) -> None:
    """Raise UsageError for invalid `workers`; warn if there are more than cores."""
    if options.workers < 1:
        raise UsageError(f"`workers` {options.workers}: expected at least 1")
    if options.workers == 1:
        return
    runner = runner_of(options.beam_args)
    if runner not in IN_PROCESS:
        raise UsageError(
            f"`workers` {options.workers}: these are processes of this machine, without a runner; with "
            f"--runner={runner} use {_INSTEAD.get(runner, 'its own options')}, or leave --runner out"
        )
    if any(arg.startswith("--direct_") for arg in options.beam_args):
        raise UsageError("`workers` and --direct_... (of Beam's in-process runner) are mutually exclusive")
    if not is_waited_for(options.beam_args):
        raise UsageError("`workers`: the processes end with this command, which must wait for them")
    if any(path.startswith("memory:") for path in (options.output, *options.input)):
        raise UsageError("`workers`: memory:// exists in one process only; the others would not see it")
    if options.workers > cores():
        log.warning("%d workers: more than the %d cores here", options.workers, cores())


def public_args(args: Sequence[str]) -> list[str]:
    """Return Beam's options as run.json may hold them: no secret's value, no user part or query string of a URL."""
    shown, secret = [], False
    for arg in args:
        name, equals, _ = arg.partition("=")
        if name.startswith("--"):
            secret = SECRET_NAME.search(name) is not None
            shown.append(f"{name}=..." if secret and equals else redact(arg))
        else:
            shown.append("..." if secret else redact(arg))
    return shown


def check_names(models: Sequence[ModelRef]) -> None:
    """Raise UsageError unless each model has a name of its own, which prefixes its columns; a single one needs none."""
    names = [ref.name or UNNAMED_MODEL for ref in models]
    if len(set(names)) < len(names):
        listed = ", ".join(
            f"{ref.name}={public_url(ref.model)}" if ref.name else public_url(ref.model) for ref in models
        )
        again = " ".join(
            f"--model {name}={public_url(ref.model)}" for name, ref in zip("abcdefgh", models, strict=False)
        )
        raise UsageError(f"`models`: expected a different name for each, found {listed}; for example {again}")
