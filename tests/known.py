"""A corpus and the rows of an in-process run of it, with which every other runner is compared.

Keys, order within a unit, nulls and counts are exact. Vectors are equal within 1e-6, because batches may differ.
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
    """A corpus of five shards with nulls and failures, and the result of a run without Beam options."""

    root: Path
    parts: Rows
    report: RunReport


def make_known(root: Path) -> Known:
    save_clip(root / "clip")
    truths = shards.make_truths(35)
    for index in range(0, 35, 5):  # no image; a broken image; neither image nor text
        truths[index] = replace(truths[index], members={"txt": b"text"})
        truths[index + 1] = replace(truths[index + 1], members={"jpg": b"\xff\xd8 not an image", "txt": b"text"})
        truths[index + 2] = replace(truths[index + 2], members={"json": b"{}"})
    truths[3] = replace(truths[3], members={"jpg": b"not an image"})
    shards.make_webdataset(root / "in", truths, shards=5)
    report = embed(options(root, root / "out"))
    return Known(root, read_parts(root / "out"), report)


def options(root: Path, output: Path, *beam_args: str, **changes: Any) -> EmbedOptions:
    defaults = EmbedOptions(
        input=(str(root / "in"),),
        output=str(output),
        models=(ModelRef(model=str(root / "clip")),),
        device="cpu",
        batch_size=3,
        max_failure_rate=1.0,
        windows=Windows(samples=4),
        beam_args=beam_args,
    )
    return replace(defaults, **changes)


def read_parts(output: Path) -> Rows:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((output / "data").glob("*.parquet"))}


def counts(report: RunReport) -> dict[str, Any]:
    return asdict(replace(report.tally, seconds={}))


def assert_same(rows_by_part: Rows, expected: Rows) -> None:
    assert list(rows_by_part) == list(expected)
    for name, expected_rows in expected.items():
        rows = rows_by_part[name]
        assert [plain(row) for row in rows] == [plain(row) for row in expected_rows]
        for row, expected_row in zip(rows, expected_rows, strict=True):
            for column in filter(_is_computed, row):
                if row[column] is not None:
                    numbers, expected_numbers = _numbers(row[column]), _numbers(expected_row[column])
                    np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-5, atol=1e-6)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the size of each computed value instead of the value."""
    return {name: np.size(value) if _is_computed(name) and value else value for name, value in row.items()}


def _is_computed(column: str) -> bool:
    return column.endswith(("_embedding", "_logprob", "labels"))


def _numbers(value: Any) -> Any:
    """Return the numbers of a value: a vector, a number, or the scores of labels by their names."""
    is_labels = isinstance(value, list) and value and isinstance(value[0], dict)
    return [record["score"] for record in sorted(value, key=lambda record: record["label"])] if is_labels else value
