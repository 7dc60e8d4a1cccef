"""Rows and published files: conservation, and attempts that race, die, fail or repeat, on every store."""

import multiprocessing
import threading
import timeit
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import (
    CAPTION,
    DIM,
    IMAGE,
    OUTPUTS,
    TEXT,
    VECTOR,
    commit_and_die,
    commit_together,
    make_batches,
    make_run,
    make_sample,
    make_unit,
    new_barrier,
    start,
    vector,
    write_unit,
)
from servers import STORES, fresh_output

from mmbeam.errors import FlowError
from mmbeam.names import MODALITIES
from mmbeam.runs import writer as parquet
from mmbeam.runs.commits import Totals, committed, report_failed_unit, report_of
from mmbeam.runs.rows import FAILURE_SCHEMA, build_schema, make_rows
from mmbeam.runs.run import Run, open_run
from mmbeam.runs.summary import sweep
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Audio, Batch, Failure, Output, Sample, Tally, UnitReport

UNIT = make_unit()


@pytest.fixture(params=STORES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return make_run(fresh_output(request.param, tmp_path))


@pytest.fixture
def local(tmp_path: Path) -> Run:
    return make_run(fresh_output("local", tmp_path))


def rows_of(run: Run, unit: str = UNIT.id) -> pa.Table:
    return pq.read_table(BytesIO(run.store.read(f"data/part-{unit}.parquet")))


def failures_of(run: Run, name: str | None) -> list[dict[str, Any]]:
    return list(pq.read_table(BytesIO(run.store.read(f"_failures/{name}"))).to_pylist())


def files_of(run: Run) -> dict[str, int]:
    folders = ("data", "_failures", "_mmbeam/commits", "_mmbeam/tmp")
    return {folder: len(run.store.list(folder)) for folder in folders}


# Rows


ALL_OUTPUTS = (IMAGE, TEXT, CAPTION)
STEPS = st.sampled_from(["decode", "embed", "generate"])


@st.composite
def windows_with_outcomes(draw: st.DrawFn) -> tuple[Batch, list[str]]:
    """A window in which every loss has a failure, and the outcome of each sample: row, impaired or failed."""
    samples, failures, expected = [], [], []
    values: dict[str, list[bool]] = {output.name: [] for output in ALL_OUTPUTS}
    for number in range(draw(st.integers(0, 12))):
        present = frozenset(draw(st.sets(st.sampled_from(MODALITIES))))
        sample = Sample(key=f"k{number}", shard="s", offset=number, present=present)
        due = [output for output in ALL_OUTPUTS if output.modalities & present]
        made = {output.name for output in due if draw(st.booleans())}
        whole = draw(st.integers(0, 5)) == 0
        lost = [output for output in due if output.name not in made]
        samples.append(sample)
        for output in ALL_OUTPUTS:
            values[output.name].append(output.name in made)
        failures += draw(causes(sample, lost, whole))
        expected.append("failed" if whole or (due and not made) else "impaired" if lost else "row")
    failures = draw(st.permutations(failures))
    features = {name: pa.array([vector(1) if v else None for v in vs], VECTOR) for name, vs in values.items()}
    features["caption"] = pa.array(["x" if v else None for v in values["caption"]], pa.string())
    features["caption_logprob"] = pa.array([-1.0 if v else None for v in values["caption"]], pa.float32())
    tally = Tally(samples=len(samples) + 2, skipped={"too small": 2})
    batch = Batch(
        unit=UNIT, index=0, last=True, samples=tuple(samples), features=features, failures=tuple(failures), tally=tally
    )
    return batch, expected


@st.composite
def causes(draw: st.DrawFn, sample: Sample, lost: list[Output], whole: bool) -> list[Failure]:
    """Failures for the outputs in `lost`, by column or by modality; sometimes one more that costs no output."""

    def failure(modality: str, outputs: tuple[str, ...] = ()) -> Failure:
        identity = {"key": sample.key, "shard": sample.shard, "offset": sample.offset}
        return Failure(**identity, modality=modality, step=draw(STEPS), error="E", message="m", outputs=outputs)  # type: ignore[arg-type]

    failures = [failure("")] if whole else []
    for output in lost:
        modality = draw(st.sampled_from(sorted(output.modalities)))
        failures.append(failure(modality, (output.name,)) if draw(st.booleans()) else failure(modality))
    return [*failures, *([failure("metadata")] if draw(st.booleans()) else [])]


@given(windows_with_outcomes())
@settings(max_examples=60, deadline=None)
def test_every_sample_becomes_one_row_or_one_failure(window: tuple[Batch, list[str]]) -> None:
    batch, expected = window
    result = make_rows(batch, ALL_OUTPUTS, build_schema(ALL_OUTPUTS, False, {}))
    tally = result.tally
    assert tally.samples == tally.rows + tally.failed + sum(tally.skipped.values())
    assert (tally.rows, tally.failed) == (len(expected) - expected.count("failed"), expected.count("failed"))
    assert tally.impaired == expected.count("impaired")
    kept = [sample.offset for sample, outcome in zip(batch.samples, expected, strict=True) if outcome != "failed"]
    assert result.rows["offset"].to_pylist() == kept
    assert len(result.failures) == len(batch.failures) == sum(tally.failures.values())
    for record in result.failures:
        charged = {output.name for output in ALL_OUTPUTS if record["modality"] in ("", *output.modalities)}
        assert set(record["outputs"]) <= charged  # unreadable metadata costs no vector
    rows = {row["offset"]: row for row in result.rows.to_pylist()}
    for sample, outcome in zip(batch.samples, expected, strict=True):
        records = [record for record in result.failures if record["offset"] == sample.offset]
        lost = {name for record in records for name in record["outputs"]}
        assert all(record["row"] == (outcome != "failed") for record in records)
        if outcome == "failed":
            assert lost == {output.name for output in ALL_OUTPUTS if output.modalities & sample.present}
            assert records
        else:
            row = rows[sample.offset]
            assert set(row["errors"]) == lost
            assert all(row[name] is None for name in lost)
            assert bool(lost) == (outcome == "impaired")
    for name, count in tally.outputs.items():
        assert count == sum(row[name] is not None for row in rows.values())


def test_a_loss_without_a_failure_is_an_error() -> None:
    batch = make_batches(UNIT)[0]
    schema = build_schema(OUTPUTS, False, {})
    with pytest.raises(FlowError, match=r"a-1\.tar: sample 00000 at byte 0: image_embedding was lost"):
        make_rows(replace(batch, failures=()), OUTPUTS, schema)
    (failure,) = batch.failures
    for other in (replace(failure, modality="text"), replace(failure, outputs=("text_embedding",))):
        with pytest.raises(FlowError, match="was lost without a failure"):
            make_rows(replace(batch, failures=(other,)), OUTPUTS, schema)


def test_an_inconsistent_batch_is_an_error() -> None:
    batch = make_batches(UNIT)[0]
    schema = build_schema(OUTPUTS, False, {})
    foreign = replace(batch.failures[0], offset=77)
    undue = {**batch.features, "text_embedding": pa.array([vector(1)] * 5, VECTOR)}
    short = {**batch.features, "text_embedding": pa.nulls(4, VECTOR)}
    twice = (*batch.samples[:4], batch.samples[3])
    for wrong, message in [
        (replace(batch, failures=(*batch.failures, foreign)), "not in window 0"),
        (replace(batch, features=undue), "only .* were due"),
        (replace(batch, features=short), "expected 5 values of text_embedding"),
        (replace(batch, features={}), "no stage made the column image_embedding"),
        (replace(batch, samples=twice), "two samples have the same shard and offset"),
    ]:
        with pytest.raises(FlowError, match=message):
            make_rows(wrong, OUTPUTS, schema)


def test_a_row_holds_the_fields_of_its_sample() -> None:
    sample = replace(
        make_sample(UNIT, 1),
        key="\udcff/ключ",
        text_clean="text 1",
        metadata='{"a": 1}',
        audio=Audio(waves={}, seconds=1.5),
    )
    features = {
        "image_embedding": pa.array([vector(1)], VECTOR),
        "text_embedding": pa.array([vector(2)], VECTOR),
        "text_num_tokens": pa.array([7], pa.int64()),
    }
    batch = Batch(unit=UNIT, index=0, last=True, samples=(sample,), features=features)
    (row,) = make_rows(batch, OUTPUTS, build_schema(OUTPUTS, True, {})).rows.to_pylist()
    assert row == {
        "key": "\\udcff/ключ",
        "shard": "/shards/a-1.tar",
        "offset": 1024,
        "text": "Text 1",
        "text_clean": "text 1",
        "text_num_tokens": 7,
        "metadata": '{"a": 1}',
        "image_width": 64,
        "image_height": 48,
        "audio_seconds": 1.5,
        "image_embedding": vector(1),
        "text_embedding": vector(2),
        "errors": [],
    }


def test_vectors_are_stored_in_the_type_of_their_column() -> None:
    half = Output(modalities=frozenset({"image"}), columns=(pa.field("image_embedding", pa.list_(pa.float16(), DIM)),))
    schema = build_schema((half, TEXT), False, {})
    rows = make_rows(make_batches(UNIT)[0], (half, TEXT), schema).rows
    assert rows.schema.field("image_embedding").type.value_type == pa.float16()
    assert rows["image_embedding"].to_pylist()[1:3] == [vector(1), vector(2)]
    assert schema.metadata[b"mmbeam.dims"] == b'{"image_embedding": 4, "text_embedding": 4}'


def test_vectors_are_uncompressed_and_their_numbers_not_nullable(tmp_path: Path) -> None:
    """All other columns are compressed."""
    tokens = Output(modalities=frozenset({"image"}), columns=(IMAGE.columns[0], pa.field("tokens", pa.list_(VECTOR))))
    run = make_run(str(tmp_path), (tokens, TEXT))
    [batch] = make_batches(UNIT, windows=1)
    values = pa.array([[vector(1)], [], None, [vector(2), vector(3)], None], pa.list_(VECTOR))
    with UnitWriter(run, UNIT) as writer:
        writer.write(replace(batch, features={**batch.features, "tokens": values}))
        writer.commit()
    file = pq.ParquetFile(tmp_path / "data" / f"part-{UNIT.id}.parquet")
    assert file.read()["tokens"].to_pylist() == values.to_pylist()
    group = file.metadata.row_group(0)
    codecs = {column.path_in_schema: column.compression for column in map(group.column, range(group.num_columns))}
    vectors = {path for path, codec in codecs.items() if codec == "UNCOMPRESSED"}
    assert vectors == {
        "image_embedding.list.element",
        "text_embedding.list.element",
        "tokens.list.element.list.element",
    }
    assert {codecs[path] for path in codecs if path not in vectors} == {"ZSTD"}
    levels = {column.path: column.max_definition_level for column in map(file.schema.column, range(len(file.schema)))}
    assert {levels[path] for path in vectors} == {2, 3}  # a list may be null or empty; for tokens both lists


# The writer


def test_a_written_unit_is_read_back(run: Run) -> None:
    report = write_unit(run, UNIT).commit()
    rows = rows_of(run)
    assert rows.schema.equals(run.schema)
    assert rows["offset"].to_pylist() == [number * 1024 for number in range(10)]
    assert rows["image_embedding"].to_pylist() == [None if n in (0, 5) else vector(n) for n in range(10)]
    assert rows["text_embedding"].to_pylist() == [None if n in (1, 6) else vector(-n) for n in range(10)]
    assert rows["errors"].to_pylist() == [["image_embedding"] if n in (0, 5) else [] for n in range(10)]
    failures = failures_of(run, report.failures_file)
    assert [record["key"] for record in failures] == ["00000", "00005"]
    assert failures[0] == {
        "key": "00000",
        "shard": "/shards/a-1.tar",
        "offset": 0,
        "modality": "image",
        "step": "decode",
        "error": "DecodeError",
        "message": "truncated JPEG",
        "outputs": ["image_embedding"],
        "row": True,
        "unit": "a-1",
    }
    assert report.tally.rows == report.tally.samples == 10
    assert report.inputs == ({"path": "/shards/a-1.tar", "size": 1024, "etag": "e1", "begin": 0, "end": None},)
    assert report.batch_plan == {name: run.recorded.get(name) for name in ("device", "batch_size", "windows")}
    assert report.tally.seconds["write"] > 0
    assert replace(report, status="kept") == report_of(run, UNIT.id)


def test_an_empty_part_has_the_whole_schema(run: Run) -> None:
    features = {output.name: pa.nulls(0, VECTOR) for output in OUTPUTS}
    with UnitWriter(run, UNIT) as writer:
        writer.write(Batch(unit=UNIT, index=0, last=True, features=features))
        report = writer.commit()
    write_unit(run, make_unit("b-2")).commit()
    empty, full = rows_of(run), rows_of(run, "b-2")
    assert empty.num_rows == 0
    assert empty.schema.equals(full.schema)
    metadata = {key: value for key, value in empty.schema.metadata.items() if key != b"mmbeam"}
    assert metadata == run.schema.metadata
    assert report.failures_file is None


def test_row_groups_are_bounded(local: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 4)
    write_unit(local, UNIT).commit()
    groups = pq.ParquetFile(BytesIO(local.store.read("data/part-a-1.parquet"))).metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [4, 1, 4, 1]
    monkeypatch.undo()
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 1)
    write_unit(local, make_unit("b-2")).commit()
    groups = pq.ParquetFile(BytesIO(local.store.read("data/part-b-2.parquet"))).metadata
    assert groups.num_row_groups == 10


