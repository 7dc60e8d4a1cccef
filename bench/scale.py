"""The measured cost of many work units, to check the model of docs/scale.md (scale_model.py).

    python bench/scale.py [--units 100000] [--directory DIR] [--launch]

creates one sparse shard of a gigabyte per unit, then plans the run, kills it with SIGKILL when half of the units are
written, resumes it, runs it again and writes its summary. Planner, pipeline, writer and resume are the real ones;
reading and the model are replaced by a constant window of rows. Each step runs in a separate process. With --launch
nothing is written: the units are planned twice, and made-up reports of them are summed.
"""

import argparse
import contextlib
import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa

from mmbeam.config import MIB, Reading, Windows
from mmbeam.jobs.execute import execute_pipeline
from mmbeam.jobs.options import pipeline_options
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import MAX_UNITS, UNIT_BYTES
from mmbeam.runs.commits import Totals, committed, load_reports
from mmbeam.runs.plan import Launch, extend_plan
from mmbeam.runs.run import Run, open_run
from mmbeam.runs.summary import write_summary
from mmbeam.transforms import Plan, Summarize, WriteParquet
from mmbeam.transforms.plan import Sum, summarize
from mmbeam.transforms.read import ReadUnits
from mmbeam.types import Batch, Needs, Output, Sample, Tally, UnitReport, WorkUnit

ROWS = 2  # of each unit
COLUMN = pa.field("image_embedding", pa.list_(pa.float32()))
VECTORS = pa.array([[0.5] * 8] * ROWS, COLUMN.type)
SHARD_BYTES = 10**9  # if there are fewer than MAX_UNITS shards, the planner would cut each of this size in four


def make_run(output: str) -> Run:
    configuration = {"task": "scale", "columns": [COLUMN.name]}
    outputs = [Output(modalities=frozenset({"image"}), columns=(COLUMN,))]
    return Run.create(output=output, configuration=configuration, recorded={"device": "none"}, outputs=outputs)


def make_shards(directory: Path, count: int) -> None:
    """Create sparse files, which have a size in a listing and occupy no space on disk."""
    size = SHARD_BYTES if count >= MAX_UNITS else UNIT_BYTES
    directory.mkdir()
    for number in range(count):
        with (directory / f"part-{number:06d}.tar").open("wb") as shard:
            shard.truncate(size)


_started = itertools.count()  # units of this process


class ConstantWindow:
    """Replaces the reader and the model by one window of constant rows. Kills its process after `kill_after` units."""

    def __init__(self, kill_after: int | None) -> None:
        self.kill_after = kill_after

    def __call__(self, unit: WorkUnit, *_: Any, **__: Any) -> Generator[Batch]:
        if self.kill_after is not None and next(_started) >= self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        shard = unit.inputs[0].shard
        samples = tuple(_sample(shard.path, number) for number in range(ROWS))
        yield Batch(
            unit=unit,
            index=0,
            last=True,
            samples=samples,
            features={COLUMN.name: VECTORS},
            tally=Tally(samples=ROWS, bytes_read=shard.size or 0, present={"image": ROWS}),
        )


def _sample(shard: str, number: int) -> Sample:
    present = frozenset[Any]({"image"})
    return Sample(key=f"{number:09d}", shard=shard, offset=number * 1024, present=present, image_size=(512, 512))


def read_constant(run: Run, kill_after: int | None = None) -> ReadUnits:
    return ReadUnits(ConstantWindow(kill_after), Needs(), Reading(), run, Windows())


def build(pipeline: beam.Pipeline, run: Run, units: list[WorkUnit], kill_after: int | None = None) -> None:
    """Add the steps of a job without reading and without a model."""
    batches = pipeline | Plan(units, run) | "Read" >> beam.ParDo(read_constant(run, kill_after))
    _ = batches | WriteParquet(run) | Summarize(run)


def plan(directory: Path, run: Run) -> list[WorkUnit]:
    open_run(run)
    return extend_plan(run, list_shards([str(directory / "shards")]))


# The steps. Each runs in a separate process, which prints the returned figures as JSON.


def step_plan(directory: Path) -> dict[str, float]:
    """Measure listing and planning, and the size of the job's description."""
    run = make_run(str(directory / "out"))
    with timed() as seconds:
        units = plan(directory, run)
    with timed() as describing:
        pipeline = beam.Pipeline(options=pipeline_options())
        build(pipeline, run, units)
        size = len(pipeline.to_runner_api().SerializeToString())
    return {"units": len(units), "plan": seconds[0], "describe": describing[0], "description_mb": size / 1e6}


