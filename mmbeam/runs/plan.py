"""The plan of a run: its work units, extended at launch by new shards and corrected after the run.

Each launch that adds or corrects units writes one file of the plan, a unit per line. For each unit, the last line is
valid. A line without inputs withdraws its unit: the unit does not run again, and its rows and failures are removed.
"""

import json
import logging
import re
import shlex
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from mmbeam.errors import RunMismatchError
from mmbeam.readers.stream import content_digest
from mmbeam.readers.tar import parts_are_contiguous
from mmbeam.readers.units import (
    UNIT_BYTES,
    input_read_from_json,
    limited_unit,
    plan_units,
    renewed,
    unit_from_json,
    unit_id,
    unit_to_json,
)
from mmbeam.runs.commits import Part, Totals, committed, load_reports, report_failed_unit
from mmbeam.runs.run import (
    MEDIA,
    PLAN,
    Run,
    clear_run,
    commit_name,
    failures_unit,
    list_failures,
    media_unit,
    part_name,
    read_manifest,
    remove_failures,
)
from mmbeam.types import Input, Shard, WorkUnit, files_of, utf8_name

logger = logging.getLogger(__name__)

PAIRS_SHOWN = 5  # of moved shards, in an error
MAX_REPLACED_SAMPLES = 10_000  # the largest `limit` whose rows a larger run replaces without `overwrite`

_PLAN_FILE = re.compile(r"\d{6,}\.jsonl")
FILES_SHOWN = 5  # of a folder, in an error


def load_plan(run: Run) -> list[dict[str, Any]]:
    """Return the planned units, in the order in which they were first planned."""
    return [line for line in map(json.loads, _lines(run, _files(run))) if line["inputs"]]


def _lines(run: Run, names: Sequence[str]) -> Iterator[bytes]:
    """Yield the last line of each unit in these files of the plan, withdrawn units included.

    It holds the content of one file, and the lines of all files but the first.
    """
    later = {json.loads(line)["id"]: line for name in names[1:] for line in _content(run, name)}
    for line in _content(run, names[0]) if names else ():
        yield later.pop(json.loads(line)["id"], line) if later else line
    yield from later.values()


def _content(run: Run, name: str) -> Iterator[bytes]:
    return (line.rstrip() for line in BytesIO(run.store.read(f"{PLAN}/{name}")))


def _files(run: Run, known_files: int = 0) -> list[str]:
    """Return the files of the plan, in their order; a file of another name is ignored, with a warning.

    The first `known_files` exist, also if the listing of the store lacks them.
    """
    names = sorted({*run.store.list(PLAN), *map(_file_name, range(known_files))})
    foreign = [name for name in names if not _PLAN_FILE.fullmatch(name)]
    if foreign:
        logger.warning("%s/%s: %s is not a file of the plan; it is ignored", run.store, PLAN, ", ".join(foreign))
    return [name for name in names if name not in foreign]


def _try_add(run: Run, number: int, units: Sequence[WorkUnit]) -> bool:
    """Write units as the plan file of this number; False if another launch has written that file."""
    path = run.store.scratch_file(".jsonl")  # a million lines would take a gigabyte
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(unit_to_json(unit)) + "\n" for unit in units)
        run.store.create(f"{PLAN}/{_file_name(number)}", path)
    except FileExistsError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def _file_name(number: int) -> str:
    return f"{number:06d}.jsonl"


# At launch


def extend_plan(
    run: Run, shards: Sequence[Shard], unit_bytes: int | None = UNIT_BYTES, redo_changed: bool = False
) -> list[WorkUnit]:
    """Return the units to run over `shards`: the planned ones, and new ones for shards that no unit contains.

    New units are those of `plan_units`, or one unit over all shards if the run has a limit. They are in the plan before
    they are returned. A planned unit keeps its id and its cuts, with the URLs, sizes and etags of its shards as listed
    now. A planned unit is skipped with a warning if none of its shards is in `shards`; in a run with a limit, if any of
    them is not. Rows and failures of withdrawn units are removed.

    Committed units whose shards have changed are marked to be done again with `redo_changed`. Raises RunMismatchError
    with these shards otherwise, or with those that have moved.
    """
    now = {shard.path: shard for shard in shards}
    limit = run.configuration.get("limit")
    known_files = 0
    while True:
        number = len(_files(run, known_files))
        withdrawn: set[str] = set()
        known = _renewed(run, _planned(run, _files(run, known_files), withdrawn), now, redo_changed)
        _remove_units(run, withdrawn)
        _check_not_moved(run, known, shards)
        new = plan_units(shards, known, unit_bytes) if limit is None else []
        if limit is not None and not known:
            new = [limited_unit(shards, limit)]
        if not new or _try_add(run, number, new):
            break
        known_files = number + 1  # another launch was first, or the listing is old
    present = []
    for unit in known:
        listed = [source.shard.path in now for source in unit.inputs]
        if any(listed) if unit.limit is None else all(listed):
            present.append(unit)
    if len(present) < len(known):
        logger.warning(
            "%d planned units are not run: their shards are not among the inputs of this launch",
            len(known) - len(present),
        )
    return [*present, *new]


