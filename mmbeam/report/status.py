"""The status of the run in an output, for `mmbeam status`. Read-only."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from mmbeam.report.progress import clock
from mmbeam.report.summary import SHOWN, broken_text, failed_text, samples_text, trouble_text
from mmbeam.runs.attempts import STALE_SECONDS, marks
from mmbeam.runs.commits import broken_shards, committed, load_reports, read_failures
from mmbeam.runs.control import stop_reason
from mmbeam.runs.plan import load_plan
from mmbeam.runs.run import SUMMARY, Run, find_run, list_failures
from mmbeam.runs.store import ATTEMPTS, process_is_gone
from mmbeam.runs.summary import read_summary
from mmbeam.types import Tally


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An attempt at a unit that has not ended by itself."""

    unit: str
    host: str
    pid: int
    seconds: float  # since its last sign of life; at most BEAT_SECONDS for a process that lives
    is_alive: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a run."""

    run: Run
    planned: int  # units
    committed: int
    failed: Mapping[str, str]  # reasons by unit
    tally: Tally  # of the committed units
    broken: tuple[str, ...]  # why, for each shard that breaks off
    stopped: str | None  # why the run was stopped
    attempts: tuple[Attempt, ...]
    ended: float | None  # when the last launch that finished all units ended, in Unix time
    wall_seconds: float | None  # of that launch

    @property
    def left(self) -> int:
        """The number of units to do."""
        return self.planned - self.committed - len(self.failed)

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return {
            "output": str(self.run.store),
            "fingerprint": self.run.fingerprint,
            "task": self.run.configuration.get("task"),
            "planned": self.planned,
            "committed": self.committed,
            "left": self.left,
            "tally": asdict(self.tally),
            "failed": dict(self.failed),
            "broken": list(self.broken),
            "stopped": self.stopped,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "ended": self.ended,
            "wall_seconds": self.wall_seconds,
        }


def read_status(output: str) -> Status:
    """Return the state of the run in `output`. Raises JobError if the output holds no run."""
    run = find_run(output)
    done = committed(run)
    failed = failed_units(run, done)
    ids = {str(unit["id"]) for unit in load_plan(run)} | done | failed.keys()
    planned = len(ids) or int(run.configuration.get("limit") is not None)  # with a limit, one unit, even if not planned
    attempts = tuple(_attempts(run))
    try:
        summary, ended = read_summary(run), run.store.modified(SUMMARY)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent, or damaged
        summary, ended = None, None
    total = 0 if summary is None else summary.units_written + summary.units_kept
    is_whole = not attempts and len(done) == planned == total
    if summary is not None and is_whole:  # one file instead of a report per unit
        tally, broken = summary.tally, summary.broken
    else:
        reports = list(load_reports(run, sorted(done)))
        tally, broken = sum((report.tally for report in reports), Tally()), broken_shards(reports)
    return Status(
        run=run,
        planned=planned,
        committed=len(done),
        failed=failed,
        tally=tally,
        broken=broken,
        stopped=stop_reason(run),
        attempts=attempts,
        ended=ended if is_whole else None,
        wall_seconds=summary.wall_seconds if summary is not None and is_whole else None,
    )


def _attempts(run: Run) -> Iterator[Attempt]:
    """Yield the attempts whose marks exist, in the order of their units."""
    for unit, names in sorted(marks(run.store).items()):
        for name in names:
            path = f"{ATTEMPTS}/{name}"
            try:
                holder = json.loads(run.store.read(path))
                seconds = max(0.0, time.time() - run.store.modified(path))
                is_gone = process_is_gone(holder)
                is_alive = seconds < STALE_SECONDS if is_gone is None else not is_gone
                host, pid = str(holder["host"]), int(holder["pid"])
            except (FileNotFoundError, ValueError, TypeError, KeyError):  # ended meanwhile, or not one of ours
                continue
            yield Attempt(unit=unit, host=host, pid=pid, seconds=seconds, is_alive=is_alive)


def status_text(output: str) -> Iterator[str]:
    """Yield lines that state the configuration, units, samples and failures of a run, and why it stopped, if it did.

    Raise JobError if the output holds no run.
    """
    status = read_status(output)
    run = status.run
    yield f"run: {run.store}, fingerprint {run.fingerprint}"
    yield from _configuration(run)
    yield (
        f"units: {status.planned:,} planned, {status.committed:,} committed"
        + (f", {len(status.failed):,} FAILED" if status.failed else "")
        + (f", {status.left:,} to do" if status.left else "")
    )
    if status.committed:
        yield from samples_text(status.tally)
        yield from trouble_text(status.tally, run.store)
        yield from broken_text(status.broken)
    yield from failed_text(status.failed)
    working = [attempt for attempt in status.attempts if attempt.is_alive]
    for attempt in working[:SHOWN]:
        ago = f"last sign of life {clock(attempt.seconds)} ago"
        yield f"at work on {attempt.host} (process {attempt.pid}): unit {attempt.unit}, {ago}"
    if len(working) > SHOWN:
        yield f"at work: {len(working) - SHOWN:,} more attempts"
    if status.ended is not None:
        took = f", took {clock(status.wall_seconds)}" if status.wall_seconds else ""
        yield f"ended: {datetime.fromtimestamp(status.ended).astimezone():%Y-%m-%d %H:%M:%S %Z}{took}"
    if status.stopped is not None:
        yield f"STOPPED: {status.stopped}"
    elif status.left and not working:
        dead = len(status.attempts)
        yield (
            "No process is known to work on it"
            + (f"; {dead:,} attempts ended with their process" if dead else "")
            + ". To resume it, run the same command again, or `mmbeam rerun`."
        )


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
