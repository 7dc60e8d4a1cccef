"""The status of the run in an output, for `mmbeam status`. Read-only."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmbeam.report.summary import broken_text, failed_text, samples_text, trouble_text
from mmbeam.runs.commits import committed, load_reports, read_failures
from mmbeam.runs.control import stop_reason
from mmbeam.runs.plan import load_plan
from mmbeam.runs.run import Run, find_run, list_failures
from mmbeam.runs.summary import broken_shards
from mmbeam.types import Tally


def status_text(output: str) -> Iterator[str]:
    """Yield lines that state the configuration, units, samples and failures of a run, and why it stopped, if it did.

    Raise JobError if the output holds no run.
    """
    run = find_run(output)
    yield f"run: {run.store}, fingerprint {run.fingerprint}"
    yield from _configuration(run)
    done = committed(run)
    failed = failed_units(run, done)
    ids = {str(unit["id"]) for unit in load_plan(run)} | done | failed.keys()
    planned = len(ids) or int(run.configuration.get("limit") is not None)  # with a limit, one unit, even if not planned
    left = planned - len(done) - len(failed)
    yield (
        f"units: {planned:,} planned, {len(done):,} committed"
        + (f", {len(failed):,} FAILED" if failed else "")
        + (f", {left:,} to do" if left else "")
    )
    if done:
        reports = list(load_reports(run, sorted(done)))
        tally = sum((report.tally for report in reports), Tally())
        yield from samples_text(tally)
        yield from trouble_text(tally, run.store)
        yield from broken_text(broken_shards(reports))
    yield from failed_text(failed)
    reason = stop_reason(run)
    if reason is not None:
        yield f"STOPPED: {reason}"
    if left and reason is None:
        yield "The job is running or was interrupted. To resume it, run the same command again."


def _configuration(run: Run) -> Iterator[str]:
    """Yield the task, the models, and the options that differ from the defaults."""
    configuration, recorded = run.configuration, run.recorded
    task, dtype, device = configuration.get("task"), configuration.get("dtype"), recorded.get("device")
    yield f"task: {task}, {dtype} on {device}"
    for name, model in recorded.get("models", {}).items():
        modalities = ", ".join(configuration.get("modalities", {}).get(name, ()))
        family = configuration.get("models", {}).get(name, {}).get("family")
        yield f"model: {name} = {model} ({family}: {modalities})"
    cleaning = configuration.get("reading", {}).get("cleaning", {})
    choices: Mapping[str, Any] = {"limit": configuration.get("limit"), **cleaning}
    changed = {name: value for name, value in choices.items() if value}
    if changed:
        yield f"options: {json.dumps(changed, ensure_ascii=False)[1:-1]}"


def failed_units(run: Run, done: set[str]) -> dict[str, str]:
    """Return the reasons of failed units that are not committed, by unit."""
    names = [name for name in list_failures(run.store) if name.endswith("-failed.parquet")]
    units = {name.removeprefix("part-").removesuffix("-failed.parquet"): name for name in names}
    records = {unit: read_failures(run.store, name) for unit, name in units.items() if unit not in done}
    return {unit: str(of_unit[0]["message"]) for unit, of_unit in records.items() if of_unit}
