"""The manifest, the plan, the commits, the stop mark, the lock and the summary of a run, on every store."""

import json
import logging
import multiprocessing
import os
import pickle
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import make_batches, make_run, make_unit, new_barrier, plan_together, start, write_unit
from servers import STORES, fresh_output

from mmbeam.config import Limits, Reading
from mmbeam.errors import FailureRateError, FlowError, JobError, RunMismatchError, UsageError
from mmbeam.jobs.inputs import as_moved
from mmbeam.report.status import failed_units
from mmbeam.runs.commits import (
    DamagedPartError,
    Totals,
    committed,
    load_reports,
    read_failures,
    report_failed_unit,
    report_of,
)
from mmbeam.runs.control import clear_stop, count_window, lock_run, stop_reason, stop_run
from mmbeam.runs.plan import extend_plan, load_plan, replace_limited_run
from mmbeam.runs.rows import FAILURE_SCHEMA
from mmbeam.runs.run import Run, list_failures, open_run, read_manifest
from mmbeam.runs.store import Store
from mmbeam.runs.summary import read_summary, sweep, write_summary
from mmbeam.types import Shard, Tally, UnitReport


@pytest.fixture(params=STORES)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return fresh_output(request.param, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> str:
    return fresh_output("local", tmp_path)


def make_shards(count: int, **changes: Any) -> list[Shard]:
    paths = [f"/shards/{number:05d}.tar" for number in range(count)]
    return [Shard(**{"path": path, "url": path, "size": 1024, "etag": "e1", **changes}) for path in paths]


def commit(run: Run, name: str) -> UnitReport:
    return write_unit(run, make_unit(name)).commit()


# The manifest


def test_a_run_with_the_same_configuration_opens_again(output: str) -> None:
    open_run(make_run(output))
    open_run(make_run(output))
    manifest = read_manifest(Store(output))
    assert manifest is not None
    assert manifest["configuration"] == {"task": "embed", "models": {"clip": {"digest": "12ab"}}}
    assert manifest["recorded"]["device"] == "cpu"
    assert manifest["fingerprint"] == make_run(output).fingerprint


def test_another_configuration_is_an_error_that_lists_the_differences(output: str) -> None:
    open_run(make_run(output))
    reading = {"draft": True, "limits": {"channels": 2}}
    with pytest.raises(RunMismatchError) as caught:
        open_run(make_run(output, models={"clip": {"digest": "34cd"}, "clap": {}}, limit=5, reading=reading))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:6] == [
        "model clip: digest 12ab -> digest 34cd",
        "model clap: not used -> digest unknown",
        "`limit`: not set -> 5",
        "`draft`: not set -> yes",
        "`max_channels`: not set -> 2",
    ]
    assert "`overwrite`" in lines[-1]


def test_another_model_is_an_error_that_names_the_models(local: str) -> None:
    run = make_run(local, models={"model": {"digest": "12ab" * 16}})
    open_run(replace(run, recorded={"models": {"model": "openai/clip"}}))
    other = make_run(local, models={"model": {"digest": "34cd" * 16}})
    with pytest.raises(RunMismatchError, match=r"\n  model: openai/clip -> google/siglip\n"):
        open_run(replace(other, recorded={"models": {"model": "google/siglip"}}))
    with pytest.raises(
        RunMismatchError, match=r"\n  model openai/clip: its files have changed \(digest 12ab12ab12ab -> "
    ):
        open_run(replace(other, recorded={"models": {"model": "openai/clip"}}))


def test_the_fingerprint_depends_on_the_configuration_only(local: str) -> None:
    run = make_run(local, a={"x": 1, "y": [1, 2]}, b=2)
    other = make_run(f"{local}-2", b=2, a={"y": (1, 2), "x": 1})
    assert run.fingerprint == other.fingerprint
    assert len(run.fingerprint) == 16
    assert make_run(local, a={"x": 1, "y": [2, 1]}, b=2).fingerprint != run.fingerprint
    assert run.schema.metadata[b"mmbeam.fingerprint"] == run.fingerprint.encode()


def test_limits_at_their_defaults_leave_an_older_fingerprint_as_it_is() -> None:
    before = {"member_bytes": 256 << 20, "pixels": 100_000_000, "seconds": 1800.0, "text_chars": 1_000_000}
    assert Reading().configuration()["limits"] == {**before, "expansion": 200.0}
    changed = Reading(limits=Limits(channels=2, pixels=5)).configuration()["limits"]
    assert changed == {**before, "expansion": 200.0, "channels": 2, "pixels": 5}


