"""The summary that a run prints at its end."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.report.progress import clock
from mmbeam.runs.store import Store
from mmbeam.types import RunReport, Tally

STEPS = {  # of a unit's own thread, one after the other: they add up to its time
    "compute": "the model",
    "load_model": "loading it",
    "read_wait": "waiting for samples",
    "device_wait": "waiting for the device",
    "write": "writing",
}
SHOWN = 5  # failed units that are named
LOOKED_AT = 8  # failure files in which examples are sought, the smallest first


def summary_text(report: RunReport, output: str) -> str:
    """The run in a few lines: counts, rate, where the time went, what failed and why, where the rows are."""
    store = Store(output)
    lines = [*_counts(report), *_times(report), *trouble_text(report.tally, store)]
    return "\n".join([*lines, *failed_text(report.failed), f"rows: {store}/data/"])


def _counts(report: RunReport) -> Iterator[str]:
    kept = f", {report.units_kept:,} committed before" if report.units_kept else ""
    failed = f", {report.units_failed:,} FAILED" if report.units_failed else ""
    yield f"units: {report.units_written:,} written{kept}{failed}"
    yield from samples_text(report.tally)


def samples_text(tally: Tally) -> Iterator[str]:
    """What became of the samples, and what was made of them."""
    parts = [f"{tally.rows:,} rows"]
    parts += [f"{tally.failed:,} failed"] if tally.failed else []
    parts += [f"{count:,} skipped ({name})" for name, count in sorted(tally.skipped.items())]
    lost = f"; {tally.impaired:,} of the rows lost some of their outputs" if tally.impaired else ""
    yield f"samples: {tally.samples:,} = {' + '.join(parts)}{lost}"
    yield "made: " + (", ".join(f"{count:,} {name}" for name, count in tally.outputs.items()) or "nothing")


def _times(report: RunReport) -> Iterator[str]:
    if not report.units_written:
        return
    took = f"{report.wall_seconds:.1f}s" if report.wall_seconds < 60 else clock(report.wall_seconds)
    light = f"speed of light {report.model_utilisation or 0:.0%} (the share of the time in which the model computed)"
    if report.model_utilisation is None:  # only the runner knows how many workers there are
        light = f"the models of all workers computed for {clock(report.tally.seconds.get('compute', 0.0))}"
    yield f"time: {took}, {report.rate:,.1f} samples/s, {light}"
    seconds = [report.tally.seconds.get(step, 0.0) for step in STEPS]
    shares = [f"{name} {part / (sum(seconds) or 1.0):.0%}" for name, part in zip(STEPS.values(), seconds, strict=True)]
    yield f"a unit's time: {', '.join(shares)}"


def trouble_text(tally: Tally, store: Store) -> Iterator[str]:
    """Warnings, each kind of failure with its count and one record, and where all records are."""
    for name, count in sorted(tally.warnings.items()):
        yield f"warning: {count:,} {name}"
    if tally.repeated_keys:
        yield f"warning: {tally.repeated_keys:,} samples have a key that came before in their shard"
    examples = find_examples(store, tally.failures) if tally.failures else {}
    for kind, count in sorted(tally.failures.items(), key=lambda item: -item[1]):
        record = examples.get(kind)
        example = "" if record is None else f", for example {record['key']} of {record['shard']}: {record['message']}"
        yield f"failures: {count:,} {kind}{example}"
    if tally.failures:
        yield f"failure records: {store}/failures/"


def find_examples(store: Store, kinds: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """One failure record of each kind ("step: error"), where the smallest few files have one."""
    found: dict[str, dict[str, Any]] = {}
    sizes = store.list("failures")
    for name in sorted(sizes, key=lambda name: (sizes[name], name))[:LOOKED_AT]:
        if found.keys() >= kinds.keys():
            break
        for record in pq.read_table(pa.BufferReader(store.read(f"failures/{name}"))).to_pylist():
            if record["key"]:  # else it is a unit's, not a sample's
                found.setdefault(f"{record['step']}: {record['error']}", record)
    return found


def failed_text(failed: Mapping[str, str]) -> Iterator[str]:
    """Which units failed and why, and what to do."""
    if not failed:
        return
    for unit, reason in sorted(failed.items())[:SHOWN]:
        yield f"FAILED unit {unit}: {reason}"
    if len(failed) > SHOWN:
        yield f"FAILED: {len(failed) - SHOWN:,} more units, in _mmbeam/summary.json"
    yield "Run the same command again to try the failed units again; nothing else is done twice."