def _planned(run: Run, names: Sequence[str], withdrawn: set[str]) -> Iterator[WorkUnit]:
    """Yield the units in these files of the plan, and add those that are withdrawn to `withdrawn`."""
    for line in map(json.loads, _lines(run, names)):
        if line["inputs"]:
            yield unit_from_json(line)
        else:
            withdrawn.add(line["id"])


def replace_limited_run(run: Run, shards: Sequence[Shard]) -> None:
    """Remove a run that read the first samples of `shards`, if `run` differs from it only in reading more of them.

    Nothing else of the configuration may differ, and every shard of the smaller run must be among `shards`. A run of
    more than MAX_REPLACED_SAMPLES samples is kept, because recomputing its rows takes long; `open_run` then raises.
    """
    manifest = read_manifest(run.store)
    limit = None if manifest is None else manifest["configuration"].get("limit")
    if manifest is None or limit is None or limit > MAX_REPLACED_SAMPLES:
        return
    larger = run.configuration.get("limit")
    if {**manifest["configuration"], "limit": larger} != json.loads(json.dumps(run.configuration)):
        return
    planned = {source["path"] for line in load_plan(run) for source in line["inputs"]}
    if (larger is None or larger > limit) and planned <= {shard.path for shard in shards}:
        logger.warning(
            "%s: the rows of the first %d samples (--limit) are replaced by those of this run", run.store, limit
        )
        clear_run(run.store)


def _check_not_moved(run: Run, known: Sequence[WorkUnit], shards: Sequence[Shard]) -> None:
    """Raise RunMismatchError if planned shards are absent and new ones have their names and sizes.

    Their rows would be doubled under the new paths. Accidental matches are ignored: the error is raised only if
    matching shards are at least half of the absent or of the new shards.
    """
    listed = {shard.path for shard in shards}
    shards_of = (source.shard for unit in known for source in unit.inputs)
    absent = list({shard.path: shard for shard in shards_of if shard.path not in listed}.values())
    if not absent:
        return
    planned = {source.shard.path for unit in known for source in unit.inputs}
    new: dict[tuple[str, int | None], Shard] = {
        (_name(shard), shard.size): shard for shard in shards if shard.path not in planned and shard.size
    }
    pairs = [(old.path, new[_name(old), old.size].path) for old in absent if (_name(old), old.size) in new]
    if not pairs or 2 * len(pairs) < min(len(absent), len(new)):
        return
    before, after = pairs[0]
    while before and before.rpartition("/")[2] == after.rpartition("/")[2]:  # the parts that differ
        before, after = before.rpartition("/")[0], after.rpartition("/")[0]
    moved = shlex.quote(f"{before or '/'}={after}")
    lines = [*(f"{old} -> {now}" for old, now in pairs[:PAIRS_SHOWN]), *["..."] * (len(pairs) > PAIRS_SHOWN)]
    raise RunMismatchError(
        f"{run.store}: {len(pairs):,} of its {len(planned):,} shards are not among the inputs, which have shards of "
        "the same names and sizes at other paths:\n  "
        + "\n  ".join(lines)
        + f"\nIf the corpus has moved, pass `moved` "
        f"{moved}; if these are other shards, name the earlier ones as `input` too, or choose another `output`"
    )


def _name(shard: Shard) -> str:
    return shard.path.rpartition("/")[2]


def _renewed(run: Run, units: Iterable[WorkUnit], now: Mapping[str, Shard], redo_changed: bool) -> list[WorkUnit]:
    """Return the units with their shards as listed now, and committed ones whose shards have changed to be redone.

    Raises RunMismatchError for these unless `redo_changed`. A local file of which only the modification time has
    changed is compared by content.
    """
    current, differing = [], []
    for unit in units:
        inputs = tuple(
            renewed(source, now[source.shard.path]) if source.shard.path in now else source for source in unit.inputs
        )
        current.append(replace(unit, inputs=inputs))
        if any(
            (a.shard.size, a.shard.etag) != (b.shard.size, b.shard.etag)
            for a, b in zip(unit.inputs, inputs, strict=True)
        ):
            differing.append((unit, current[-1]))
    if differing:
        done = committed(run)
        differing = [(unit, now_unit) for unit, now_unit in differing if unit.id in done]
        reports = load_reports(run, [unit.id for unit, _ in differing])
        changes = {
            unit.id: list(_changes(report.inputs, unit.inputs, now_unit.inputs))
            for (unit, now_unit), report in zip(differing, reports, strict=True)
        }
        all_changes = [change for of_unit in changes.values() for change in of_unit]
        if all_changes and redo_changed:
            logger.warning("%s; their units are done again", _count(all_changes, current))
            return [replace(unit, replace=bool(changes.get(unit.id))) for unit in current]
        if all_changes:
            raise RunMismatchError(
                f"{run.store} holds rows of inputs that have changed since. {_count(all_changes, current)}:\n  "
                + "\n  ".join(dict.fromkeys(change for _, change in all_changes))
                + "\nRestore the old files, redo these shards with `redo_changed`, choose another `output`, or use "
                "`overwrite` to start over"
            )
    return current