def test_a_run_pickles(local: str) -> None:
    run = make_run(local)
    copy = pickle.loads(pickle.dumps(run))
    assert copy.fingerprint == run.fingerprint
    assert copy.schema.equals(run.schema, check_metadata=True)
    assert copy.launch_id == run.launch_id != make_run(local).launch_id


def test_other_package_versions_are_a_warning(local: str, caplog: pytest.LogCaptureFixture) -> None:
    open_run(make_run(local))
    manifest = Path(local, "_mmbeam/run.json")
    manifest.write_text(manifest.read_text().replace("2.13", "2.12"))
    with caplog.at_level(logging.WARNING):
        open_run(make_run(local))
    assert "torch: 2.12 -> 2.13" in caplog.text


def test_rows_without_a_manifest_are_an_error_and_are_kept(output: str) -> None:
    store = Store(output)
    store.create("data/theirs.parquet", b"theirs")
    for overwrite in (False, True):
        with pytest.raises(RunMismatchError, match=r"theirs\.parquet"):
            open_run(make_run(output), overwrite=overwrite)
    assert store.read("data/theirs.parquet") == b"theirs"


def test_a_file_that_is_not_a_manifest_is_an_error(local: str) -> None:
    Store(local).create("_mmbeam/run.json", b"{}")
    with pytest.raises(RunMismatchError, match="expected the manifest"):
        open_run(make_run(local))
    open_run(make_run(local), overwrite=True)


def test_overwrite_removes_only_files_of_mmbeam(output: str) -> None:
    run = make_run(output)
    open_run(run)
    extend_plan(run, make_shards(2))
    write_summary(run, Totals.of([commit(run, "a-1")]), 1.0)
    run.store.create("data/notes.txt", b"theirs")
    run.store.create("_failures/notes.txt", b"theirs")
    with pytest.raises(RunMismatchError, match=r"notes\.txt"):  # it could hold rows
        open_run(make_run(output, limit=5), overwrite=True)
    assert run.store.list("data") == run.store.list("_failures") == {"notes.txt": 6}
    run.store.remove("data/notes.txt")
    other = make_run(output, limit=5)
    open_run(other, overwrite=True)
    assert committed(other) == set()
    assert load_plan(other) == []
    assert set(run.store.list("_mmbeam")) == {"run.json"}


def test_one_of_two_simultaneous_launches_creates_the_run(local: str) -> None:
    barrier, rejected = threading.Barrier(2), []

    def launch(limit: int) -> None:
        barrier.wait()
        try:
            open_run(make_run(local, limit=limit))
        except RunMismatchError:
            rejected.append(limit)

    threads = [threading.Thread(target=launch, args=(limit,)) for limit in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rejected) == 1
    open_run(make_run(local, limit=3 - rejected[0]))


# The plan


def test_new_shards_extend_the_plan_and_planned_units_never_change(output: str) -> None:
    run = make_run(output)
    first = extend_plan(run, make_shards(3))
    assert extend_plan(run, make_shards(3)) == first
    grown = extend_plan(run, make_shards(5))
    assert grown[:3] == first
    assert len({unit.id for unit in grown}) == 5
    assert set(run.store.list("_mmbeam/plan")) == {"000000.jsonl", "000001.jsonl"}
    assert [unit["id"] for unit in load_plan(run)] == [unit.id for unit in grown]


