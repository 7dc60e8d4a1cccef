"""At launch: the units to run over the shards that there are now."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmbeam.errors import RunMismatchError
from mmbeam.readers.units import UNIT_BYTES, limited_unit, plan_units, unit_from_json
from mmbeam.runs.commits import committed, load_reports
from mmbeam.runs.plan import count_plans, load_plan, try_add
from mmbeam.runs.repair import mend
from mmbeam.runs.run import Run
from mmbeam.types import Input, Shard, WorkUnit

logger = logging.getLogger(__name__)


def extend_plan(run: Run, shards: Sequence[Shard], unit_bytes: int | None = UNIT_BYTES) -> list[WorkUnit]:
    """The units to run over `shards`: the planned ones, and new ones for shards that no unit names.

    The new ones are those of `plan_units`, or for a run with a limit one unit over the shards there are at
    first; they are written down before they are returned. A planned unit keeps its id and its cuts. It comes
    with the URLs, sizes and etags that its shards have now; if they are not those that its committed rows
    were made from, that is an error. A planned unit none of whose shards is among `shards` is left out, one
    with a limit if any is not, and a log line says so.

    Raises RunMismatchError naming the committed shards that have changed.
    """
    now = {shard.path: shard for shard in shards}
    while True:
        number = count_plans(run)
        known = _known(run, now)
        new = _new(run, shards, known, unit_bytes)
        if not new or try_add(run, number, new):  # else another launch was first: its units are known now
            return [*mend(run, _present(known, now)), *new]


def _new(run: Run, shards: Sequence[Shard], known: Sequence[WorkUnit], unit_bytes: int | None) -> list[WorkUnit]:
    limit = run.configuration.get("limit")
    if limit is None:
        return plan_units(shards, known, unit_bytes)
    return [] if known else [limited_unit(shards, limit)]


def _known(run: Run, now: Mapping[str, Shard]) -> list[WorkUnit]:
    """The planned units, with what their shards are now."""
    urls = {path: shard.url for path, shard in now.items()}
    planned = [unit_from_json(unit, urls) for unit in load_plan(run)]
    units = [replace(unit, inputs=tuple(_renewed(source, now) for source in unit.inputs)) for unit in planned]
    _check_unchanged(run, [unit for before, unit in zip(planned, units, strict=True) if _differs(before, unit)])
    return units


def _renewed(source: Input, now: Mapping[str, Shard]) -> Input:
    shard = now.get(source.shard.path)
    return source if shard is None else replace(source, shard=shard)


def _differs(before: WorkUnit, after: WorkUnit) -> bool:
    return any(
        (old.shard.size, old.shard.etag) != (new.shard.size, new.shard.etag)
        for old, new in zip(before.inputs, after.inputs, strict=True)
    )


def _check_unchanged(run: Run, units: Sequence[WorkUnit]) -> None:
    """Raise if a committed one among `units` was made from other bytes than its shards hold now."""
    if not units:
        return
    done = committed(run)
    units = [unit for unit in units if unit.id in done]
    reports = load_reports(run, [unit.id for unit in units])
    changed = [
        change for unit, report in zip(units, reports, strict=True) for change in _changes(report.inputs, unit.inputs)
    ]
    if changed:
        raise RunMismatchError(
            f"{run.store} holds rows of inputs that have changed since:\n  "
            + "\n  ".join(dict.fromkeys(changed))
            + "\n"
            "Put the old files back, choose another --output, or give --overwrite to start over"
        )


def _changes(read: Sequence[Mapping[str, Any]], inputs: Sequence[Input]) -> Iterator[str]:
    now = {source.shard.path: source for source in inputs}
    for then in read:
        source = now.get(then["path"])
        if source is None:  # it was bad, and is a unit of its own since
            continue
        for fact in ("size", "etag"):
            old, new = then[fact], getattr(source.shard, fact)
            if old is not None and new is not None and old != new:
                yield f"{source.shard.path}: {fact} {old} -> {new}"


def _present(units: Sequence[WorkUnit], now: Mapping[str, Shard]) -> list[WorkUnit]:
    present = [unit for unit in units if _is_present(unit, now)]
    if len(present) < len(units):
        logger.warning(
            "%d planned units are not run: their shards are not among the inputs given now", len(units) - len(present)
        )
    return present


def _is_present(unit: WorkUnit, now: Mapping[str, Shard]) -> bool:
    given = [source.shard.path in now for source in unit.inputs]
    return any(given) if unit.limit is None else all(given)
