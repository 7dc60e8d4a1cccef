"""How far the run in an output is, for `mmbeam status`. It reads; nothing is written."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam import runs
from mmbeam.report.summary import failed_text, samples_text, trouble_text
from mmbeam.runs import Run
from mmbeam.types import Tally


def status_text(output: str) -> Iterator[str]:
    """Lines on the run in `output`: what it does, units and samples so far, what failed, what stopped it.

    Raises JobError if the output holds no run.
    """
    run = runs.find_run(output)
    yield f"run: {run.store}, fingerprint {run.fingerprint}"
    yield from _configuration(run)
    done = runs.committed(run)
    failed = _failed(run, done)
    planned = _planned(run, done | failed.keys())
    left = planned - len(done) - len(failed)
    yield (
        f"units: {planned:,} planned, {len(done):,} committed"
        + (f", {len(failed):,} FAILED" if failed else "")
        + (f", {left:,} to do" if left else "")
    )
    if done:
        tally = sum((report.tally for report in runs.load_reports(run, sorted(done))), Tally())
        yield from samples_text(tally)
        yield from trouble_text(tally, run.store)
    yield from failed_text(failed)
    reason = runs.stopped(run)
    if reason is not None:
        yield f"STOPPED: {reason}"
    if left and reason is None:
        yield "The job is at work, or was interrupted: the same command again goes on from what is committed."


def _configuration(run: Run) -> Iterator[str]:
    """The task, the models, and what differs from a plain run of them."""
    configuration, recorded = run.configuration, run.recorded
    task, dtype, device = configuration.get("task"), configuration.get("dtype"), recorded.get("device")
    yield f"task: {task}, {dtype} on {device}"
    for name, model in recorded.get("models", {}).items():
        modalities = ", ".join(configuration.get("modalities", {}).get(name, ()))
        family = configuration.get("models", {}).get(name, {}).get("family")
        yield f"model: {name} = {model} ({family}: {modalities})"
    cleaning = configuration.get("reading", {}).get("cleaning", {})
    choices: Mapping[str, Any] = {"limit": configuration.get("limit"), **cleaning}
    made = {name: value for name, value in choices.items() if value}
    if made:
        yield f"options: {json.dumps(made, ensure_ascii=False)[1:-1]}"


def _planned(run: Run, known: set[str]) -> int:
    """How many units there are; a run with --limit has one, planned or not yet."""
    ids = {str(unit["id"]) for unit in runs.load_plan(run)} | known
    return len(ids) or int(run.configuration.get("limit") is not None)


def _failed(run: Run, done: set[str]) -> dict[str, str]:
    """Why units that are not committed have failed, by unit."""
    names = [name for name in run.store.list("failures") if name.endswith("-failed.parquet")]
    units = {name.removeprefix("part-").removesuffix("-failed.parquet"): name for name in names}
    return {
        unit: pq.read_table(pa.BufferReader(run.store.read(f"failures/{name}")))["message"][0].as_py()
        for unit, name in units.items()
        if unit not in done
    }