def test_a_planned_shard_that_is_no_longer_input_is_not_run(local: str, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(local)
    extend_plan(run, make_shards(3))
    with caplog.at_level(logging.WARNING):
        units = extend_plan(run, make_shards(3)[1:])
    assert [unit.inputs[0].shard.path for unit in units] == ["/shards/00001.tar", "/shards/00002.tar"]
    assert "1 planned units are not run" in caplog.text


def test_a_corpus_that_has_moved_is_an_error_that_names_the_pairs(local: str) -> None:
    run = make_run(local)
    units = extend_plan(run, make_shards(3))
    moved = [replace(shard, path=shard.path.replace("/shards", "/new/place"), etag="e2") for shard in make_shards(3)]
    with pytest.raises(RunMismatchError) as caught:
        extend_plan(run, [*moved[:2], *make_shards(5)[3:]])
    assert "2 of its 3 shards" in str(caught.value)
    assert "/shards/00000.tar -> /new/place/00000.tar" in str(caught.value)
    assert "`moved` /shards=/new/place;" in str(caught.value)
    assert len(extend_plan(run, [*make_shards(3), *moved])) == 6  # both are named: the new ones are other shards
    write_unit(run, units[1]).commit()
    as_before = as_moved(moved, ["/shards=/new/place/"])
    assert [shard.path for shard in as_before] == [shard.path for shard in make_shards(3)]
    assert [unit.inputs[0].shard.url for unit in extend_plan(run, as_before)[:3]] == [shard.url for shard in moved]


def test_shards_that_share_a_few_names_with_absent_ones_are_new(local: str) -> None:
    run = make_run(local)
    extend_plan(run, make_shards(3))
    others = [replace(shard, path=shard.path.replace("/shards", "/day2")) for shard in make_shards(3)]
    others = [others[0], *(replace(shard, size=2048) for shard in others[1:])]
    assert len(extend_plan(run, others)) == 3


@pytest.mark.parametrize("moved", ["", "/shards", "=/new", "/shards=", "/shards=/elsewhere"])
def test_a_move_that_names_no_shard_is_an_error(moved: str) -> None:
    with pytest.raises(UsageError, match="`moved`"):
        as_moved(make_shards(2), [moved])


def test_a_run_grows_out_of_its_limit(local: str) -> None:
    small = make_run(local, limit=10)
    shards = make_shards(3)
    open_run(small)
    (unit,) = extend_plan(small, shards)
    write_unit(small, unit).commit()
    whole = make_run(local, limit=None)
    for other, inputs in [
        (make_run(local, limit=5), shards),
        (make_run(local, tokens=True), shards),
        (whole, shards[:2]),
    ]:
        replace_limited_run(other, inputs)
        assert committed(small) == {unit.id}
    replace_limited_run(whole, make_shards(4))
    open_run(whole)
    assert committed(whole) == set()
    assert len(extend_plan(whole, make_shards(4))) == 4


def test_credentials_in_urls_are_used_and_never_written(local: str) -> None:
    run = make_run(local)
    shard = Shard(path="https://host/a.tar", url="https://user:secret@host/a.tar?key=secret")
    for _ in range(2):
        (unit,) = extend_plan(run, [shard])
        assert unit.inputs[0].shard == shard
    written = b"".join(path.read_bytes() for path in Path(local).rglob("*") if path.is_file())
    assert b"host/a.tar" in written
    assert b"secret" not in written


def test_a_changed_committed_shard_is_an_error(output: str) -> None:
    run = make_run(output)
    units = extend_plan(run, make_shards(3))
    write_unit(run, units[1]).commit()
    changed = make_shards(3, size=2048, etag="e2")
    assert len(extend_plan(run, [*make_shards(2), changed[2]])) == 3  # an uncommitted shard may change
    with pytest.raises(RunMismatchError) as caught:
        extend_plan(run, changed)
    assert "/shards/00001.tar: size 1024 -> 2048" in str(caught.value)
    assert "/shards/00001.tar: etag e1 -> e2" in str(caught.value)
    assert "00000.tar" not in str(caught.value)


def test_a_shard_that_changed_before_its_commit_is_not_an_error(local: str) -> None:
    run = make_run(local)
    extend_plan(run, make_shards(1))
    (unit,) = extend_plan(run, make_shards(1, etag="e2"))
    assert unit.inputs[0].shard.etag == "e2"
    write_unit(run, unit).commit()
    assert extend_plan(run, make_shards(1, etag="e2")) == [unit]
    assert len(extend_plan(run, make_shards(1, size=None, etag=None))) == 1  # unknown size and etag do not differ


def test_simultaneous_planning_in_two_processes_gives_one_plan(output: str) -> None:
    results: Any = multiprocessing.get_context("forkserver").Queue()
    barrier = new_barrier(2)
    inputs = [make_shards(20), make_shards(21)[1:]]
    processes = [start(plan_together, output, shards, barrier, results) for shards in inputs]
    plans = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    planned = [unit["id"] for unit in load_plan(make_run(output))]
    assert len(planned) == len(set(planned)) == 21
    assert {len(plan) for plan in plans} == {20}
    assert set(plans[0]) | set(plans[1]) == set(planned)


# Commits


def test_reports_are_rebuilt_from_footers(output: str) -> None:
    run = make_run(output)
    names = [f"u-{number}" for number in range(4)]
    written = [commit(run, name) for name in names]
    assert [report.status for report in written] == ["written"] * 4
    run.store.remove("_mmbeam/commits/u-0.json")
    run.store.replace("_mmbeam/commits/u-1.json", b"{truncated")
    run.store.replace("_mmbeam/commits/u-2.json", b'{"report": {}}')
    assert committed(run) == set(names)
    read = list(load_reports(run, names))
    assert [report.status for report in read] == ["kept"] * 4
    assert [report.tally for report in read] == [report.tally for report in written]
    assert [report.inputs for report in read] == [report.inputs for report in written]
    assert report_of(run, "u-1") == read[1]


def test_the_parquet_is_the_commit(output: str) -> None:
    run = make_run(output)
    commit(run, "a-1")
    run.store.remove("data/part-a-1.parquet")
    assert committed(run) == set()
    assert report_of(run, "a-1") is None


def test_a_part_of_another_configuration_is_an_error(output: str) -> None:
    commit(make_run(output), "a-1")
    other = make_run(output, limit=5)
    with pytest.raises(RunMismatchError, match="rows of configuration"):
        report_of(other, "a-1")
    other.store.remove("_mmbeam/commits/a-1.json")
    with pytest.raises(RunMismatchError, match="rows of configuration"):
        report_of(other, "a-1")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 64, b"x" * 100_000])
