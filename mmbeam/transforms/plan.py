"""Plan: shard patterns, or units already planned, to work units spread over the workers."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace

import apache_beam as beam

from mmbeam.config import FieldMap
from mmbeam.names import TASKS
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import GENERATE_UNIT_BYTES, UNIT_BYTES, plan_units, unit_from_json, unit_to_json
from mmbeam.runs.control import clear_stop
from mmbeam.runs.plan import extend_plan
from mmbeam.runs.run import Run, open_run
from mmbeam.types import WorkUnit


class Plan(beam.PTransform):
    """PBegin -> PCollection[WorkUnit].

    `shards` is patterns, which are listed now on the machine that builds the pipeline, or units planned before. With a
    `run` the patterns are planned for it: its output is opened, and units that an earlier launch planned stay as they
    are. Large shards are cut and small ones packed only with a `run`, because a misread part can only be corrected in
    the plan of a run. This is the only shuffle before the write, and it carries only paths. Units travel as JSON,
    compressed in the description of the pipeline: 100,000 take 5 MB. beam.Create would hold them in memory twice, and
    take four times as long to build the description.

    Raises NoShardsError, and RunMismatchError if the output holds another run or a shard has changed.
    """

    def __init__(self, shards: str | Sequence[str] | Sequence[WorkUnit], run: Run | None = None) -> None:
        super().__init__()
        self.units = _units(shards, run)

    def expand(self, begin: beam.Pipeline) -> beam.PCollection[WorkUnit]:
        """Apply the step."""
        compressed = zlib.compress(json.dumps([_line(unit) for unit in self.units]).encode())
        return (
            begin
            | "Begin" >> beam.Impulse()  # bytes
            | "Units" >> beam.FlatMap(_unpack, compressed)  # str
            | "Spread" >> beam.Reshuffle()  # str
            | "Parse" >> beam.Map(_parse)  # WorkUnit
        )


def _unpack(_: bytes, packed: bytes) -> list[str]:
    lines: list[str] = json.loads(zlib.decompress(packed))
    return lines


def _line(unit: WorkUnit) -> str:
    """The unit as JSON, with what the run's plan omits: URLs that are not the shard's path itself."""
    shards = [source.shard for source in unit.inputs]
    urls = {shard.path: shard.url for shard in shards if shard.url != shard.path}
    bound = [shard.path for shard in shards if not shard.may_redirect]
    return json.dumps({**unit_to_json(unit), "urls": urls, "bound": bound, "replace": unit.replace})


def _parse(line: str) -> WorkUnit:
    data = json.loads(line)
    return replace(unit_from_json(data, data["urls"], data["bound"]), replace=data["replace"])


def _units(shards: str | Sequence[str] | Sequence[WorkUnit], run: Run | None) -> list[WorkUnit]:
    mixed = [shards] if isinstance(shards, str) else list(shards)
    patterns = [item for item in mixed if isinstance(item, str)]
    units = [item for item in mixed if isinstance(item, WorkUnit)]
    if mixed and not patterns:
        return units
    reading = {} if run is None else run.configuration.get("reading", {})
    listed = list_shards(patterns, fields=FieldMap(**reading.get("fields", {})))
    if run is None:
        return units + plan_units(listed, units)
    open_run(run)
    clear_stop(run)
    generates = run.configuration.get("task") in TASKS
    return units + extend_plan(run, listed, unit_bytes=GENERATE_UNIT_BYTES if generates else UNIT_BYTES)
