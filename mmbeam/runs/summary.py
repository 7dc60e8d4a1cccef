"""The summary of a run: the sum of its units' reports, checked, and the removal of stale failure and media files."""

import json

from mmbeam.runs.attempts import marks
from mmbeam.runs.commits import Totals
from mmbeam.runs.control import locked_by_another
from mmbeam.runs.run import MEDIA, SUMMARY, Run, failures_unit, list_failures, media_unit, remove_failures
from mmbeam.runs.store import ATTEMPTS
from mmbeam.types import RunReport


def write_summary(run: Run, totals: Totals, wall_seconds: float, devices: int | None = 1) -> RunReport:
    """Write summary.json from the sum of the units, as `plan.repair` returns it, and remove stale failure files."""
    summary = totals.report(wall_seconds, devices)
    run.store.replace(SUMMARY, json.dumps(summary.to_json(), indent=2).encode())
    sweep(run, totals)
    return summary


def confirm_summary(run: Run, totals: Totals) -> RunReport:
    """Return the summary of a run whose units were all committed by earlier launches.

    summary.json is written only if it describes other rows, or a unit has failed since.
    """
    summary = totals.report(0.0)
    try:
        rows = read_summary(run).tally.rows
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent, or damaged
        rows = None
    if rows == summary.tally.rows and not summary.units_failed:
        return summary
    return write_summary(run, totals, 0.0)


def read_summary(run: Run) -> RunReport:
    """Return what the last completed launch wrote. Raises FileNotFoundError if there is none."""
    return RunReport.from_json(json.loads(run.store.read(SUMMARY)))


def sweep(run: Run, totals: Totals) -> None:
    """Remove marks, and unnamed failure and media files, of committed units: what attempts that died or lost have left.

    Files of other units stay, since an attempt may be about to commit with them.
    """
    if locked_by_another(run):  # it may be about to commit with a failure file that it has published
        return
    run.store.sweep_scratch()
    marked = marks(run.store)
    for unit, is_committed in totals.have_committed(marked):
        for name in marked[unit] if is_committed else ():
            run.store.remove(f"{ATTEMPTS}/{name}")
    failures = {name: failures_unit(name) or "" for name in list_failures(run.store)}
    media = {name: media_unit(name) or "" for name in run.store.list(MEDIA)}
    units = {**failures, **media}
    done = [
        name
        for name, (_, is_committed) in zip(units, totals.have_committed(units.values()), strict=True)
        if is_committed
    ]
    for name, is_named in totals.name_files(done):
        if is_named:
            continue
        if name in media:
            run.store.remove(f"{MEDIA}/{name}")
        else:
            remove_failures(run.store, name)