def step_write(directory: Path, kill_after: int | None = None) -> dict[str, float]:
    """Measure the run, and the cost of skipping a committed unit. The process is killed after `kill_after` units."""
    run = make_run(str(directory / "out"))
    with timed() as planning:
        units = plan(directory, run)
    with timed() as listing_seconds:
        kept = sorted(committed(run))
    skipped = [unit for unit in units if unit.id in set(kept[:1000])]
    reader = read_constant(run)
    with timed() as skipping:
        assert all(batch.report for unit in skipped for batch in reader.process(unit))
    with timed() as writing:
        report = execute_pipeline(
            run, units, (), lambda pipeline: build(pipeline, run, units, kill_after), lambda report: None
        )
    assert report.tally.rows == ROWS * len(units)
    return {
        "plan": planning[0],
        "list_committed": listing_seconds[0],
        "kept": report.units_kept,
        "written": report.units_written,
        "ms_per_kept_unit": 1000 * skipping[0] / max(1, len(skipped)),
        "run": writing[0],
    }


def step_reports(directory: Path) -> dict[str, float]:
    """Measure the end of a run, which gathers the report of every unit."""
    run = make_run(str(directory / "out"))
    ids = committed(run)
    with timed() as loading:
        reports = list(load_reports(run, ids))
    with timed() as summing:
        write_summary(run, Totals.of(replace(report, status="written") for report in reports), 1.0)
    return {"load": loading[0], "sum_up": summing[0], "gathered_mb": sum(len(pickle.dumps(r)) for r in reports) / 1e6}


def step_sum(directory: Path, units: int) -> dict[str, float]:
    """Measure the sum of the reports of all units, combined by bundles of ten as a runner does, and the summary."""
    run = make_run(str(directory / "out"))
    planned = Launch(run=run, files=("000000.jsonl",), omitted=frozenset(), changed=zlib.compress(b"[]"))
    tally = Tally(samples=10_000, rows=10_000, bytes_read=SHARD_BYTES, seconds={"compute": 10.0, "read": 1.0})
    with timed() as seconds:
        total, combine, remaining = Totals(), Sum(), planned.ids()
        while ids := list(itertools.islice(remaining, 10)):
            inputs = {"path": f"/corpus/{ids[0]}.tar", "size": SHARD_BYTES, "etag": "e", "begin": 0, "end": None}
            reports = (UnitReport(unit=unit, status="written", tally=tally, inputs=(inputs,)) for unit in ids)
            total = combine.merge_accumulators([total, pickle.loads(pickle.dumps(Totals.of(reports)))])
    size = len(pickle.dumps(total))
    with timed() as summarising:
        report = summarize(total, run, time.time(), None, launches=[planned])
    assert report.units_written == units
    return {"sum": seconds[0], "summary": summarising[0], "sum_mb": size / 1e6}


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """Yield a list, to which the duration of the block in seconds is appended at its end."""
    seconds: list[float] = []
    begin = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - begin)


STEPS = {"plan": step_plan, "write": step_write, "reports": step_reports, "sum": step_sum}


def run_step(step: str, directory: Path, *arguments: int) -> dict[str, float] | None:
    """Run a step in a process, and return its figures; None if it was killed."""
    command = [sys.executable, __file__, "--step", step, "--directory", str(directory), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return None
    done.check_returncode()
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(directory: Path, units: int, only_launch: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and figures of each step. Raises AssertionError if a unit is lost or written twice."""
    make_shards(directory / "shards", units)
    yield "plan", run_step("plan", directory) or {}
    if only_launch:
        yield "again", run_step("plan", directory) or {}
        yield "sum", run_step("sum", directory, units) or {}
        return
    assert run_step("write", directory, units // 2) is None
    before = written(directory)
    assert units // 2 - 2 <= len(before) <= units // 2  # two were in flight
    yield "killed", {"committed": len(before)}
    resumed = run_step("write", directory) or {}
    assert (resumed["kept"], resumed["written"]) == (len(before), units - len(before))
    assert before.items() <= written(directory).items()  # no part was written again
    yield "resumed", resumed
    yield "again", run_step("write", directory) or {}
    yield "reports", run_step("reports", directory) or {}


def written(directory: Path) -> dict[str, int]:
    """Return the modification time of each part in nanoseconds, by name."""
    with os.scandir(directory / "out" / "data") as parts:
        return {part.name: part.stat().st_mtime_ns for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000, help="number of work units (default: 100,000)")
    parser.add_argument("--directory", type=Path, help="parent of the working directory (default: the system's)")
    parser.add_argument("--launch", action="store_true", help="only plan the units, and sum up their reports")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("number", type=int, nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        figures = STEPS[args.step](args.directory, *() if args.number is None else (args.number,))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
        print(json.dumps({**figures, "peak_mb": peak}))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for name, figures in measure(Path(directory), args.units, args.launch):
            print(f"{name:<10}" + "  ".join(f"{key} {value:,.4g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