def attempt(run: Run, *batches: Batch) -> UnitReport:
    with UnitWriter(run, UNIT) as writer:
        for batch in batches:
            writer.write(batch)
        return writer.commit()


def test_windows_out_of_order_are_an_error(local: Run) -> None:
    first, last = make_batches(UNIT)
    for batches, message in [
        ([last], "expected window 0, found window 1 of unit a-1"),
        ([first, first], "expected window 1, found window 0"),
        ([first, last, replace(last, index=2)], "expected no more, found window 2"),
        ([replace(first, unit=make_unit("b-2"))], "found window 0 of unit b-2"),
        ([replace(first, unit_error="not a tar")], "belongs to a unit without rows"),
        ([first], "expected window 1, found the end.*Reshuffle"),
        ([replace(first, tally=Tally(samples=6)), last], "for each of 11 samples"),
    ]:
        with pytest.raises(FlowError, match=message):
            attempt(local, *batches)
    assert set(files_of(local).values()) == {0}


def test_an_exception_in_the_middle_publishes_nothing(run: Run) -> None:
    first, last = make_batches(UNIT)
    with pytest.raises(FlowError, match="was lost without a failure"):
        attempt(run, first, replace(last, failures=()))
    with pytest.raises(KeyboardInterrupt):
        interrupted(run, first)
    assert set(files_of(run).values()) == {0}


