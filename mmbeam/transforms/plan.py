"""Plan: from shard patterns, or from units already planned, to work units spread over the workers."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace

import apache_beam as beam

from mmbeam.names import TASKS
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import GENERATE_BYTES, UNIT_BYTES, plan_units, unit_from_json, unit_to_json
from mmbeam.runs.control import clear_stop
from mmbeam.runs.extend import extend_plan
from mmbeam.runs.run import Run, open_run
from mmbeam.types import Shard, WorkUnit


class Plan(beam.PTransform):
    """PBegin -> PCollection[WorkUnit].

    Takes patterns, listed here and now on the machine that builds the pipeline, or units that were
    planned before. With a `run` the patterns are planned for it: its output is opened, and units that
    an earlier launch planned stay as they are. Only then are giant shards cut and tiny ones packed, since
    the run is what tells a part that was read from a wrong place. This is the only shuffle before the write, and it
    carries paths. Units travel as JSON text, and lie compressed in the job's description, where 100,000 take 5 MB:
    beam.Create would keep them twice, and take four times as long to be described.

    Raises NoShardsError, and RunMismatchError if the output holds another run or a shard has changed.
    """

    def __init__(self, shards: str | Sequence[str] | Sequence[WorkUnit], run: Run | None = None) -> None:
        super().__init__()
        self.units = _units(shards, run)

    def expand(self, begin: beam.Pipeline) -> beam.PCollection[WorkUnit]:
        packed = zlib.compress(json.dumps([_line(unit) for unit in self.units]).encode())
        return (
            begin
            | "Begin" >> beam.Impulse()  # bytes
            | "Units" >> beam.FlatMap(_unpack, packed)  # str
            | "Spread" >> beam.Reshuffle()  # str
            | "Parse" >> beam.Map(_parse)  # WorkUnit
        )


def _unpack(_: bytes, packed: bytes) -> list[str]:
    lines: list[str] = json.loads(zlib.decompress(packed))
    return lines


def _line(unit: WorkUnit) -> str:
    """The unit with what its plan leaves out: what is opened, where that is not the path itself."""
    shards = [each.shard for each in unit.inputs]
    urls = {shard.path: shard.url for shard in shards if shard.url != shard.path}
    return json.dumps({**unit_to_json(unit), "urls": urls, "replace": unit.replace})


def _parse(line: str) -> WorkUnit:
    data = json.loads(line)
    return replace(unit_from_json(data, data["urls"]), replace=data["replace"])


def _units(shards: str | Sequence[str] | Sequence[WorkUnit], run: Run | None) -> list[WorkUnit]:
    given = [shards] if isinstance(shards, str) else list(shards)
    patterns = [each for each in given if isinstance(each, str)]
    units = [each for each in given if isinstance(each, WorkUnit)]
    if not patterns and given:
        return units
    found = list_shards(patterns)
    return units + (plan_units(found, units) if run is None else _planned(run, found))


def _planned(run: Run, shards: Sequence[Shard]) -> list[WorkUnit]:
    open_run(run)
    clear_stop(run)
    generates = run.configuration.get("task") in TASKS
    return extend_plan(run, shards, unit_bytes=GENERATE_BYTES if generates else UNIT_BYTES)
