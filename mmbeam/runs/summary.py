"""The summary of a run: the sum of its units' reports, checked, and the removal of stale failure files."""

import json
from collections.abc import Sequence

from mmbeam.runs.attempts import marks
from mmbeam.runs.control import locked_by_another
from mmbeam.runs.rows import check_conserved
from mmbeam.runs.run import SUMMARY, Run, failures_unit, list_failures, remove_failures
from mmbeam.runs.store import ATTEMPTS
from mmbeam.types import RunReport, Tally, UnitReport


def write_summary(run: Run, reports: Sequence[UnitReport], wall_seconds: float, devices: int | None = 1) -> RunReport:
    """Write summary.json from the units' reports, as `plan.repair` returns them, and remove stale failure files."""
    summary = sum_up(reports, wall_seconds, devices)
    run.store.replace(SUMMARY, json.dumps(summary.to_json(), indent=2).encode())
    sweep(run, reports)
    return summary


def confirm_summary(run: Run, reports: Sequence[UnitReport]) -> RunReport:
    """Return the summary of a run whose units were all committed by earlier launches.

    summary.json is written only if it describes other rows, or a unit has failed since.
    """
    summary = sum_up(reports, 0.0)
    try:
        rows = read_summary(run).tally.rows
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent, or damaged
        rows = None
    if rows == summary.tally.rows and not summary.units_failed:
        return summary
    return write_summary(run, reports, 0.0)


def sum_up(reports: Sequence[UnitReport], wall_seconds: float, devices: int | None = 1) -> RunReport:
    """Return the report of a run from those of its units.

    `wall_seconds` and `devices` belong to this launch: rate and model utilisation count only what it wrote. `devices`
    is None if only the runner knows the number of workers. Raises FlowError if the counts of a unit are inconsistent.
    """
    for report in reports:
        check_conserved(report.tally, f"unit {report.unit}")
    statuses = [report.status for report in reports]
    written = sum((report.tally for report in reports if report.status == "written"), Tally())
    computed = written.seconds.get("compute", 0.0)
    return RunReport(
        units_written=statuses.count("written"),
        units_kept=statuses.count("kept"),
        units_failed=statuses.count("failed"),
        tally=sum((report.tally for report in reports), Tally()),
        wall_seconds=wall_seconds,
        rate=written.samples / wall_seconds if wall_seconds else 0.0,
        model_utilisation=None if devices is None else computed / (wall_seconds * devices) if wall_seconds else 0.0,
        failed={report.unit: report.error or "" for report in reports if report.status == "failed"},
        broken=broken_shards(reports),
    )


def broken_shards(reports: Sequence[UnitReport]) -> tuple[str, ...]:
    """Return why, for each shard of a committed unit that breaks off."""
    done = (report for report in reports if report.status != "failed")
    return tuple(str(source["broken"]) for report in done for source in report.inputs if source.get("broken"))


def read_summary(run: Run) -> RunReport:
    """Return what the last completed launch wrote. Raises FileNotFoundError if there is none."""
    return RunReport.from_json(json.loads(run.store.read(SUMMARY)))


def sweep(run: Run, reports: Sequence[UnitReport]) -> None:
    """Remove the marks and the unnamed failure files of committed units: what attempts that died or lost have left.

    Failure files of other units stay, since an attempt may be about to commit with them.
    """
    if locked_by_another(run):  # it may be about to commit with a failure file that it has published
        return
    run.store.sweep_scratch()
    current = {report.unit: report.failures_file for report in reports if report.status != "failed"}
    for committed, names in marks(run.store).items():
        for name in names if committed in current else ():
            run.store.remove(f"{ATTEMPTS}/{name}")
    for name in list_failures(run.store):
        unit = failures_unit(name)
        if unit in current and current[unit] != name:
            remove_failures(run.store, name)
