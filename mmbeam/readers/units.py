"""From shards to units of work: what one attempt reads, how it is named, and how a plan and a footer write it down.

Not here: which shards there are (shards.py), where a plan is kept (runs/plan.py).
"""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmbeam.config import MIB
from mmbeam.errors import UsageError
from mmbeam.readers.tarheaders import BLOCK
from mmbeam.types import Input, InputRead, Seam, Shard, WorkUnit

UNIT_BYTES = 256 * MIB  # of a shard, as stored: minutes of work for a model that embeds,
GENERATE_BYTES = 32 * MIB  # and for one that generates
LEAST_UNITS = 1_000  # so many shards, or fewer, are not packed: one that is bad is better alone
MOST_UNITS = 100_000  # more are not made by cutting: each has its Parquet
PACKED = 100  # shards in one unit at most: a footer names them all


def unit_id(*inputs: Input) -> str:
    """A name for the unit that reads `inputs`: readable, safe as a file name, fixed by what it reads."""
    spans = "".join(f"{each.shard.path}\0{each.begin}\0{each.end}\n" for each in inputs)
    name = inputs[0].shard.path.rpartition("/")[2]
    stem = re.sub(r"(\.tar)?(\.gz|\.zst|\.tgz|\.tar|\.parquet)$", "", name, flags=re.IGNORECASE)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:60].strip("._-") or "shard"
    return f"{safe}-{hashlib.sha256(spans.encode()).hexdigest()[:10]}"


def plan_units(shards: Iterable[Shard], known: Sequence[WorkUnit], unit_bytes: int | None = None) -> list[WorkUnit]:
    """New units for the shards that no known unit names, in their order. Known units never change.

    Without `unit_bytes` one for each. With it, each is about that much to read: a larger shard that is an
    uncompressed tar by its name is cut into parts, and of more than LEAST_UNITS shards small ones that
    are neighbours are packed together, while LEAST_UNITS remain. So large a corpus that MOST_UNITS would
    not hold it gets larger units. A shard of unknown size is one unit. Whether a part was read from its
    true place only a run can say, once it has all of them: without a run, cut nothing.
    """
    named = {each.shard.path for unit in known for each in unit.inputs}
    new = [shard for shard in shards if shard.path not in named]
    groups = ((Input(shard=shard),) for shard in new) if unit_bytes is None else _groups(new, unit_bytes)
    made = [WorkUnit(id=unit_id(*inputs), inputs=inputs) for inputs in groups]
    units = {unit.id: unit for unit in made}
    if len(units) != len(made) or not units.keys().isdisjoint(unit.id for unit in known):
        raise UsageError("two shards got the same unit name; rename one of those added last")
    return made


def _groups(shards: Sequence[Shard], unit_bytes: int) -> Iterator[tuple[Input, ...]]:
    """The inputs of each unit."""
    total = sum(shard.size or 0 for shard in shards)
    part_bytes = max(unit_bytes, total // MOST_UNITS)
    pack_bytes = 0 if len(shards) <= LEAST_UNITS else min(unit_bytes, total // LEAST_UNITS)
    pack: list[Input] = []
    held = 0
    for shard in shards:
        size = shard.size or sys.maxsize
        if pack and (held + size > pack_bytes or len(pack) == PACKED):
            yield tuple(pack)
            pack, held = [], 0
        if size <= pack_bytes:
            pack.append(Input(shard=shard))
            held += size
        else:
            yield from ((part,) for part in cut(shard, part_bytes))
    if pack:
        yield tuple(pack)


def cut(shard: Shard, part_bytes: int) -> list[Input]:
    """Parts of the shard of about `part_bytes` each; the whole if it is not larger, or is not known to be cuttable."""
    plain = shard.path.lower().endswith(".tar") and shard.cuttable
    count = round(shard.size / part_bytes) if plain and shard.size else 1
    cuts = {(shard.size or 0) * number // count // BLOCK * BLOCK for number in range(1, count)} - {0}
    begins = [0, *sorted(cuts)]
    return [Input(shard=shard, begin=begin, end=end) for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def limited_unit(shards: Sequence[Shard], limit: int) -> WorkUnit:
    """One unit that ends after the first `limit` samples of `shards`, in their order.

    It names no more than `limit` shards, since each can be expected to hold a sample.
    """
    inputs = tuple(Input(shard=shard) for shard in shards[:limit])
    return WorkUnit(id=f"first-{limit}-{unit_id(*inputs)}", inputs=inputs, limit=limit)


def input_to_json(each: Input) -> dict[str, Any]:
    """An input as plans and footers name it: nothing secret in it."""
    shard = each.shard
    facts = {"path": shard.path, "size": shard.size, "etag": shard.etag, "begin": each.begin, "end": each.end}
    return facts if each.seam is None else {**facts, "seam": list(each.seam)}


def found_to_json(unit: WorkUnit, found: Sequence[InputRead]) -> tuple[dict[str, Any], ...]:
    """The unit's inputs as a footer names them, each with what reading it has shown: "from", "to", "error"."""
    known = found or [InputRead()] * len(unit.inputs)
    return tuple({**input_to_json(each), **_shown(facts)} for each, facts in zip(unit.inputs, known, strict=True))


def found_from_json(data: Mapping[str, Any]) -> InputRead:
    """What a footer says that reading an input has shown."""
    return InputRead(begin=_seam(data.get("from")), end=_seam(data.get("to")), error=data.get("error"))


def _shown(found: InputRead) -> dict[str, Any]:
    shown = {
        "from": None if found.begin is None else list(found.begin),
        "to": None if found.end is None else list(found.end),
        "error": found.error,
    }
    return {name: value for name, value in shown.items() if value is not None}


def unit_to_json(unit: WorkUnit) -> dict[str, Any]:
    """A unit as a line of the plan; what is to be done again (`replace`) is not the plan's."""
    return {"id": unit.id, "inputs": [input_to_json(each) for each in unit.inputs], "limit": unit.limit}


def unit_from_json(data: Mapping[str, Any], urls: Mapping[str, str] | None = None) -> WorkUnit:
    """The unit of a line of the plan; `urls` says, by path, what to open where that is not the path itself."""
    inputs = (_input_from_json(each, urls or {}) for each in data["inputs"])
    return WorkUnit(id=data["id"], inputs=tuple(inputs), limit=data.get("limit"))


def _input_from_json(data: Mapping[str, Any], urls: Mapping[str, str]) -> Input:
    path = data["path"]
    shard = Shard(path=path, url=urls.get(path, path), size=data["size"], etag=data["etag"])
    return Input(shard=shard, begin=data["begin"], end=data["end"], seam=_seam(data.get("seam")))


def _seam(data: Sequence[int | None] | None) -> Seam | None:
    return None if data is None else Seam(*data)
