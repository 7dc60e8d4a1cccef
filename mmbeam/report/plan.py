"""What a job would do and take, for `--dry-run` and `mmbeam plan`. Read-only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmbeam.report.progress import clock
from mmbeam.runs.commits import committed
from mmbeam.runs.run import Run, read_manifest
from mmbeam.types import Shard, WorkUnit


def units_left(run: Run, units: Sequence[WorkUnit], overwrite: bool = False) -> list[WorkUnit]:
    """Return the units that a launch would do; with `overwrite` nothing counts as committed."""
    done = set() if overwrite or read_manifest(run.store) is None else committed(run)
    return [unit for unit in units if unit.id not in done or unit.replace]


def plan_text(run: Run, units: Sequence[WorkUnit], overwrite: bool = False) -> Iterator[str]:
    """Yield lines that state the inputs, the units committed and to do, the models and the columns of a planned run.

    See `units_left` for `overwrite`.
    """
    left = units_left(run, units, overwrite)
    shards = {source.shard.path: source.shard for unit in units for source in unit.inputs}
    yield f"dry run: nothing was written to {run.store}"
    yield f"input: {len(shards):,} {'file' if len(shards) == 1 else 'files'}, {_bytes_of(units)}"
    redone = sum(unit.replace for unit in units)
    yield (
        f"units: {len(units):,} planned, {len(units) - len(left):,} committed, {len(left):,} to do ({_bytes_of(left)})"
        + (f"; {redone:,} of them are redone because they hold failures" if redone else "")
    )
    for name, model in run.recorded.get("models", {}).items():
        family = run.configuration.get("models", {}).get(name, {}).get("family")
        yield f"model: {name} = {model} ({family}), {run.configuration.get('dtype')} on {run.recorded.get('device')}"
    yield f"columns: {', '.join(run.schema.names)}"
    yield f"fingerprint: {run.fingerprint}"


def stored_bytes(units: Sequence[WorkUnit]) -> int:
    """Return the bytes of the units' inputs as stored, as far as the store reports them."""
    return sum(_stored(source.shard, source.begin, source.end) or 0 for unit in units for source in unit.inputs)


def _bytes_of(units: Sequence[WorkUnit]) -> str:
    sizes = [_stored(source.shard, source.begin, source.end) for unit in units for source in unit.inputs]
    unknown = sizes.count(None)
    return size_text(stored_bytes(units)) + (f" and {unknown:,} of unknown size" if unknown else "")


def _stored(shard: Shard, begin: int, end: int | None) -> int | None:
    """Return the stored bytes of an input; of a folder those of its files, else those between its cuts."""
    if shard.samples or shard.size is None:
        return shard.size
    return (shard.size if end is None else end) - begin


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a job took for its first samples, in one process."""

    samples: int  # read
    rows: int  # of them that --where keeps, and that have an output
    stored_bytes: int  # of these samples
    read_seconds: float  # reading and decoding them, with all cores
    model_seconds: float  # in the models, loading excluded
    load_seconds: float
    row_bytes: int  # of their rows, uncompressed
    peak_bytes: int  # of the process
    failures: int  # samples that lost an output


def estimate_text(
    units: Sequence[WorkUnit], calibration: Calibration, devices: int, price_per_hour: float | None
) -> Iterator[str]:
    """Yield lines that estimate samples, time, memory, output and cost of `units` from a calibration.

    Reading overlaps with the model, so the slower of the two decides. `devices` is the number of devices, or of worker
    processes.
    """
    count = calibration.samples
    if not count:
        yield "estimate: none, since the first unit holds no sample"
        return
    samples = stored_bytes(units) * count / max(1, calibration.stored_bytes)
    read, model = calibration.read_seconds / count, calibration.model_seconds / count / devices
    seconds = samples * max(read, model) + calibration.load_seconds
    yield f"measured on {count:,} samples: {1 / read:,.0f} samples/s read" + (
        f", {1 / model:,.0f} samples/s in the model" if model else ""
    )
    yield f"samples: about {samples:,.0f}, of which {calibration.rows / count:.0%} become rows"
    slower = "reading and decoding" if read > model else "the model"
    yield f"time: about {clock(seconds)}, limited by {slower}, on {devices} device{'s' * (devices > 1)}"
    yield f"memory: {size_text(calibration.peak_bytes)} for the model and a window of these samples"
    yield f"output: about {size_text(samples * calibration.row_bytes / count)}"
    if price_per_hour is not None:
        yield f"cost: about {seconds / 3600 * price_per_hour:,.2f}, at {price_per_hour:g} per hour"
    if calibration.failures:
        yield f"warning: {calibration.failures:,} of these samples lost an output; run with --limit {count} to see why"


def size_text(nbytes: float) -> str:
    """Return a number of bytes in decimal units: 999 B, 1.5 MB, 2.0 TB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while nbytes >= 1000 and len(units) > 1:
        nbytes, units = nbytes / 1000, units[1:]
    return f"{nbytes:,.0f} B" if units[0] == "B" else f"{nbytes:,.1f} {units[0]}"
