"""Work units: how shards are cut and packed into units, and how plans and footers describe units as JSON."""

import hashlib
import re
import sys
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmbeam.config import MIB
from mmbeam.errors import UsageError
from mmbeam.readers.paths import is_table, is_zip, split_name
from mmbeam.readers.tar import BLOCK
from mmbeam.types import FolderSample, Input, InputRead, Shard, SourceFile, WorkUnit, utf8_name

UNIT_BYTES = 256 * MIB  # of a shard, as stored: minutes of work for an encoder
GENERATE_UNIT_BYTES = 32 * MIB  # the same for a generator
UNPACKED_SHARDS = 1_000  # with at most this many shards, none are packed, so that an unreadable shard fails alone
MAX_UNITS = 100_000  # neither cutting nor packing aims at more units, since each writes a Parquet file
SPARE_SHARDS = 100  # extra shards in a unit with a limit, in case some cannot be read
MAX_UNIT_SAMPLES = 4_096  # maximum of a folder or table in one unit
MAX_SHARDS_PER_UNIT = 100  # most shards in one unit: its footer lists them all


def unit_id(*inputs: Input) -> str:
    """Return the id of the unit that reads `inputs`: readable, safe as a file name, a function of its inputs."""
    spans = "".join(f"{source.shard.path}\0{source.begin}\0{source.end}\n" for source in inputs)
    name = inputs[0].shard.path.rpartition("/")[2]
    stem = re.sub(r"(\.tar)?(\.gz|\.zst|\.tgz|\.tar|\.zip|\.parquet)$", "", name, flags=re.IGNORECASE)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:60].strip("._-") or "shard"
    return f"{safe}-{hashlib.sha256(spans.encode()).hexdigest()[:10]}"


def plan_units(shards: Iterable[Shard], known: Sequence[WorkUnit], unit_bytes: int | None = None) -> list[WorkUnit]:
    """Return new units for the shards that no known unit contains, in their order. Known units never change.

    Without `unit_bytes`, each shard is one unit. With it, each unit reads about that number of bytes: an uncompressed
    tar or a zip archive (by its name) that is larger is cut into parts. A folder is always cut, into units of about
    UNIT_BYTES or MAX_UNIT_SAMPLES; of a folder that was planned before, only the new samples make new units. If there
    are more than UNPACKED_SHARDS shards, small adjacent ones are packed, as long as about UNPACKED_SHARDS units remain.
    Parts and packs are larger where there would otherwise be more than MAX_UNITS; a shard of more than `unit_bytes` is
    not packed. A shard of unknown size is one unit. Pass
    `unit_bytes` only with a run: only a run detects a part that was read from the wrong byte.
    """
    listed = list(shards)
    folders = [shard for shard in listed if shard.samples]
    inputs_of: dict[str, list[Input]] = {shard.path: [] for shard in folders}
    planned = set()
    for unit in known:
        for source in unit.inputs:
            planned.add(source.shard.path)
            if source.shard.path in inputs_of:
                inputs_of[source.shard.path].append(source)
    new = (shard for shard in listed if not shard.samples and shard.path not in planned)
    groups = ((Input(shard=shard),) for shard in new) if unit_bytes is None else _groups(list(new), unit_bytes)
    made = [WorkUnit(id=unit_id(*inputs), inputs=inputs) for inputs in groups]
    for folder in folders:
        for part in split_folder(folder, inputs_of[folder.path], unit_bytes or UNIT_BYTES):
            made.append(WorkUnit(id=unit_id(part), inputs=(part,)))
    units = {unit.id: unit for unit in known}
    for unit in made:
        if unit.id in units:
            first, second = (entry.inputs[0].shard.path for entry in (units[unit.id], unit))
            raise UsageError(
                f"two work units have the id {unit.id} (shards {first} and {second}); rename one of the two"
            )
        units[unit.id] = unit
    return made


