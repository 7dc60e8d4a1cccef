"""Parquet files of features as input: listed, checked against a model, and read as samples."""

import json
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outputs import make_run, make_unit, write_unit

from mmbeam.config import Cleaning, Limits, Reading, Windows
from mmbeam.errors import MissingModalityError, NoShardsError, ShardError, UsageError
from mmbeam.features.files import check_columns, feature_files
from mmbeam.features.read import column_values, read_features
from mmbeam.features.schema import origin_of, parse_name
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import limited_unit, plan_units
from mmbeam.runs.run import Run, open_run
from mmbeam.types import Batch, FeatureColumn, Needs, Origin, Sample, WorkUnit

IMAGE = FeatureColumn(name="image_embedding", modality="image", width=4)
TOKENS = FeatureColumn(name="text_tokens", modality="text", width=3, tokens=True)
NEEDS = Needs(columns=frozenset({IMAGE, TOKENS}))
ALL = Windows()


def vector(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_row(index: int, **changes: Any) -> dict[str, Any]:
    """Make a row as `mmbeam embed` writes it."""
    return {
        "key": f"{index:03d}",
        "shard": "/shards/a.tar",
        "offset": 512 * index,
        "text": f"text {index}",
        "metadata": json.dumps({"index": index}),
        "image_width": 64,
        "image_height": 48 + index,
        "audio_seconds": 0.5,
        "image_embedding": vector(index, 4).tolist(),
        "text_tokens": vector(-index % 97, index % 3 + 1, 3).tolist(),
        "errors": [],
    } | changes


def write(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("offset", pa.int64()),
            ("text", pa.string()),
            ("metadata", pa.string()),
            ("image_width", pa.int32()),
            ("image_height", pa.int32()),
            ("audio_seconds", pa.float32()),
            ("image_embedding", pa.list_(pa.float32())),
            ("text_tokens", pa.list_(pa.list_(pa.float16(), 3))),
            ("errors", pa.list_(pa.string())),
        ],
        metadata={"mmbeam.dims": json.dumps({"image_embedding": 4})},
    )
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, **options)
    return path


def unit_of(*paths: Path) -> WorkUnit:
    [unit] = plan_units(list_shards([str(path) for path in paths], any_file=True), [])
    return unit


def read(unit: WorkUnit, needs: Needs = NEEDS, reading: Reading | None = None, windows: Windows = ALL) -> list[Batch]:
    with closing(read_features(unit, reading or Reading(), needs, windows)) as batches:
        return list(batches)


def samples_of(batches: Sequence[Batch]) -> list[Sample]:
    return [sample for batch in batches for sample in batch.samples]


# Listing


def names(inputs: Sequence[str]) -> list[str]:
    return [Path(shard.path).name for shard in feature_files(inputs)]


def test_outputs_folders_and_parquet_files_are_features_and_tars_are_not(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    with write_unit(run, make_unit()) as writer:
        writer.commit()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(bytes(1024))
    out = str(tmp_path / "out")
    for path in (
        out,
        out + "/",
        f"{out}/data",
        f"{out}/data/",
        f"{out}/data/*.parquet",
        f"{out}/data/part-a-1.parquet",
    ):
        assert names([path]) == ["part-a-1.parquet"]
    (tmp_path / "spark [1].parquet").mkdir()
    for name in "ab":
        write(tmp_path / "spark [1].parquet" / f"{name}.parquet", [])
    assert names([f"{tmp_path}/spark [1].parquet"]) == names([f"{tmp_path}/spark [1].parquet/{{a,b}}.parquet"])
    for shards in ([str(tmp_path / "shards")], [f"{tmp_path}/shards/*.tar"], ["https://example.org/a/"], ["nothing"]):
        assert feature_files(shards) == []
    with pytest.raises(UsageError, match="found both"):
        feature_files([out, str(tmp_path / "shards")])
    with pytest.raises(NoShardsError, match="nothing"):
        feature_files([f"{tmp_path}/nothing/*.parquet"])


def test_a_run_without_rows_yet_is_features_without_a_file(tmp_path: Path) -> None:
    open_run(make_run(str(tmp_path / "out")))
    with pytest.raises(NoShardsError, match="data"):
        feature_files([str(tmp_path / "out")])


def test_a_folder_with_shards_beside_parquet_files_is_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [])
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    assert feature_files([str(tmp_path)]) == []


@pytest.mark.parametrize(
    ("column", "parsed"),
    [
        ("image_embedding", ("model", "image", False)),
        ("clip_text_tokens", ("clip", "text", True)),
        ("my_text_image_embedding", ("my_text", "image", False)),
        ("clipimage_embedding", None),
        ("_image_embedding", None),
        ("image_embeddings", None),
        ("text", None),
    ],
)
def test_a_column_name_states_model_modality_and_shape(column: str, parsed: tuple[str, str, bool] | None) -> None:
    assert parse_name(column) == parsed


