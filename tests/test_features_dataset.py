"""The data loader of features: every row once over ranks and workers, resumable, with captions and splits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from mmbeam.errors import NoShardsError, UsageError
from mmbeam.features import Captions, FeatureDataset, split_of
from mmbeam.names import SPLITS

ROWS = 90


def tokens_of(row: int) -> list[list[float]] | None:
    return None if row % 7 == 0 else [[float(row), float(step)] for step in range(row % 4)]


def write(path: Path, first: int = 0, width: int = 3, **changes: Any) -> Path:
    """Make rows with their number as values; every fifth vector and every seventh sequence is null."""
    rows = range(first, first + ROWS)
    columns = {
        "key": [f"k{row}" for row in rows],
        "image_embedding": pa.array(
            [None if row % 5 == 0 else [float(row)] * width for row in rows], pa.list_(pa.float32())
        ),
        "text_tokens": pa.array([tokens_of(row) for row in rows], pa.list_(pa.list_(pa.float16(), 2))),
        "caption": [None if row % 3 == 0 else f"caption {row}" for row in rows],
        "metadata": [json.dumps({"title": row} if row % 2 else {}) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({**columns, **changes}).replace_schema_metadata(
        {"mmbeam.dims": json.dumps({"image_embedding": width})}
    )
    pq.write_table(table, path, row_group_size=16)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write(tmp_path / "out" / "data" / "part-a.parquet")
    write(tmp_path / "out" / "data" / "part-b.parquet", first=ROWS)
    return tmp_path / "out"


def dataset(path: Path, **changes: Any) -> FeatureDataset:
    options = {"batch_size": 8, "features": ["image_embedding", "text_tokens"], "columns": ["key"], "buffer_bytes": 900}
    return FeatureDataset(str(path), **{**options, **changes})


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


@pytest.mark.parametrize("place", ["", "data", "data/*.parquet"])
def test_every_row_occurs_once_with_its_values(out: Path, place: str) -> None:
    batches = list(dataset(out / place))
    assert sorted(keys(batches)) == sorted(f"k{row}" for row in range(2 * ROWS))
    assert keys(batches) != keys(dataset(out / place, shuffle=False))
    for batch in batches:
        for index, key in enumerate(batch["key"]):
            row, length = int(key[1:]), int(batch["text_tokens_mask"][index].sum())
            assert bool(batch["image_embedding_mask"][index]) == (row % 5 != 0)
            assert batch["image_embedding"][index].tolist() == [float(row) if row % 5 else 0.0] * 3
            assert batch["text_tokens"][index, :length].tolist() == (tokens_of(row) or [])
            assert not batch["text_tokens"][index, length:].any()


def test_without_shuffling_the_order_is_the_files(out: Path) -> None:
    assert keys(dataset(out, shuffle=False)) == [f"k{row}" for row in range(2 * ROWS)]


def test_an_epoch_is_the_same_for_the_same_seed_and_differs_from_the_next(out: Path) -> None:
    data = dataset(out, seed=3)
    first, again = keys(data), keys(data)
    data.set_epoch(1)
    assert first == again != keys(data)


def test_ranks_and_workers_divide_the_rows(out: Path) -> None:
    counts: Counter[str] = Counter()
    for rank in range(3):
        part = keys(DataLoader(dataset(out, rank=rank, world_size=3), batch_size=None, num_workers=2))
        assert len(part) == 60
        counts.update(part)
    assert counts == Counter(f"k{row}" for row in range(2 * ROWS))


@pytest.mark.parametrize("taken", [0, 1, 5, 13])
def test_a_state_continues_with_the_next_batch(out: Path, taken: int) -> None:
    data, batches = dataset(out), list(dataset(out))
    iterator = iter(data)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(data.state_dict()))
    resumed = dataset(out)
    resumed.load_state_dict(state)
    assert keys(resumed) == keys(batches[taken:])
    older = {("window" if name == "buffer" else name): value for name, value in state.items()}
    older["dataset"] = {("share" if name == "reader" else name): value for name, value in state["dataset"].items()}
    resumed.load_state_dict(older)
    assert keys(resumed) == keys(batches[taken:])
    with pytest.raises(UsageError, match="batch_size 8; expected 9"):
        dataset(out, batch_size=9).load_state_dict(state)


def test_splits_are_by_key_and_divide_the_rows(out: Path) -> None:
    fractions = (0.5, 0.25, 0.25)
    parts = {split: keys(dataset(out, split=split, split_fractions=fractions, split_seed=1)) for split in SPLITS}
    assert sum(map(len, parts.values())) == 2 * ROWS
    assert all(split_of(key, 1, fractions) == split for split, part in parts.items() for key in part)
    assert len(parts["train"]) == dataset(out, split="train", split_fractions=fractions, split_seed=1).count().rows
    with pytest.raises(UsageError, match="sum to 1"):
        dataset(out, split="train", split_fractions=(0.5, 0.5, 0.5))


def test_rows_without_a_caption_are_omitted_and_counted(out: Path, tmp_path: Path) -> None:
    (tmp_path / "more.tsv").write_text("key\tcaption\nk1\tone\nk2\ttwo\n")
    places = [
        (Captions(column="caption"), 120, "caption 1"),
        (Captions(metadata="title"), 90, "1"),
        (Captions(file=str(tmp_path / "more.tsv")), 2, "one"),
    ]
    for captions, rows, caption in places:
        data = dataset(out, captions=captions)
        captioned = {key: text for batch in data for key, text in zip(batch["key"], batch["caption"], strict=True)}
        assert (len(captioned), captioned["k1"]) == (rows, caption)
        assert (data.count().rows, data.count().without_caption) == (rows, 2 * ROWS - rows)
    with pytest.raises(UsageError, match=r"none of the 180 rows has a caption; expected it in the field 'name'"):
        dataset(out, captions=Captions(metadata="name"))


def test_values_are_cast_and_the_last_batch_is_dropped_on_request(out: Path) -> None:
    batches = list(dataset(out, dtype=torch.bfloat16, drop_last=True, batch_size=100))
    assert [len(batch["key"]) for batch in batches] == [100]
    assert batches[0]["image_embedding"].dtype == batches[0]["text_tokens"].dtype == torch.bfloat16


def test_a_column_without_a_modality_in_its_name_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", mine=pa.array([[[1.0, 2.0]]] * ROWS, pa.list_(pa.list_(pa.float32(), 2))))
    data = dataset(path, features=["mine"])
    assert (data.features["mine"].modality, data.features["mine"].width) == (None, 2)
    assert next(iter(data))["mine"].shape == (8, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "`batch_size`"),
        ({"features": ["image"]}, "expected columns image, found key"),
        ({"features": ["caption"]}, "column caption is string; expected list<fixed_size_list<float>>"),
        ({"rank": 1}, "`rank` and `world_size`"),
        ({"columns": ["caption"], "captions": Captions(column="caption")}, "omit one of the two"),
    ],
)
def test_invalid_arguments_are_named(out: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataset(out, **changes)


def test_files_that_differ_or_are_missing_are_errors(out: Path, tmp_path: Path) -> None:
    write(out / "data" / "part-c.parquet", width=4)
    with pytest.raises(UsageError, match=r"part-c.parquet: has image_embedding \[4\] float32.*\[3\] float32"):
        dataset(out)
    with pytest.raises(NoShardsError, match="nothing"):
        dataset(tmp_path / "nothing")
    for content in (b"PAR1", b"PAR1" + bytes(100) + b"\x40\x00\x00\x00PAR1"):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(UsageError, match="expected a Parquet file"):
            dataset(tmp_path / "bad.parquet")


def test_a_vector_of_another_width_is_an_error_that_names_the_column(tmp_path: Path) -> None:
    vectors = pa.array([[1.0] * (3 + (row == 50)) for row in range(ROWS)], pa.list_(pa.float32()))
    with pytest.raises(UsageError, match="column image_embedding: expected vectors of 3 numbers, found one of 4"):
        list(dataset(write(tmp_path / "a.parquet", image_embedding=vectors)))
