"""A run and its place: the manifest, the plan, what is committed, what stops it, and its report.

    OUT/data/part-<unit>.parquet                  the commit of a unit
    OUT/failures/part-<unit>-<attempt>.parquet    named by the footer of the unit's Parquet
    OUT/_mmbeam/run.json                          configuration, fingerprint, what is recorded beside them
    OUT/_mmbeam/plan/<n>.jsonl                    work units, one file per launch that added or corrected some
    OUT/_mmbeam/commits/<unit>.json               a cache of the footers
    OUT/_mmbeam/stop.json, lock, summary.json

Every file is published whole (store.py). Reading changes nothing: a run can be looked at by who may not
write there. Rows are made in rows.py and written in parquet.py.
"""

from mmbeam.runs.commits import committed, load_reports, report_of
from mmbeam.runs.control import check_rate, clear_stop, go_on, judge, lock, note, running_here, stop, stopped
from mmbeam.runs.extend import extend_plan
from mmbeam.runs.failed import report_failed_unit
from mmbeam.runs.plan import load_plan
from mmbeam.runs.rows import build_schema
from mmbeam.runs.run import Run, differences, find_run, fingerprint_of, open_run, read_manifest
from mmbeam.runs.summary import confirm_summary, read_summary, sweep, write_summary

__all__ = [
    "Run",
    "build_schema",
    "check_rate",
    "clear_stop",
    "committed",
    "confirm_summary",
    "differences",
    "extend_plan",
    "find_run",
    "fingerprint_of",
    "go_on",
    "judge",
    "load_plan",
    "load_reports",
    "lock",
    "note",
    "open_run",
    "read_manifest",
    "read_summary",
    "report_failed_unit",
    "report_of",
    "running_here",
    "stop",
    "stopped",
    "sweep",
    "write_summary",
]