def interrupted(run: Run, batch: Batch) -> None:
    with UnitWriter(run, UNIT) as writer:
        writer.write(batch)
        raise KeyboardInterrupt


# Attempts


def check_committed_once(run: Run, orphans: int = 0) -> None:
    """Check that the Parquet has every row once and, after a sweep, that only its failure file is left."""
    report = report_of(run, UNIT.id)
    assert report is not None
    assert rows_of(run)["offset"].to_pylist() == [number * 1024 for number in range(10)]
    assert len(run.store.list("_failures")) == 1 + orphans
    sweep(run, Totals.of([report]))
    assert set(run.store.list("_failures")) == {report.failures_file}
    assert len(failures_of(run, report.failures_file)) == 2


def test_one_of_several_attempts_in_threads_commits(run: Run) -> None:
    barrier = threading.Barrier(4)

    def commit_together_with_others(_: int) -> UnitReport:
        writer = write_unit(run, UNIT)
        barrier.wait()
        return writer.commit()

    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(commit_together_with_others, range(4)))
    assert sorted(report.status for report in reports) == ["kept", "kept", "kept", "written"]
    assert len({report.failures_file for report in reports}) == 1
    check_committed_once(run)


def test_one_of_several_attempts_in_processes_commits(run: Run) -> None:
    results: Any = multiprocessing.get_context("forkserver").Queue()
    barrier = new_barrier(3)
    processes = [start(commit_together, run.output, UNIT, barrier, results) for _ in range(3)]
    reports = dict(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    (winner,) = [attempt for attempt, report in reports.items() if report["status"] == "written"]
    assert {report["failures_file"] for report in reports.values()} == {f"part-a-1-{winner}.parquet"}
    check_committed_once(run)


@pytest.mark.parametrize(
    ("folder", "status", "orphans"),
    [("_failures/", "written", 0), ("data/", "written", 1), ("_mmbeam/commits/", "kept", 0)],
)
def test_the_next_attempt_commits_the_unit_of_a_killed_attempt(
    run: Run, folder: str, status: str, orphans: int
) -> None:
    process = start(commit_and_die, run.output, UNIT, folder)
    process.join(30)
    assert process.exitcode == -9
    assert committed(run) == ({UNIT.id} if status == "kept" else set())
    assert write_unit(run, UNIT).commit().status == status
    check_committed_once(run, orphans)
    run.store.sweep_scratch()
    assert run.store.list("_mmbeam/tmp") == {}


def test_a_run_works_on_any_fsspec_store() -> None:
    run = make_run(f"memory://out-{uuid.uuid4().hex[:8]}")
    open_run(run)
    open_run(run)
    assert write_unit(run, UNIT).commit().status == "written"
    assert write_unit(run, UNIT).commit().status == "kept"
    check_committed_once(run)


def test_a_repeated_put_whose_first_response_was_lost_is_a_commit(local: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that repeats its conditional put gets the error that the file exists."""
    publish = type(local.store)._publish

    def repeating(store: Any, name: str, source: Path | bytes, exclusive: bool) -> None:
        publish(store, name, source, exclusive)
        if exclusive:
            raise FileExistsError(name)

    monkeypatch.setattr(type(local.store), "_publish", repeating)
    assert write_unit(local, UNIT).commit().status == "written"
    monkeypatch.undo()
    check_committed_once(local)


def test_no_partial_file_is_ever_visible(run: Run) -> None:
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for name in run.store.list("data"):
                seen.append(pq.read_table(BytesIO(run.store.read(f"data/{name}"))).num_rows)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(6):
            write_unit(run, make_unit(f"u-{number}")).commit()
            write_unit(run, replace(make_unit(f"u-{number}"), replace=True)).commit()
    finally:
        done.set()
        watcher.join()
    assert seen
    assert set(seen) == {10}


def test_a_retry_of_failures_replaces_the_part(run: Run) -> None:
    before = write_unit(run, UNIT).commit()
    after = write_unit(run, replace(UNIT, replace=True)).commit()
    assert after.status == "written"
    assert after.failures_file != before.failures_file
    assert report_of(run, UNIT.id) == replace(after, status="kept")
    check_committed_once(run, orphans=1)


def test_a_killed_replacement_leaves_no_outdated_report(local: Run) -> None:
    before = write_unit(local, UNIT).commit()
    process = start(commit_and_die, local.output, replace(UNIT, replace=True), "_mmbeam/commits/")
    process.join(30)
    report = report_of(local, UNIT.id)
    assert report is not None
    assert report.failures_file != before.failures_file
    check_committed_once(local, orphans=1)


# Units that cannot be read


def test_a_unit_that_cannot_be_read_leaves_one_record_until_it_commits(run: Run) -> None:
    for reason in ("gone", "not a tar"):
        report = report_failed_unit(run, UNIT, reason)
    assert (report.status, report.error, report.failures_file) == ("failed", "not a tar", "part-a-1-failed.parquet")
    assert report.tally == Tally()
    assert committed(run) == set()
    (record,) = failures_of(run, report.failures_file)
    assert (record["shard"], record["message"], record["row"]) == ("/shards/a-1.tar", "not a tar", False)
    write_unit(run, UNIT).commit()
    check_committed_once(run)
    assert report_failed_unit(run, UNIT, "too late").status == "kept"
    check_committed_once(run)


def test_a_retry_that_cannot_be_read_keeps_the_rows(local: Run) -> None:
    write_unit(local, UNIT).commit()
    report = report_failed_unit(local, replace(UNIT, replace=True), "gone")
    assert (report.status, report.error) == ("failed", "gone")
    check_committed_once(local)


def test_all_failure_files_have_one_schema(local: Run) -> None:
    committed_file = write_unit(local, UNIT).commit().failures_file
    failed_file = report_failed_unit(local, make_unit("b-2"), "gone").failures_file
    for name in (committed_file, failed_file):
        assert pq.read_schema(BytesIO(local.store.read(f"_failures/{name}"))).equals(FAILURE_SCHEMA)


def test_rows_of_1000_samples_are_made_in_a_tenth_of_a_second() -> None:
    """A window of 1,000 samples takes about 5 ms; the limit allows for a busy machine."""
    samples = tuple(make_sample(UNIT, number) for number in range(1000))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(512 * 1000, np.float32)), 512)
    outputs = [replace(output, columns=(pa.field(output.name, vectors.type),)) for output in OUTPUTS]
    features = {output.name: vectors for output in outputs}
    batch = Batch(unit=UNIT, index=0, last=True, samples=samples, features=features)
    schema = build_schema(outputs, False, {})
    seconds = min(timeit.repeat(lambda: make_rows(batch, outputs, schema), number=1, repeat=5))
    assert seconds < 0.1
