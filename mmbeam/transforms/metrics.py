"""What a runner shows of a job: counters, a distribution and lineage, in Beam's metrics under the namespace "mmbeam".

Outside a runner (`--workers`) these calls do nothing.
"""

from apache_beam.metrics import Metrics
from apache_beam.metrics.metric import Lineage

from mmbeam.types import Tally, UnitReport

NAMESPACE = "mmbeam"
_COUNTS = ("samples", "rows", "failed", "impaired", "repeated_keys", "bytes_read")
_GROUPS = ("outputs", "failures", "skipped")


def count_tally(tally: Tally) -> None:
    """Add a window's tally: `rows`, `failures: decode: DecodeError`, `compute_ms`, ... (see types.Tally)."""
    for name in _COUNTS:
        Metrics.counter(NAMESPACE, name).inc(getattr(tally, name))
    for group in _GROUPS:
        for name, count in getattr(tally, group).items():
            Metrics.counter(NAMESPACE, f"{group}: {name}").inc(count)
    for step, seconds in tally.seconds.items():
        Metrics.counter(NAMESPACE, f"{step}_ms").inc(round(1000 * seconds))


def count_unit(report: UnitReport) -> None:
    """Count a unit as `units_written`, `units_kept` or `units_failed`, and add the time of a written one."""
    Metrics.counter(NAMESPACE, f"units_{report.status}").inc()
    if report.status == "written":
        Metrics.distribution(NAMESPACE, "unit_ms").update(round(1000 * report.wall_seconds))


def report_source(path: str) -> None:
    """Add a shard to the lineage of the pipeline. `path` holds no secret."""
    _add(Lineage.sources(), path)


def report_sink(path: str) -> None:
    """Add an output to the lineage of the pipeline. `path` holds no secret."""
    _add(Lineage.sinks(), path)


def _add(lineage: Lineage, path: str) -> None:
    """Add a path as Beam's own file systems do: `gcs:bucket.path`, `s3:bucket.path`, `filesystem:localhost.path`."""
    scheme, separator, rest = path.partition("://")
    if not separator or scheme in ("file", "local"):
        lineage.add("filesystem", "localhost", rest or path, last_segment_sep="/")
        return
    system = {"gs": "gcs", "s3a": "s3"}.get(scheme, scheme)
    lineage.add(system, *(segment for segment in rest.split("/", 1) if segment), last_segment_sep="/")