def _groups(shards: Sequence[Shard], unit_bytes: int) -> Iterator[tuple[Input, ...]]:
    """Yield the inputs of each unit."""
    total = sum(shard.size or 0 for shard in shards)
    part_bytes = max(unit_bytes, total // MAX_UNITS)
    pack_bytes = 0 if len(shards) <= UNPACKED_SHARDS else min(part_bytes, total // UNPACKED_SHARDS)
    pack: list[Input] = []
    held = 0
    for shard in shards:
        size = shard.size or sys.maxsize
        if pack and (held + size > pack_bytes or len(pack) == MAX_SHARDS_PER_UNIT):
            yield tuple(pack)
            pack, held = [], 0
        if size <= min(pack_bytes, unit_bytes):
            pack.append(Input(shard=shard))
            held += size
        else:
            yield from ((part,) for part in cut(shard, part_bytes))
    if pack:
        yield tuple(pack)


def cut(shard: Shard, part_bytes: int) -> list[Input]:
    """Return parts of about `part_bytes` each, or the whole shard if it is small or cannot be cut."""
    if is_table(shard.path):
        return cut_table(shard, part_bytes)
    is_plain = (shard.path.lower().endswith(".tar") or is_zip(shard.path)) and shard.cuttable
    count = round(shard.size / part_bytes) if is_plain and shard.size else 1
    cuts = {(shard.size or 0) * number // count // BLOCK * BLOCK for number in range(1, count)} - {0}
    begins = [0, *sorted(cuts)]
    return [Input(shard=shard, begin=begin, end=end) for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def cut_table(table: Shard, part_bytes: int) -> list[Input]:
    """Return parts of at most MAX_UNIT_SAMPLES rows, and of about `part_bytes`, or the whole of a small table."""
    rows = table.rows or 0
    per_part = min(MAX_UNIT_SAMPLES, max(1, rows * part_bytes // max(1, table.size or 1)))
    if rows <= per_part:
        return [Input(shard=table)]
    begins = range(0, rows, per_part)
    return [Input(shard=table, begin=begin, end=min(rows, begin + per_part)) for begin in begins]


def split_folder(folder: Shard, planned: Sequence[Input], part_bytes: int) -> list[Input]:
    """Return parts of about `part_bytes` each with the samples of a folder that no `planned` part holds."""
    known = {sample.key for source in planned for sample in source.shard.samples}
    new = [sample for sample in folder.samples if sample.key not in known]
    begin = max((source.end or 0 for source in planned), default=0)
    parts: list[Input] = []
    chunk: list[FolderSample] = []
    held = 0
    for sample in new:
        size = sum(file.size or 0 for file in sample.files)
        if chunk and (held + size > part_bytes or len(chunk) == MAX_UNIT_SAMPLES):
            parts.append(Input(shard=folder.with_samples(chunk), begin=begin, end=begin + len(chunk)))
            begin, chunk, held = begin + len(chunk), [], 0
        chunk.append(sample)
        held += size
    if chunk:
        parts.append(Input(shard=folder.with_samples(chunk), begin=begin, end=begin + len(chunk)))
    return parts


def renewed(source: Input, now: Shard) -> Input:
    """Return a planned input whose shard is updated to the listing `now`. For a folder, keep the planned samples.

    A sample whose files no longer exist stays as planned, so that reading it fails.
    """
    if not source.shard.samples:
        return Input(shard=now, begin=source.begin, end=source.end)
    listed: dict[str, deque[FolderSample]] = defaultdict(deque)
    for sample in now.samples:
        listed[sample.key].append(sample)
    samples = [listed[sample.key].popleft() if listed[sample.key] else sample for sample in source.shard.samples]
    return Input(shard=now.with_samples(samples), begin=source.begin, end=source.end)


def limited_unit(shards: Sequence[Shard], limit: int) -> WorkUnit:
    """Return one unit that ends after the first `limit` samples of `shards`, in their order.

    It contains `limit` shards, since each is expected to hold a sample, and some to replace those that cannot be read.
    """
    inputs = tuple(
        Input(shard=shard.with_samples(shard.samples[:limit]), end=min(limit, len(shard.samples)))
        if shard.samples
        else Input(shard=shard)
        for shard in shards[: limit + SPARE_SHARDS]
    )
    return WorkUnit(id=f"first-{limit}-{unit_id(*inputs)}", inputs=inputs, limit=limit)


def input_to_json(source: Input) -> dict[str, Any]:
    """Return an input as plans and footers describe it. It contains no secret."""
    shard = source.shard
    return {"path": shard.path, "size": shard.size, "etag": shard.etag, "begin": source.begin, "end": source.end}


def inputs_to_json(unit: WorkUnit, inputs_read: Sequence[InputRead]) -> tuple[dict[str, Any], ...]:
    """Return the unit's inputs as a footer describes them: "from", "to", "error" and "broken" hold each InputRead.

    Inputs that a unit with a limit has not reached are omitted.
    """
    described = []
    for source, read in zip(unit.inputs, inputs_read or [InputRead()] * len(unit.inputs), strict=unit.limit is None):
        facts = {"from": read.first_sample, "to": read.next_sample, "error": read.error, "broken": read.broken}
        described.append({**input_to_json(source), **{key: value for key, value in facts.items() if value is not None}})
    return tuple(described)


def input_read_from_json(data: Mapping[str, Any]) -> InputRead:
    """Return the InputRead in a footer's description of an input; mmbeam 0.1 wrote "from" and "to" as lists."""
    first, after = (byte[0] if isinstance(byte, list) else byte for byte in (data.get("from"), data.get("to")))
    return InputRead(
        first_sample=first if data["begin"] else 0,
        next_sample=after,
        error=data.get("error"),
        broken=data.get("broken"),
    )


def unit_to_json(unit: WorkUnit) -> dict[str, Any]:
    """Return a unit as a line of the plan. `replace` belongs to a launch, not to the plan."""
    inputs = []
    for source in unit.inputs:
        shard = source.shard
        listed = {"samples": [sample.files for sample in shard.samples], "tables": shard.tables}
        inputs.append({**input_to_json(source), **{name: files for name, files in listed.items() if files}})
    return {"id": unit.id, "inputs": inputs, "limit": unit.limit}


def unit_from_json(
    data: Mapping[str, Any], urls: Mapping[str, str] | None = None, bound: Collection[str] = ()
) -> WorkUnit:
    """Return the unit of a line of the plan.

    `urls` maps a path to the URL to open, where that differs; `bound` are the paths that may not be redirected.
    """
    inputs = []
    for source in data["inputs"]:
        path = source["path"]
        shard = Shard(
            path=path,
            url=(urls or {}).get(path, path),
            size=source["size"],
            etag=source["etag"],
            may_redirect=path not in bound,
            samples=tuple(_folder_sample(files) for files in source.get("samples", ())),
            tables=tuple(SourceFile(*file) for file in source.get("tables", ())),
        )
        inputs.append(Input(shard=shard, begin=source["begin"], end=source["end"]))
    return WorkUnit(id=data["id"], inputs=tuple(inputs), limit=data.get("limit"))


def _folder_sample(files: Sequence[Sequence[Any]]) -> FolderSample:
    first = SourceFile(*files[0])
    names = split_name(utf8_name(first.name))
    return FolderSample(names[0] if names else first.name, tuple(SourceFile(*file) for file in files))