def test_a_part_that_is_no_parquet_is_removed(local: str, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(local)
    run.store.create("data/part-a-1.parquet", content)
    with pytest.raises(DamagedPartError, match=r"part-a-1\.parquet: expected a Parquet .* cut off or damaged"):
        list(load_reports(run, ["a-1"]))
    assert report_of(run, "a-1") is None
    assert "part-a-1.parquet: damaged since its commit" in caplog.text
    assert committed(run) == set()


# The stop mark and the lock


def test_the_stop_mark_keeps_the_first_reason_until_it_is_cleared(output: str) -> None:
    run = make_run(output)
    assert stop_reason(run) is None
    stop_run(run, "first")
    stop_run(run, "second")
    assert stop_reason(make_run(output)) == "first"
    clear_stop(run)
    assert stop_reason(run) is None


def test_the_failure_rate_is_checked_from_100_samples_on(local: str) -> None:
    run = make_run(local)
    count_window(run, Tally(rows=50, failed=49))
    assert stop_reason(run) is None
    copy = pickle.loads(pickle.dumps(run))  # as in another worker thread
    (failure,) = make_batches(make_unit())[0].failures
    with pytest.raises(
        FailureRateError, match=r"50 of 100 samples .* 1 decode: DecodeError; 00000 of .* truncated JPEG"
    ):
        count_window(copy, Tally(failed=1, failures={"decode: DecodeError": 1}), [failure])
    assert "50 of 100" in str(stop_reason(run))


def test_a_failure_rate_at_the_limit_is_allowed(local: str) -> None:
    run = make_run(local)
    count_window(run, Tally(rows=98, failed=2, impaired=3, skipped={"too small": 50}))
    with pytest.raises(FailureRateError, match="6 of 101"):
        count_window(run, Tally(rows=1, impaired=1))
    clear_stop(run)
    assert stop_reason(run) is None
    count_window(run, Tally(rows=95, failed=5))  # a new launch counts from 0


def test_the_lock_excludes_another_job(output: str) -> None:
    run = make_run(output)
    with lock_run(run):
        with pytest.raises(JobError, match=f"process {os.getpid()}"), lock_run(make_run(output)):
            pass
        assert run.store.exists("_mmbeam/lock")
    with lock_run(run):
        pass
    assert not run.store.exists("_mmbeam/lock")


def test_the_lock_of_an_ended_process_is_taken_over_once(output: str) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    run = make_run(output)
    dead = {"host": socket.gethostname(), "pid": ended.pid, "time": 0.0, "token": "dead"}
    run.store.create("_mmbeam/lock", json.dumps(dead).encode())
    with lock_run(run):
        assert json.loads(run.store.read("_mmbeam/lock"))["pid"] == os.getpid()
    run.store.create("_mmbeam/lock", json.dumps(dead).encode())  # as in a process that read it earlier
    with pytest.raises(JobError, match=str(ended.pid)), lock_run(run):
        pass
    assert json.loads(run.store.read("_mmbeam/lock")) == dead


def test_the_lock_of_another_host_is_respected(local: str) -> None:
    run = make_run(local)
    run.store.create("_mmbeam/lock", json.dumps({"host": "elsewhere", "pid": 1, "token": "t"}).encode())
    with pytest.raises(JobError, match="elsewhere"), lock_run(run):
        pass


# The summary


def test_the_summary_sums_the_reports(output: str) -> None:
    run = make_run(output)
    commit(run, "a-1")
    reports = [
        commit(run, "b-2"),
        *load_reports(run, ["a-1"]),
        report_failed_unit(run, make_unit("c-3"), "not a tar"),
    ]
    summary = write_summary(run, Totals.of(reports), wall_seconds=5.0)
    assert (summary.units_written, summary.units_kept, summary.units_failed) == (1, 1, 1)
    assert summary.tally.samples == summary.tally.rows == 20
    assert summary.tally.impaired == 4
    assert summary.tally.outputs == {"image_embedding": 16, "text_embedding": 16}
    assert summary.tally.failures == {"decode: DecodeError": 4}
    assert summary.rate == 10 / 5.0
    assert summary.failed == {"c-3": "not a tar"}
    assert read_summary(run) == summary


def test_model_utilisation_counts_only_written_units(local: str) -> None:
    def utilisation(*statuses: Any, seconds: float, devices: int = 1) -> float | None:
        tally = Tally(samples=1, rows=1, seconds={"compute": 6.0})
        reports = [UnitReport(unit=f"u-{n}", status=status, tally=tally) for n, status in enumerate(statuses)]
        report = write_summary(make_run(local), Totals.of(reports), seconds, devices)
        assert report.rate == (statuses.count("written") / seconds if seconds else 0.0)
        return report.model_utilisation

    assert utilisation("written", "kept", seconds=10.0) == 0.6
    assert utilisation("written", "written", seconds=10.0, devices=2) == 0.6
    assert utilisation("kept", seconds=0.0) == 0.0


def test_counts_that_do_not_add_up_are_an_error(local: str) -> None:
    lost = UnitReport(unit="a-1", status="written", tally=Tally(samples=3, rows=1, skipped={"too small": 1}))
    with pytest.raises(FlowError, match=r"unit a-1: expected .* 3 samples; .* together 2"):
        write_summary(make_run(local), Totals.of([lost]), 1.0)


def test_failure_files_that_no_footer_names_are_removed(output: str) -> None:
    run = make_run(output)
    report = commit(run, "a-1")
    for name in ("part-a-1-000000000000", "part-a-1-failed", "part-b-2-000000000000", "part-a-10-000000000000"):
        run.store.create(f"_failures/{name}.parquet", b"x")
    run.store.create("_failures/notes.txt", b"x")
    sweep(run, Totals.of([report]))
    kept = {report.failures_file, "part-b-2-000000000000.parquet", "part-a-10-000000000000.parquet", "notes.txt"}
    assert set(run.store.list("_failures")) == kept


def test_failure_files_of_the_old_folder_are_read_swept_and_removed(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    record = dict.fromkeys(FAILURE_SCHEMA.names, "") | {"offset": 0, "outputs": [], "row": False, "key": "old"}
    (tmp_path / "out" / "failures").mkdir()
    for name in ("part-a-1-ab.parquet", "part-b-2-cd.parquet", "part-c-3-failed.parquet"):
        pq.write_table(pa.Table.from_pylist([record], FAILURE_SCHEMA), tmp_path / "out" / "failures" / name)
    assert [record["key"] for record in read_failures(run.store, "part-a-1-ab.parquet")] == ["old"]
    assert failed_units(run, set()) == {"c-3": ""}
    write_summary(run, Totals.of([UnitReport(unit="b-2", status="kept", failures_file=None)]), 1.0)
    assert set(list_failures(run.store)) == {"part-a-1-ab.parquet", "part-c-3-failed.parquet"}
    open_run(run, overwrite=True)
    assert not list_failures(run.store)
