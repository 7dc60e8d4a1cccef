"""The summary of a run, printed at its end."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmbeam.names import MODALITIES
from mmbeam.report.progress import clock
from mmbeam.runs.commits import read_failures
from mmbeam.runs.run import FAILURES, failures_unit, list_failures
from mmbeam.runs.store import Store
from mmbeam.types import RunReport, Tally

STEPS = {  # sequential steps of a unit's thread; they add up to its time
    "compute": "model",
    "prepare": "preparing for the device",  # on a GPU, while it computes
    "load_model": "model loading",
    "read_wait": "waiting for samples",
    "device_wait": "waiting for the device",
    "write": "writing",
}
MEMBERS_SHOWN = 10  # at most, of the kinds of members that are not read
SHOWN = 5  # at most, of the failed units
MAX_EXAMPLE_FILES = 8  # failure files that are searched for examples, the smallest first


def summary_text(report: RunReport, output: str) -> str:
    """Return the summary of a run: counts, throughput, time per step, failures, and the path of the rows."""
    store = Store(output)
    kept = f", {report.units_kept:,} committed by an earlier run" if report.units_kept else ""
    failed = f", {report.units_failed:,} FAILED" if report.units_failed else ""
    lines = [f"units: {report.units_written:,} written{kept}{failed}", *samples_text(report.tally), *_times(report)]
    lines += [*trouble_text(report.tally, store), *broken_text(report.broken), *failed_text(report.failed)]
    return "\n".join([*lines, f"rows: {store}/data/"])


def samples_text(tally: Tally) -> Iterator[str]:
    """Yield lines that count samples, rows and outputs."""
    parts = [f"{tally.rows:,} rows"]
    parts += [f"{tally.failed:,} failed"] if tally.failed else []
    parts += [f"{count:,} skipped ({name})" for name, count in sorted(tally.skipped.items())]
    lost = f"; {tally.impaired:,} rows lack some of their outputs" if tally.impaired else ""
    yield f"samples: {tally.samples:,} = {' + '.join(parts)}{lost}"
    yield "outputs: " + (", ".join(f"{count:,} {name}" for name, count in tally.outputs.items()) or "nothing")


def _times(report: RunReport) -> Iterator[str]:
    if not report.units_written:
        return
    took = f"{report.wall_seconds:.1f}s" if report.wall_seconds < 60 else clock(report.wall_seconds)
    utilisation = f"model utilisation {report.model_utilisation or 0:.0%}"
    if report.model_utilisation is None:  # the number of workers is unknown
        utilisation = f"model time of all workers {clock(report.tally.seconds.get('compute', 0.0))}"
    yield f"time: {took}, {report.rate:,.1f} samples/s, {utilisation}"
    seconds = [report.tally.seconds.get(step, 0.0) for step in STEPS]
    total = sum(seconds) or 1.0
    parts = [
        f"{name} {part / total:.0%}"
        for step, name, part in zip(STEPS, STEPS.values(), seconds, strict=True)
        if part or step != "prepare"
    ]
    yield f"time per unit: {', '.join(parts)}"


def outcome_warnings(tally: Tally, configuration: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings that a run did less than one may expect of it: few samples, no rows, or an output of none."""
    limit = configuration.get("limit")
    if not tally.samples:
        yield "the input holds no samples; see what it holds with `mmbeam inspect`"
    elif tally.samples == limit:
        yield f"--limit {limit}: only the first {limit:,} samples were read. Without it, all are"
    if tally.samples and sum(tally.skipped.values()) == tally.samples:
        expressions = " and ".join(f"--where {shlex.quote(name)}" for name in tally.skipped)
        yield f"{expressions} kept none of the {tally.samples:,} samples; see their fields with `mmbeam inspect`"
    for name, count in tally.outputs.items():
        if count == 0 and tally.rows:
            modality = name.removesuffix("_embedding").rpartition("_")[2]
            absent = modality in MODALITIES and not tally.present.get(modality)
            reason = f"none of the {tally.samples:,} samples has {modality}" if absent else "see the failures"
            yield f"{name} is null in all {tally.rows:,} rows: {reason}"


def trouble_text(tally: Tally, store: Store) -> Iterator[str]:
    """Yield lines for warnings, and for each kind of failure with its count and an example."""
    if tally.members:
        shown = sorted(tally.members.items(), key=lambda item: (-item[1], item[0]))
        more = f" and {len(shown) - MEMBERS_SHOWN:,} more kinds" if len(shown) > MEMBERS_SHOWN else ""
        yield f"members not read: {', '.join(f'{count:,} {name}' for name, count in shown[:MEMBERS_SHOWN])}{more}"
    for name, count in sorted(tally.warnings.items()):
        yield f"warning: {count:,} {name}"
    if tally.repeated_keys:
        yield f"warning: {tally.repeated_keys:,} samples repeat a key of their shard"
    examples = find_examples(store, tally.failures) if tally.failures else {}
    for kind, count in sorted(tally.failures.items(), key=lambda item: -item[1]):
        record = examples.get(kind)
        key = f"{record['key']} of " if record is not None and record["key"] else ""
        example = "" if record is None else f", for example {key}{record['shard']}: {record['message']}"
        yield f"failures: {count:,} {kind}{example}"
    if tally.failures:
        yield f"failure records: {store}/{FAILURES}/"


def find_examples(store: Store, kinds: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return a failure record for each kind ("step: error") that occurs in the smallest failure files."""
    examples: dict[str, dict[str, Any]] = {}
    sizes = {name: size for name, size in list_failures(store).items() if failures_unit(name) is not None}
    for name in sorted(sizes, key=lambda name: (sizes[name], name))[:MAX_EXAMPLE_FILES]:
        if examples.keys() >= kinds.keys():
            break
        for record in read_failures(store, name):
            if record["key"] or record["error"] != "ShardError":  # otherwise it is that of a unit
                examples.setdefault(f"{record['step']}: {record['error']}", record)
    return examples


def broken_text(broken: Sequence[str]) -> Iterator[str]:
    """Yield lines that name the shards that break off, and what that means."""
    if not broken:
        return
    yield from (f"BROKEN shard {reason}" for reason in broken[:SHOWN])
    if len(broken) > SHOWN:
        yield f"BROKEN: {len(broken) - SHOWN:,} more shards, in _mmbeam/summary.json"
    yield "What follows in these shards is unknown. Restore them, and use --overwrite or another --output."


def failed_text(failed: Mapping[str, str]) -> Iterator[str]:
    """Yield lines that name the failed units, the reasons, and what to do."""
    if not failed:
        return
    for unit, reason in sorted(failed.items())[:SHOWN]:
        yield f"FAILED unit {unit}: {reason}"
    if len(failed) > SHOWN:
        yield f"FAILED: {len(failed) - SHOWN:,} more units, in _mmbeam/summary.json"
    yield "Run the same command again to retry the failed units."