def test_a_unit_is_named_after_its_file(tmp_path: Path) -> None:
    assert unit_of(write(tmp_path / "part-photos.parquet", [make_row(0)])).id.startswith("part-photos-")


# Checks


def files(*paths: Path) -> Any:
    return list_shards([str(path) for path in paths], any_file=True)


def test_a_column_may_be_in_any_file_and_must_be_in_one(tmp_path: Path) -> None:
    whole = write(tmp_path / "b.parquet", [make_row(0)])
    table = pq.read_table(whole)
    pq.write_table(table.drop(["text_tokens"]), tmp_path / "a.parquet")
    check_columns(files(tmp_path / "a.parquet", whole), NEEDS.columns)
    other = FeatureColumn(name="clap_audio_embedding", modality="audio", width=4)
    with pytest.raises(MissingModalityError, match=r"clap_audio_embedding, which.*image_embedding, text_tokens"):
        check_columns(files(whole), [IMAGE, other])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (FeatureColumn(name="image_embedding", modality="image", width=512), "4 wide, and the model takes 512"),
        (FeatureColumn(name="text_tokens", modality="text", width=768, tokens=True), "3 wide, and the model takes 768"),
        (FeatureColumn(name="text_tokens", modality="text", width=3), r"shape \[3\]"),
        (FeatureColumn(name="image_embedding", modality="image", width=4, tokens=True), r"shape \[tokens, 4\]"),
        (FeatureColumn(name="text", modality="text", width=4), "string"),
        (FeatureColumn(name="errors", modality="text", width=4), "list<"),
    ],
)
def test_features_of_another_shape_are_rejected(tmp_path: Path, column: FeatureColumn, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_columns(files(write(tmp_path / "a.parquet", [make_row(0)])), [column])


def test_a_file_without_the_identity_columns_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "image_embedding": [[1.0]]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="expected the columns key, shard, offset"):
        check_columns(files(tmp_path / "a.parquet"), [IMAGE])


def test_a_damaged_file_fails_its_unit_and_only_all_damaged_fail_the_job(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 truncated")
    good = write(tmp_path / "good.parquet", [make_row(0)])
    check_columns(files(tmp_path / "bad.parquet", good), [IMAGE])
    with pytest.raises(ShardError, match="cannot be read as Parquet"):
        check_columns(files(tmp_path / "bad.parquet"), [IMAGE])


# Origin


def with_models(path: Path, models: Any, digests: Any) -> Path:
    """Add metadata that names the models to a file; return its path."""
    table = pq.read_table(path)
    metadata = {"mmbeam.models": json.dumps(models), "mmbeam.digests": json.dumps(digests)}
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata}), path)
    return path


def test_features_of_another_encoder_of_equal_width_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = with_models(write(tmp_path / "a.parquet", [make_row(0)]), {"model": "org/clip@1"}, {"model": "a" * 64})
    recorded = replace(IMAGE, origin=Origin("org/clip@1", "a" * 64))
    check_columns(files(path), [recorded, TOKENS])
    other = replace(IMAGE, origin=Origin("org/siglip@2", "b" * 64))
    both = r"was made by org/clip@1 \(digest a{12}\), and the model takes features of org/siglip@2 \(digest b{12}\)"
    with pytest.raises(UsageError, match=both):
        check_columns(files(path), [other])
    batches = read(unit_of(path), Needs(columns=frozenset({other})))  # a file that the launch did not check
    assert re.search(both, batches[-1].unit_error or "")


def test_features_of_an_unknown_model_are_accepted_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write(tmp_path / f"{number}.parquet", [make_row(number)]) for number in range(3)]
    check_columns(files(*paths), [IMAGE, TOKENS])
    assert not caplog.messages
    check_columns(files(*paths), [replace(IMAGE, origin=Origin("org/clip", "a" * 64))])
    [warning] = caplog.messages
    assert "the model that made image_embedding is unknown; expected features of org/clip (digest" in warning


@pytest.mark.parametrize(
    ("column", "model"),
    [
        ("image_embedding", "model"),
        ("text_tokens", "model"),
        ("clip_image_embedding", "clip"),
        ("model_image_embedding", "model"),
        ("my_text_image_embedding", "my_text"),
        ("clap_audio_embedding", None),
        ("errors", None),
    ],
)
def test_a_column_belongs_to_the_model_whose_name_it_begins_with(column: str, model: str | None) -> None:
    names = ("model", "clip", "my_text")
    metadata = {"mmbeam.models": json.dumps({name: f"org/{name}" for name in names})}
    metadata["mmbeam.digests"] = json.dumps({name: f"digest of {name}" for name in names})
    origin = origin_of(pa.schema([(column, pa.float32())], metadata=metadata), column)
    assert origin == (None if model is None else Origin(f"org/{model}", f"digest of {model}"))


