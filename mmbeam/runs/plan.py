"""The files of the plan: which units a run has. A planned unit keeps its name, its shards and its cuts.

Later launches add units for new shards, and lines for known units that are to be read in another way: from
where a part was found to begin, without a shard that has become a unit of its own (amend.py).
"""

import json
from collections.abc import Sequence
from typing import Any

from mmbeam.readers.units import unit_to_json
from mmbeam.runs.run import PLAN, Run
from mmbeam.types import WorkUnit


def load_plan(run: Run) -> list[dict[str, Any]]:
    """The planned units as they were last written, in the order in which they were first planned."""
    names = sorted(run.store.list(PLAN))
    units = (json.loads(line) for name in names for line in run.store.read(f"{PLAN}/{name}").splitlines())
    return list({unit["id"]: unit for unit in units}.values())


def add_to_plan(run: Run, units: Sequence[WorkUnit]) -> None:
    """Write units down, all or none; behind whatever other launches write."""
    while units and not try_add(run, count_plans(run), units):
        continue


def count_plans(run: Run) -> int:
    """How many files the plan has."""
    return len(run.store.list(PLAN))


def try_add(run: Run, number: int, units: Sequence[WorkUnit]) -> bool:
    """Write units down as the file of this number; False if another launch was first."""
    lines = "".join(json.dumps(unit_to_json(unit)) + "\n" for unit in units)
    try:
        run.store.create(f"{PLAN}/{number:06d}.jsonl", lines.encode())
    except FileExistsError:
        return False
    return True
