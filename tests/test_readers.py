"""The rows of a real run in every reader, opened as its users do: the same keys, vectors and nulls.

The expectation is what pyarrow reads; test_embed_job checks what a run writes. Every reader opens OUT/data: from OUT,
`datasets` would also read the Parquet of OUT/failures and the JSON of OUT/_mmbeam.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import shards
import torch
from tiny_clip import save_clip

from mmbeam.config import ModelRef
from mmbeam.jobs.embed import EmbedOptions, embed

DIM = 24

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """The output of a run, and its rows in order."""

    data: Path
    rows: Rows
    vector_type: str

    @property
    def vectors(self) -> Rows:
        """The rows with the vector of an image."""
        return [row for row in self.rows if row["image_embedding"] is not None]


@pytest.fixture(scope="module", params=["float32", "float16"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Three parts of rows with every column: nulls among vectors, tokens and lists of errors; one part has no row."""
    root = tmp_path_factory.mktemp("readers")
    truths = shards.make_truths(11)
    truths[2] = replace(truths[2], members={"txt": b"no image"})
    truths[3] = replace(truths[3], members={"jpg": b"broken", "txt": "ein Text für ein kaputtes Bild".encode()})
    truths[4] = replace(truths[4], members={"json": b"{}"})
    shards.make_webdataset(root / "in", truths, shards=2)
    (root / "in" / "all-failed.tar").write_bytes(shards.tar_bytes([("a.jpg", b"broken, and alone")]))
    options = EmbedOptions(
        input=(str(root / "in"),),
        output=str(root / "out"),
        models=(ModelRef(model=str(save_clip(root / "clip"))),),
        device="cpu",
        tokens=True,
        vector_type=request.param,
        max_failure_rate=1.0,
    )
    assert embed(options).tally.rows == 11
    data = root / "out" / "data"
    rows = [row for path in sorted(data.iterdir()) for row in pq.read_table(path).to_pylist()]
    return Written(data, sorted(rows, key=lambda row: str(row["key"])), request.param)


def test_the_rows_hold_nulls_failures_and_an_empty_part(written: Written) -> None:
    by_key = {row["key"]: row for row in written.rows}
    assert len(list(written.data.iterdir())) == 3
    assert by_key["000002"]["image_embedding"] is None
    assert by_key["000003"]["errors"] == ["image_embedding"]
    assert by_key["000004"]["text_embedding"] is by_key["000004"]["text_tokens"] is None
    assert {len(row["image_embedding"]) for row in written.vectors} == {DIM}
    assert {np.shape(row["image_tokens"])[1] for row in written.vectors} == {32}


def in_order(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: str(row["key"]))


def plain(value: Any) -> Any:
    """Convert a value to plain Python: NumPy arrays to lists, missing values of pandas and NumPy to None."""
    if isinstance(value, np.ndarray | list):
        return [plain(element) for element in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def assert_same(rows: Rows, written: Written) -> None:
    """Compare all values; sizes may be floats in a reader without nullable integers."""
    assert [{name: plain(value) for name, value in row.items()} for row in in_order(rows)] == written.rows


def test_pyarrow_dataset_and_table(written: Written) -> None:
    dataset = ds.dataset(written.data)
    assert_same(dataset.to_table().to_pylist(), written)
    assert_same(pq.read_table(written.data).to_pylist(), written)
    have = dataset.to_table(filter=ds.field("image_embedding").is_valid(), columns=["key"])
    assert sorted(have["key"].to_pylist()) == [row["key"] for row in written.vectors]
    assert dataset.schema.field("image_embedding").type.value_type == pa.type_for_alias(written.vector_type)


def test_pandas(written: Written) -> None:
    frame = pd.read_parquet(written.data)
    assert_same(frame.to_dict("records"), written)
    vectors = np.stack(frame.dropna(subset=["image_embedding"]).sort_values("key")["image_embedding"])
    assert vectors.dtype == written.vector_type
    assert vectors.tolist() == [row["image_embedding"] for row in written.vectors]


def test_duckdb(written: Written) -> None:
    """`data/*.parquet`: DuckDB takes a glob, not a folder. Vectors are compared as arrays, by a cast to FLOAT[DIM]:
    its list functions refuse a column in which any vector is null, even where a WHERE has left those out.
    """
    files = f"{written.data}/*.parquet"
    with duckdb.connect() as connection:
        names = [column[0] for column in connection.sql(f"DESCRIBE FROM '{files}'").fetchall()]
        rows = connection.sql(f"FROM '{files}'").fetchall()
        assert_same([dict(zip(names, row, strict=True)) for row in rows], written)
        first = written.vectors[0]
        nearest = connection.execute(
            f"SELECT key, array_cosine_similarity(image_embedding::FLOAT[{DIM}], ?::FLOAT[{DIM}]) AS alike "
            f"FROM '{files}' WHERE image_embedding IS NOT NULL ORDER BY alike DESC LIMIT 1",
            [first["image_embedding"]],
        ).fetchone()
    assert nearest is not None
    assert nearest[0] == first["key"]
    assert nearest[1] == pytest.approx(1, abs=1e-3)


def test_polars(written: Written) -> None:
    frame = pl.read_parquet(written.data)
    assert_same(frame.to_dicts(), written)
    lazy = pl.scan_parquet(written.data).filter(pl.col("image_embedding").is_not_null()).sort("key").collect()
    vectors = lazy["image_embedding"].list.to_array(DIM).to_numpy()
    assert vectors.tolist() == [row["image_embedding"] for row in written.vectors]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library `datasets`, offline, with a cache for this test."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    return datasets


def test_datasets(written: Written, datasets: Any, tmp_path: Path) -> None:
    dataset = datasets.load_dataset(
        "parquet", data_files=f"{written.data}/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert_same(dataset.to_list(), written)
    have = dataset.filter(lambda row: row["image_embedding"] is not None).with_format("torch")
    vectors = {row["key"]: row["image_embedding"].tolist() for row in have}
    assert vectors == {row["key"]: row["image_embedding"] for row in written.vectors}
    folder = datasets.load_dataset(str(written.data), split="train", cache_dir=str(tmp_path / "cache"))
    assert_same(folder.to_list(), written)


def test_torch(written: Written) -> None:
    """Arrow's buffer becomes an array [samples, dim] without a copy per row."""
    table = ds.dataset(written.data).to_table(filter=ds.field("image_embedding").is_valid()).sort_by("key")
    flat = table["image_embedding"].combine_chunks().flatten().to_numpy()
    vectors = torch.tensor(flat).view(len(table), -1)
    assert vectors.shape == (len(written.vectors), DIM)
    assert vectors.dtype == getattr(torch, written.vector_type)
    assert vectors.tolist() == [row["image_embedding"] for row in written.vectors]
    assert vectors.float().norm(dim=1).tolist() == pytest.approx([1.0] * len(vectors), abs=2e-3)


def test_the_output_itself_reads_as_its_rows(written: Written, datasets: Any, tmp_path: Path) -> None:
    """Failure records and what `_mmbeam/` holds are not taken for rows."""
    output = written.data.parent
    assert list((output / "_failures").iterdir())
    assert_same(pq.read_table(output).to_pylist(), written)
    assert_same(ds.dataset(output).to_table().to_pylist(), written)
    assert_same(pd.read_parquet(output).to_dict("records"), written)
    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert_same(loaded.to_list(), written)
    with pytest.raises(pl.exceptions.InvalidOperationError):  # polars needs the folder of the rows, and says so
        pl.read_parquet(output)