def _count(changes: Sequence[tuple[str, str]], units: Sequence[WorkUnit]) -> str:
    changed = len({path for path, _ in changes})
    total = len({source.shard.path for unit in units for source in unit.inputs})
    return f"{changed:,} of {total:,} shards {'has' if changed == 1 else 'have'} changed"


def _changes(
    committed_inputs: Sequence[Mapping[str, Any]], planned_inputs: Sequence[Input], inputs: Sequence[Input]
) -> Iterator[tuple[str, str]]:
    """Yield path and description of each change."""
    now = {source.shard.path: source.shard for source in inputs}
    planned = {source.shard.path: source.shard for source in planned_inputs}
    for before in committed_inputs:
        shard = now.get(before["path"])
        if shard is None:  # it could not be read, and has become a unit of its own
            continue
        differing = [
            (name, before[name], new)
            for name, new in (("size", shard.size), ("etag", shard.etag))
            if before[name] is not None and new is not None and before[name] != new
        ]
        if [name for name, _, _ in differing] == ["etag"] and before.get("digest") is not None:
            source = Input(shard=shard, begin=before["begin"], end=before["end"])
            if content_digest(source) == before["digest"]:
                continue
        if shard.samples and differing:
            old_files = set(files_of(planned[shard.path]))
            names = sorted({utf8_name(file.name) for file in old_files.symmetric_difference(files_of(shard))})
            more = f" and {len(names) - FILES_SHOWN:,} more" if len(names) > FILES_SHOWN else ""
            yield shard.path, f"{shard.path}: {', '.join(names[:FILES_SHOWN]) or 'some of its files'}{more}"
            continue
        for name, old, new in differing:
            yield shard.path, f"{shard.path}: {name} {old} -> {new}"


# On the workers


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The units of a launch, as the run's plan and the differences from it, so that it hardly grows with the units."""

    run: Run | None
    files: tuple[str, ...]  # of the plan
    omitted: frozenset[str]  # units of the plan that this launch does not run
    changed: bytes  # compressed JSON: the lines of units that the plan lacks, or describes otherwise

    def lines(self) -> Iterator[str]:
        """Yield the units as JSON, for `unit_from_line`."""
        changed: list[str] = json.loads(zlib.decompress(self.changed))
        yield from changed
        if self.run is not None:
            skipped = self.omitted.union(json.loads(line)["id"] for line in changed)
            for line in _lines(self.run, self.files):
                if json.loads(line)["id"] not in skipped:
                    yield line.decode()

    def ids(self) -> Iterator[str]:
        """Yield the ids of the units."""
        return (str(json.loads(line)["id"]) for line in self.lines())


def launch_of(units: Sequence[WorkUnit], run: Run | None) -> Launch:
    """Return the launch that runs `units`, most of which are in the plan of `run`, if there is one."""
    files = () if run is None else tuple(_files(run))
    changed = {unit.id: unit for unit in units}
    omitted = set()
    for line in () if run is None else _lines(run, files):
        unit_id = json.loads(line)["id"]
        if unit_id not in changed:
            omitted.add(unit_id)
        elif _line(changed[unit_id]).encode() == line:
            del changed[unit_id]
    lines = json.dumps([_line(unit) for unit in units if unit.id in changed])
    return Launch(run=run, files=files, omitted=frozenset(omitted), changed=zlib.compress(lines.encode()))


def _line(unit: WorkUnit) -> str:
    """Return the unit as a line of the plan, with what the plan omits: URLs that are not the shard's path itself."""
    shards = [source.shard for source in unit.inputs]
    urls = {shard.path: shard.url for shard in shards if shard.url != shard.path}
    bound = [shard.path for shard in shards if not shard.may_redirect]
    omitted = {"urls": urls, "bound": bound, "replace": unit.replace}
    return json.dumps({**unit_to_json(unit), **{name: value for name, value in omitted.items() if value}})