@given(st.binary(max_size=30) | st.sampled_from([b"[]", b"{}", b'{"model": 3}', b'"model"']), st.booleans())
def test_invalid_metadata_names_no_model(models: bytes, both: bool) -> None:
    digests = models if both else b'{"model": "a"}'
    schema = pa.schema([("image_embedding", pa.float32())], {b"mmbeam.models": models, b"mmbeam.digests": digests})
    assert origin_of(schema, "image_embedding") is None


def test_a_run_records_the_models_of_its_columns(tmp_path: Path) -> None:
    models = {"clip": {"family": "clip", "digest": "a" * 64}}
    run = Run.create(
        output=str(tmp_path),
        configuration={"models": models},
        recorded={"models": {"clip": "org/clip@1"}},
        outputs=(),
    )
    assert origin_of(run.schema, "clip_image_embedding") == Origin("org/clip@1", "a" * 64)


# Reading


@pytest.mark.parametrize("windows", [ALL, Windows(samples=3), Windows(decoded_bytes=1)])
@pytest.mark.parametrize("row_group_size", [2, 100])
def test_rows_become_samples_with_windows_of_any_size(tmp_path: Path, windows: Windows, row_group_size: int) -> None:
    rows = [make_row(index) for index in range(8)]
    unit = unit_of(write(tmp_path / "a.parquet", rows, row_group_size=row_group_size))
    batches = read(unit, windows=windows)
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert all(len(batch.samples) <= windows.samples for batch in batches)
    assert sum(batch.tally.samples for batch in batches) == 8
    assert sum(batch.tally.present["image"] for batch in batches[:-1]) == 8
    for row, sample in zip(rows, samples_of(batches), strict=True):
        assert (sample.key, sample.shard, sample.offset) == (row["key"], row["shard"], row["offset"])
        assert (sample.text, sample.metadata) == (row["text"], row["metadata"])
        assert sample.image_size == (row["image_width"], row["image_height"])
        assert sample.audio is not None
        assert (sample.audio.seconds, sample.audio.waves) == (0.5, {})
        assert sample.present == {"image", "text"}
        np.testing.assert_array_equal(sample.features["image_embedding"], np.float32(row["image_embedding"]))
        np.testing.assert_array_equal(sample.features["text_tokens"], np.float16(row["text_tokens"]))
    assert not any(batch.failures or batch.unit_error for batch in batches)


def test_missing_values_are_absent_and_invalid_ones_are_failures(tmp_path: Path) -> None:
    rows = [
        make_row(0, image_embedding=None),
        make_row(1, image_embedding=[1.0, float("nan"), 0.0, 0.0]),
        make_row(2, image_embedding=[1.0, 2.0, 3.0]),
        make_row(3, text_tokens=None, text=None, image_embedding=None),
        make_row(4, text_tokens=[]),
        make_row(5, text_tokens=[[0.0, 1.0, float("inf")], [0.0, 0.0, 0.0]]),
        make_row(6, image_embedding=None, errors=["image_embedding"]),
        make_row(7, image_embedding=[1.0, None, 0.0, 0.0]),
        make_row(8),
    ]
    batches = read(unit_of(write(tmp_path / "a.parquet", rows)))
    contents = {sample.key: (sorted(sample.present), sorted(sample.features)) for sample in samples_of(batches)}
    both = ["image_embedding", "text_tokens"]
    assert contents == {
        "000": (["text"], ["text_tokens"]),
        "001": (["image", "text"], ["text_tokens"]),
        "002": (["image", "text"], ["text_tokens"]),
        "003": ([], []),
        "004": (["image"], ["image_embedding"]),
        "005": (["image", "text"], ["image_embedding"]),
        "006": (["image", "text"], ["text_tokens"]),
        "007": (["image", "text"], ["text_tokens"]),
        "008": (["image", "text"], both),
    }
    failures = {f.key: (f.modality, f.step, f.message) for batch in batches for f in batch.failures}
    assert failures == {
        "001": ("image", "read", "image_embedding is not finite"),
        "002": ("image", "read", "image_embedding is 3 wide, not 4"),
        "005": ("text", "read", "text_tokens is not finite"),
        "006": ("image", "read", "image_embedding was lost when the features were made"),
        "007": ("image", "read", "image_embedding is not finite"),
    }


def test_a_text_is_present_if_the_needs_name_it(tmp_path: Path) -> None:
    unit = unit_of(write(tmp_path / "a.parquet", [make_row(0), make_row(1, text=None, image_embedding=None)]))
    needs = Needs(modalities=frozenset({"text"}), columns=frozenset({IMAGE}))
    assert [sample.present for sample in samples_of(read(unit, needs))] == [{"image", "text"}, frozenset()]


