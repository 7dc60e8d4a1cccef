"""Whether samples have what a prompt or a dialogue takes of them: looked for in the first ones, before a job starts."""

import logging
from collections.abc import Sequence
from typing import Any

from mmbeam.clean.where import SampleValues
from mmbeam.errors import ShardError, UsageError
from mmbeam.features.files import FACTS, IDENTITY, opened
from mmbeam.prompts.ask import Instruction, prompt_fields
from mmbeam.prompts.template import entry_paths
from mmbeam.report.inspect import PROBED_SAMPLES, PROBED_SHARDS, Probe
from mmbeam.types import Sample, Shard

log = logging.getLogger(__name__)

NAMES_SHOWN = 20


def probe_rows(files: Sequence[Shard]) -> Probe:
    """What the first rows of the first files of features hold; a file that cannot be read is its unit's affair."""
    found = Probe(whole=len(files) <= PROBED_SHARDS)
    for file in files[:PROBED_SHARDS]:
        try:
            rows, whole = _first_rows(file)
        except ShardError:
            continue
        found.first += [Sample(**row) for row in rows]
        found.whole = found.whole and whole
    return found


def _first_rows(file: Shard) -> tuple[list[dict[str, Any]], bool]:
    """Of the first rows of a file what a prompt can name; and whether those are all."""
    wanted = {**IDENTITY, "text": FACTS["text"], "metadata": FACTS["metadata"]}
    with opened(file) as (parquet, _):
        schema = parquet.schema_arrow
        names = [name for name in wanted if name in schema.names and wanted[name](schema.field(name).type)]
        rows = next(parquet.iter_batches(batch_size=PROBED_SAMPLES, columns=names), None)
        return [] if rows is None else rows.to_pylist(), parquet.metadata.num_rows <= PROBED_SAMPLES


def check_fields(found: Probe, instruction: Instruction, filtered: bool) -> None:
    """Raise UsageError for a field that none of the first samples has: to lack it is a failure of a sample.

    Samples that are `filtered` before the model sees them may all the same have it further on: that is a warning.
    """
    samples = [SampleValues(sample) for sample in found.first]
    missing = [
        field for field in prompt_fields(instruction) if all(field.value_in(values) is None for values in samples)
    ]
    if not samples or not missing:
        return
    asked = "--task dialogue" if instruction.task == "dialogue" else "--prompt"
    names = {f"{{metadata{path}}}": None for values in samples for path in entry_paths(values["metadata"])}
    others = ["{key}", *(["{text}"] if any(values["text"] is not None for values in samples) else []), *names]
    more = f" and {len(others) - NAMES_SHOWN} more" if len(others) > NAMES_SHOWN else ""
    message = (
        f"{asked}: none of the first {len(samples)} samples has {' or '.join(f'{{{field}}}' for field in missing)}; "
        f"they have {', '.join(others[:NAMES_SHOWN])}{more}"
    )
    if found.whole or not filtered:
        raise UsageError(message)
    log.warning("%s; going on, since --where chooses among the samples", message)
