"""The run's own account: the sum of its units' reports, checked, and the failure files that nothing names removed."""

import json
from collections.abc import Sequence

from mmbeam.errors import FlowError
from mmbeam.runs.control import locked_by_another
from mmbeam.runs.repair import amend
from mmbeam.runs.run import FAILURES, PART, SUMMARY, Run
from mmbeam.types import RunReport, Tally, UnitReport


def check_conserved(tally: Tally, where: str) -> None:
    """Raise FlowError unless every sample became a row, a failure or a named skip."""
    skipped = sum(tally.skipped.values())
    if tally.samples != tally.rows + tally.failed + skipped:
        raise FlowError(
            f"{where}: {tally.samples:,} samples were found, but {tally.rows:,} rows, {tally.failed:,} failed and "
            f"{skipped:,} skipped make {tally.rows + tally.failed + skipped:,}"
        )


def write_summary(run: Run, reports: Sequence[UnitReport], wall_seconds: float, devices: int | None = 1) -> RunReport:
    """Sum up the units' reports, write summary.json, and sweep the failure files. See `amend` and `sum_up`."""
    reports = amend(run, reports)
    summary = sum_up(reports, wall_seconds, devices)
    run.store.replace(SUMMARY, json.dumps(summary.to_json(), indent=2).encode())
    sweep(run, reports)
    return summary


def confirm_summary(run: Run, reports: Sequence[UnitReport]) -> RunReport:
    """The sum of units that were all committed before, amended; summary.json stays, if it tells of the same rows."""
    reports = amend(run, reports)
    summary = sum_up(reports, 0.0)
    try:
        told = read_summary(run).tally.rows
    except FileNotFoundError:
        told = None
    same = told == summary.tally.rows and not summary.units_failed
    return summary if same else write_summary(run, reports, 0.0)


def sum_up(reports: Sequence[UnitReport], wall_seconds: float, devices: int | None = 1) -> RunReport:
    """The report of a run out of those of its units.

    `wall_seconds` and `devices` are this launch's: rate and speed of light count only what it wrote.
    `devices` is None where only the runner knows how many workers it has. Raises FlowError if the counts do not add up.
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
    )


def read_summary(run: Run) -> RunReport:
    """What the last launch that came to its end wrote. FileNotFoundError if none did."""
    return RunReport.from_json(json.loads(run.store.read(SUMMARY)))


def sweep(run: Run, reports: Sequence[UnitReport]) -> None:
    """Remove the failure files of committed units that their footers do not name: of attempts that died or lost.

    Those of units that are not committed stay until they are: an attempt may be about to name them.
    """
    if locked_by_another(run):  # it may be about to name what it has published
        return
    named = {report.unit: report.failures_file for report in reports if report.status != "failed"}
    for name in run.store.list(FAILURES):
        found = PART.fullmatch(name)
        unit = found[1].rpartition("-")[0] if found else None
        if unit in named and named[unit] != name:
            run.store.remove(f"{FAILURES}/{name}")