def test_texts_are_cleaned_and_samples_selected(tmp_path: Path) -> None:
    unit = unit_of(write(tmp_path / "a.parquet", [make_row(i, text=f" TEXT  {i} ") for i in range(6)]))
    cleaning = Cleaning(text=("whitespace", "lower"), where=("image_height >= 50", "metadata['index'] != 4"))
    batches = read(unit, reading=Reading(cleaning=cleaning))
    assert [sample.text_clean for sample in samples_of(batches)] == ["text 2", "text 3", "text 5"]
    assert samples_of(batches)[0].text == " TEXT  2 "
    assert batches[0].tally.skipped == {"image_height >= 50": 2, "metadata['index'] != 4": 1}


def test_a_limit_counts_over_files(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.parquet", [make_row(i, shard=name) for i in range(4)])
    unit = limited_unit(files(tmp_path / "*.parquet"), 6)
    batches = read(unit, windows=Windows(samples=3))
    assert [(sample.shard, sample.key) for sample in samples_of(batches)] == [
        *(("a", f"{i:03d}") for i in range(4)),
        *(("b", f"{i:03d}") for i in range(2)),
    ]
    assert sum(batch.tally.samples for batch in batches) == 6


def test_a_damaged_file_or_another_width_fails_the_unit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [make_row(i) for i in range(500)], compression="zstd", row_group_size=100)
    unit = unit_of(path)
    column = FeatureColumn(name="image_embedding", modality="image", width=9)
    assert read(unit, Needs(columns=frozenset({column})))[-1].unit_error == (
        f"{path}: image_embedding is 4 wide, and the model takes 9; pass the features that it was trained on, "
        "or the model that was trained on these"
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    batches = read(unit_of(path))
    assert batches[-1].last
    assert batches[-1].unit_error is not None
    assert "cannot be read as Parquet" in batches[-1].unit_error
    path.unlink()
    assert "does not exist" in str(read(unit)[-1].unit_error)


@pytest.mark.parametrize("name", ["image_embedding", "text_tokens"])
def test_a_list_of_more_numbers_than_its_limit_fails_the_unit(name: str, tmp_path: Path) -> None:
    """A list of one number repeated takes next to nothing in a file."""
    many = {"image_embedding": [0.0] * 300_000, "text_tokens": [[0.0] * 3] * 100_000}[name]
    path = write(tmp_path / "a.parquet", [make_row(0), make_row(1, **{name: many}), *map(make_row, range(2, 9))])
    assert path.stat().st_size < 20_000
    for limits in (Limits(), Limits(decode_bytes=5_000_000)):
        batches = read(unit_of(path), reading=Reading(limits=limits))
        assert (len(samples_of(batches)), batches[-1].unit_error) == (9, None)
    small = Reading(limits=Limits(decode_bytes=1_000_000))
    error = read(unit_of(path), reading=small)[-1].unit_error
    assert error is not None
    assert re.search(rf"a.parquet: row group 0 has 1 MB of {name}, .*--max-decode-bytes", error)


def test_an_empty_file_is_an_empty_unit(tmp_path: Path) -> None:
    [batch] = read(unit_of(write(tmp_path / "a.parquet", [])))
    assert (batch.last, batch.unit_error, batch.samples) == (True, None, ())


NUMBERS = st.floats(width=32, allow_subnormal=False)
VECTORS = st.lists(NUMBERS, min_size=3, max_size=3) | st.lists(NUMBERS, max_size=5)


@given(st.lists(st.none() | VECTORS, min_size=1))
def test_every_vector_is_returned_or_a_reason(rows: list[list[float] | None]) -> None:
    column = FeatureColumn(name="x", modality="image", width=3)
    values = column_values(pa.array(rows, pa.list_(pa.float32())), column)
    for row, value in zip(rows, values, strict=True):
        if row is None:
            assert value is None
        elif len(row) != 3:
            assert value == f"is {len(row)} wide, not 3"
        elif not np.isfinite(row).all():
            assert value == "is not finite"
        else:
            np.testing.assert_array_equal(value, np.float32(row))


@given(st.lists(st.none() | st.lists(VECTORS, max_size=4), min_size=1))
def test_every_sequence_is_returned_or_a_reason(rows: list[list[list[float]] | None]) -> None:
    column = FeatureColumn(name="x", modality="image", width=3, tokens=True)
    values = column_values(pa.array(rows, pa.list_(pa.list_(pa.float32()))), column)
    for row, value in zip(rows, values, strict=True):
        if not row:
            assert value is None
        elif any(len(vector) != 3 for vector in row) or not np.isfinite(row).all():
            assert isinstance(value, str)
        else:
            np.testing.assert_array_equal(value, np.float32(row))
