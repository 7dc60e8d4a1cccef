"""The summary that a run prints at its end."""

from collections.abc import Iterator, Mapping

from mmbeam.report.progress import clock
from mmbeam.types import RunReport

WAITS = {"read_wait": "reading", "device_wait": "the device", "write": "writing"}


def summary_text(report: RunReport, output: str) -> str:
    """The run in a few lines: counts, rate, where the time went, what failed, where the rows are."""
    return "\n".join([*_counts(report), *_times(report), *_troubles(report), f"rows: {output.rstrip('/')}/data/"])


def _counts(report: RunReport) -> Iterator[str]:
    tally = report.tally
    units = f"{report.units_written} written, {report.units_kept} kept"
    yield f"units: {units}" + (f", {report.units_failed} FAILED" if report.units_failed else "")
    skipped = sum(tally.skipped.values())
    yield (
        f"samples: {tally.samples:,} = {tally.rows:,} rows + {tally.failed:,} failed + {skipped:,} skipped"
        + (f" ({tally.impaired:,} rows lost some of their outputs)" if tally.impaired else "")
    )
    yield "made: " + (", ".join(f"{count:,} {name}" for name, count in tally.made.items()) or "nothing")


def _times(report: RunReport) -> Iterator[str]:
    if not report.units_written:
        return
    yield f"time: {clock(report.wall_seconds)}, {report.rate:,.1f} samples/s, {_percent(report.speed_of_light)} of it the model's"
    seconds = report.tally.seconds
    total = sum(seconds.get(step, 0.0) for step in ("compute", "load_model", *WAITS)) or 1.0
    yield "waits: " + ", ".join(f"{name} {_percent(seconds.get(step, 0.0) / total)}" for step, name in WAITS.items())


def _troubles(report: RunReport) -> Iterator[str]:
    tally = report.tally
    yield from _listed("skipped", tally.skipped)
    yield from _listed("failures", tally.failures)
    yield from _listed("warnings", tally.warnings)
    if tally.repeated_keys:
        yield f"repeated keys: {tally.repeated_keys:,} samples have a key that came before in their shard"


def _listed(title: str, counts: Mapping[str, int]) -> Iterator[str]:
    if counts:
        yield f"{title}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def _percent(share: float) -> str:
    return f"{share:.0%}"
