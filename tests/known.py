"""One corpus and what a run in this process makes of it, to hold every other runner against.

Keys, order within a unit, nulls and counts are exact; vectors are equal within 1e-6, which is what another grouping
of samples in a model's batch may cost.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import shards
from tiny_clip import save_clip

from mmbeam.config import ModelRef, Windows
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.types import RunReport

Rows = dict[str, list[dict[str, Any]]]  # by part


@dataclass(frozen=True)
class Known:
    """A corpus of five shards with nulls and failures, and what a run with no Beam option makes of it."""

    root: Path
    parts: Rows
    report: RunReport


def make_known(root: Path) -> Known:
    save_clip(root / "clip")
    truths = shards.make_truths(35)
    for index in range(0, 35, 5):  # no picture; a picture that is none; neither picture nor text
        truths[index] = replace(truths[index], members={"txt": b"alone"})
        truths[index + 1] = replace(truths[index + 1], members={"jpg": b"\xff\xd8 none", "txt": b"beside it"})
        truths[index + 2] = replace(truths[index + 2], members={"json": b"{}"})
    truths[3] = replace(truths[3], members={"jpg": b"no picture, and nothing else"})
    shards.make_webdataset(root / "in", truths, shards=5)
    report = embed(options(root, root / "out"))
    return Known(root, read_parts(root / "out"), report)


def options(root: Path, output: Path, *beam_args: str, **changes: Any) -> EmbedOptions:
    made = EmbedOptions(
        input=(str(root / "in"),),
        output=str(output),
        models=(ModelRef(model=str(root / "clip")),),
        device="cpu",
        batch_size=3,
        max_failure_rate=1.0,
        windows=Windows(samples=4),
        beam_args=beam_args,
    )
    return replace(made, **changes)


def read_parts(output: Path) -> Rows:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((output / "data").glob("*.parquet"))}


def counts(report: RunReport) -> dict[str, Any]:
    return asdict(replace(report.tally, seconds={}))


def assert_same(found: Rows, expected: Rows) -> None:
    assert list(found) == list(expected)
    for name, rows in expected.items():
        assert [plain(row) for row in found[name]] == [plain(row) for row in rows]
        for row, other in zip(found[name], rows, strict=True):
            for column in filter(_is_computed, row):
                if row[column] is not None:
                    np.testing.assert_allclose(row[column], other[column], rtol=1e-5, atol=1e-6)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the computed numbers' count in the place of the numbers."""
    return {name: np.size(value) if _is_computed(name) and value else value for name, value in row.items()}


def _is_computed(column: str) -> bool:
    return column.endswith(("_embedding", "_logprob"))