def unit_from_line(line: str) -> WorkUnit:
    """Return the unit of a line of a launch."""
    data = json.loads(line)
    unit = unit_from_json(data, data.get("urls"), data.get("bound", ()))
    return replace(unit, replace=data.get("replace", False))


# After the run


def repair(run: Run, totals: Totals) -> Totals:
    """Correct the plan from the reports of the units; return their sum, corrected like the plan.

    - Where the parts of a shard do not join (readers/tar.py), all of them are withdrawn, and the next launch reads the
      shard as one unit. Shards with a part that failed or has not run are left alone.
    - A shard of a pack that cannot be read becomes its own unit, and the pack continues without it. If the shard
      failed after some of its samples, the whole pack has failed, and the next launch reads it without that shard.

    Each new unit is reported as failed, unless another launch has committed it. The plan is written before
    any rows are removed, so a kill at any point loses nothing. Each launch removes the rows of withdrawn units, also
    those that a slow attempt publishes later.
    """
    totals = totals.counted_once(run)
    plan_changes: list[WorkUnit] = []
    reruns: list[tuple[WorkUnit, str]] = []
    withdrawn: set[str] = set()
    misread = {path: parts for path, (_, parts) in totals.parts.items() if _is_misread(parts)}
    for path, parts in misread.items():
        source = Input(shard=_unit_of(parts[0].unit, [parts[0].source]).inputs[0].shard)
        reason = (
            f"{path}: its {len(parts)} parts were not read from the right bytes, probably because a "
            "member is itself a tar. Their rows were removed. Run the same command again to read the shard as one unit"
        )
        reruns.append((WorkUnit(id=unit_id(source), inputs=(source,)), reason))
        plan_changes += [WorkUnit(id=part.unit, inputs=()) for part in parts]
        withdrawn |= {part.unit for part in parts}
    for pack, singles in _packs_to_split(run, totals):
        plan_changes.append(pack)
        reruns += singles
    plan_changes += [unit for unit, _ in reruns]
    number = len(_files(run))
    while plan_changes and not _try_add(run, number, plan_changes):
        number += 1
    _remove_units(run, withdrawn)
    totals = replace(totals, parts={path: of for path, of in totals.parts.items() if path not in misread})
    totals.merge(Totals.of(report_failed_unit(run, unit, reason) for unit, reason in reruns))
    return totals


def _is_misread(parts: Sequence[Part]) -> bool:
    """Return whether the committed parts of a shard are all of it, and do not join."""
    inputs = sorted((part.source for part in parts), key=lambda source: int(source["begin"]))
    complete = [0, *(source["end"] for source in inputs)] == [*(source["begin"] for source in inputs), None]
    return complete and not parts_are_contiguous(map(input_read_from_json, inputs))


def _packs_to_split(run: Run, totals: Totals) -> Iterator[tuple[WorkUnit, list[tuple[WorkUnit, str]]]]:
    """Yield each pack without its unreadable shards, and these shards as units of their own, with the reason.

    A shard that was its own unit in this launch is not split off again. If an earlier launch committed the pack, a
    shard that is already planned as its own unit is not split off again either.
    """
    planned = {unit.id for unit in _planned(run, _files(run), set())} if totals.packs else set()
    for report in totals.packs:
        pack = _unit_of(report.unit, report.inputs)
        reasons = [source.get("error") for source in report.inputs]
        inputs = list(zip(pack.inputs, reasons, strict=True))
        singles = [(WorkUnit(id=unit_id(source), inputs=(source,)), reason) for source, reason in inputs if reason]
        launched = dict(totals.reported([unit.id for unit, _ in singles]))
        new = [
            (unit, reason)
            for unit, reason in singles
            if not launched[unit.id] and not (report.status == "kept" and unit.id in planned)
        ]
        if new:
            yield replace(pack, inputs=tuple(source for source, reason in inputs if not reason)), new


def _unit_of(unit: str, inputs: Sequence[Mapping[str, Any]]) -> WorkUnit:
    """Return the unit whose report describes `inputs`."""
    return unit_from_json({"id": unit, "inputs": inputs})


def _remove_units(run: Run, withdrawn: Collection[str]) -> None:
    """Remove the rows, failures and media of withdrawn units."""
    if not withdrawn:
        return
    for unit in committed(run) & set(withdrawn):
        run.store.remove(commit_name(unit))  # first: it must not describe rows that are gone
        run.store.remove(part_name(unit))
    for name in list_failures(run.store):
        if failures_unit(name) in withdrawn:
            remove_failures(run.store, name)
    for name in run.store.list(MEDIA):
        if media_unit(name) in withdrawn:
            run.store.remove(f"{MEDIA}/{name}")
