"""The plan: which units a run has. Planned units never change; later launches add units for new shards."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmbeam.errors import RunMismatchError
from mmbeam.io.runs.commits import committed, load_reports
from mmbeam.io.runs.run import PLAN, Run
from mmbeam.io.shards import limited_unit, plan_units, unit_from_json, unit_to_json
from mmbeam.types import Input, Shard, WorkUnit

logger = logging.getLogger(__name__)

Planner = Callable[[Sequence[Shard], Sequence[WorkUnit]], list[WorkUnit]]


def load_plan(run: Run) -> list[dict[str, Any]]:
    """The planned units as they were written, in the order in which they were planned."""
    names = sorted(run.store.list(PLAN))
    return [json.loads(line) for name in names for line in run.store.read(f"{PLAN}/{name}").splitlines()]


def extend_plan(run: Run, shards: Sequence[Shard], planner: Planner | None = None) -> list[WorkUnit]:
    """The units to run over `shards`: the planned ones, and new ones for shards that no unit names.

    `planner(shards, known units)` gives the new units; they are written down before they are returned.
    Without one it is `plan_units`, or for a run with a limit one unit over the shards there are at first.
    A planned unit keeps its id and its ranges. It comes with the URLs, sizes and etags that its shards
    have now; if they are not those that its committed rows were made from, that is an error. A planned
    unit one of whose shards is not among `shards` is left out, and a log line says so.

    Raises RunMismatchError naming the committed shards that have changed.
    """
    now = {shard.path: shard for shard in shards}
    planner = planner or _planner(run)
    while True:
        number = len(run.store.list(PLAN))
        known = _known(run, now)
        new = planner(shards, known)
        if not new:
            return _present(known, now)
        lines = "".join(json.dumps(unit_to_json(unit)) + "\n" for unit in new)
        try:
            run.store.create(f"{PLAN}/{number:06d}.jsonl", lines.encode())
        except FileExistsError:  # another launch was first: its units are known now
            continue
        return [*_present(known, now), *new]


def _planner(run: Run) -> Planner:
    limit = run.configuration.get("limit")
    return plan_units if limit is None else lambda shards, known: [] if known else [limited_unit(shards, limit)]


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
            f"{run.store} holds rows of inputs that have changed since:\n  " + "\n  ".join(changed) + "\n"
            "Put the old files back, choose another --output, or give --overwrite to start over"
        )


def _changes(read: Sequence[Mapping[str, Any]], inputs: Sequence[Input]) -> Iterator[str]:
    for then, source in zip(read, inputs, strict=True):
        for fact in ("size", "etag"):
            old, new = then[fact], getattr(source.shard, fact)
            if old is not None and new is not None and old != new:
                yield f"{source.shard.path}: {fact} {old} -> {new}"


def _present(units: Sequence[WorkUnit], now: Mapping[str, Shard]) -> list[WorkUnit]:
    present = [unit for unit in units if all(source.shard.path in now for source in unit.inputs)]
    if len(present) < len(units):
        logger.warning(
            "%d planned units are not run: their shards are not among the inputs given now", len(units) - len(present)
        )
    return present
