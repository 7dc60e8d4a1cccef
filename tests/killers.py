"""A job over texts without a model, whose marked samples end a child process at one of its steps (test_death.py)."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import shards

import mmbeam.readers.windows
from mmbeam import process
from mmbeam.config import Windows
from mmbeam.decode import decode_sample
from mmbeam.jobs.execute import Job, check_present, plan
from mmbeam.jobs.options import JobOptions
from mmbeam.jobs.workers import UnitWork
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import UNIT_BYTES
from mmbeam.runs.commits import Totals
from mmbeam.runs.run import Run
from mmbeam.runs.summary import write_summary
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Batch, Needs, Output, RawSample, Stage, Tally, UnitReport

LENGTH = Output(modalities=frozenset({"text"}), columns=(pa.field("text_length", pa.int32()),))
SIGNALS = {
    "decode": signal.SIGSEGV,
    "prepare": signal.SIGABRT,
    "launch": signal.SIGKILL,
    "collect": signal.SIGSEGV,
    "write": signal.SIGABRT,
}


def in_a_child_process() -> bool:
    """Return whether this is a process that a job or a test started with `python -c`, not one that runs the tests."""
    return sys.argv[0] == "-c" and "pytest" not in sys.modules  # the processes of pytest-xdist start with -c, too


def hold_once(texts: Sequence[str | None]) -> None:
    """Block the first process that reaches a text marked "hold", and note each window that begins.

    The folder HOLD takes a file per window and process, and one of the process that is blocked.
    """
    folder = os.environ.get("HOLD")
    if folder is None or not texts:
        return
    number = str(texts[0]).split()[1]
    (Path(folder) / f"window-{number}-{os.getpid()}").touch()
    if any("hold" in str(text) for text in texts):
        with suppress(FileExistsError):
            (Path(folder) / "held").touch(exist_ok=False)
            threading.Event().wait()


def kill_if(step: str, texts: Sequence[str | bytes | None]) -> None:
    """End a worker process if one of the texts is marked for the step."""
    marked = any(f"kill in {step}" in str(text) for text in texts)
    if marked and in_a_child_process():
        os.kill(os.getpid(), SIGNALS[step])
        time.sleep(60)  # another thread may receive the signal


def _decode(raw: RawSample, reading: Any, needs: Any, crash: str | None, *more: Any) -> Any:
    if crash is None:
        kill_if("decode", [raw.members.get("txt")])
    return decode_sample(raw, reading, needs, crash, *more)


def _write(writer: UnitWriter, batch: Batch, real: Callable[[UnitWriter, Batch], Tally]) -> Tally:
    kill_if("write", [sample.text for sample in batch.samples])
    return real(writer, batch)


@dataclass(frozen=True)
class Lengths(Stage):
    """A stage that counts the characters of each text."""

    key = "lengths"
    needs = Needs(modalities=frozenset({"text"}))
    outputs = (LENGTH,)

    def __reduce__(self) -> Any:
        return _lengths, ()

    def load(self) -> str:
        return "no model"

    def prepare(self, model: str, batch: Batch) -> Iterator[Sequence[str | None]]:
        texts = [sample.text for sample in batch.samples]
        kill_if("prepare", texts)
        yield texts

    def launch(self, model: str, work: Sequence[str | None]) -> Sequence[int | None]:
        kill_if("launch", work)
        hold_once(work)
        return [None if text is None else len(text) for text in work]

    def collect(self, model: str, batch: Batch, results: Sequence[Sequence[int | None]]) -> Batch:
        kill_if("collect", [sample.text for sample in batch.samples])
        return replace(batch, features={**batch.features, "text_length": pa.array(results[0], pa.int32())})


def _lengths() -> Lengths:
    """Make the stage, and in a worker process let marked samples end it at the other steps too."""
    if in_a_child_process():
        mmbeam.readers.windows.decode_sample = _decode
        UnitWriter.write = partial_method(_write, real=UnitWriter.write)  # type: ignore[method-assign]
    return Lengths()


def partial_method(function: Any, real: Any) -> Any:
    """Return the function as a method that gets the method that it replaces."""
    if getattr(real, "replaced", False):  # several stages are unpickled
        return real

    def method(self: Any, *args: Any) -> Any:
        return function(self, *args, real=real)

    method.replaced = True  # type: ignore[attr-defined]
    return method


def make_corpus(directory: Path, marked: dict[int, str], count: int = 24, number: int = 2) -> None:
    """Write shards of texts; `marked` says at which step a sample ends its process, by its number."""
    truths = [
        replace(truth, members={"txt": f"text {index} {marked.get(index, '')}".encode()})
        for index, truth in enumerate(shards.make_truths(count))
    ]
    shards.make_webdataset(directory, truths, shards=number)


def make_job(directory: Path | str, output: Path | str, unit_bytes: int = UNIT_BYTES, **changes: Any) -> Job:
    """The job over a corpus, planned."""
    options = JobOptions(
        input=(str(directory),), output=str(output), device="cpu", windows=Windows(samples=4), max_failure_rate=1.0
    )
    options = replace(options, **changes)
    stage = Lengths()
    configuration = {"task": "embed", "models": {}, "limit": options.limit}
    run = Run.create(
        output=options.output,
        configuration=configuration,
        recorded={},
        outputs=stage.outputs,
        max_failure_rate=options.max_failure_rate,
    )
    return Job(
        run=run,
        stages=(stage,),
        units=plan(run, list_shards(options.input), options, unit_bytes),
        options=options,
        check=partial(check_present, modalities=(), required=()),
    )


def run_units(job: Job) -> list[UnitReport]:
    """Run the job's units one by one through its fused stage, write the summary, and return the reports."""
    work = UnitWork(job.steps, ("cpu",), 1)
    try:
        reports = [work(unit, lambda _: None) for unit in job.units]
    finally:
        process.reset()
    write_summary(job.run, Totals.of(reports), 1.0)
    return reports
