"""Giant shards in parts and tiny ones in packs: misread parts are withdrawn and their shard is read whole.

A launch here is a job without a model: it plans, reads, writes and summarizes units one after the other.
"""

import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from outputs import start
from servers import STORES, fresh_output
from shards import member_bytes

from mmbeam.config import Reading, Windows
from mmbeam.features.read import open_part
from mmbeam.readers import tar, units
from mmbeam.readers.listing import list_shards
from mmbeam.readers.stream import open_shard
from mmbeam.readers.windows import read_batches
from mmbeam.runs.commits import Totals, committed, load_reports, report_failed_unit, report_of
from mmbeam.runs.plan import extend_plan, repair
from mmbeam.runs.run import Run, open_run
from mmbeam.runs.store import Store
from mmbeam.runs.summary import confirm_summary, write_summary
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Needs, RunReport, UnitReport, WorkUnit

PART = 4096
NEEDS = Needs(modalities=frozenset({"text"}))
Row = tuple[str, int, str]  # key, offset, text


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look back 512 bytes, because the parts are small, and do not synchronise files."""
    monkeypatch.setattr(tar, "LOOK_BACK", 512)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return fresh_output("local", tmp_path)


def sample(number: int, size: int = 300) -> bytes:
    text, metadata = f"{number:04d} ".encode() * (size // 5), b'{"n": %d}' % number
    return member_bytes(f"{number:04d}.txt", text) + member_bytes(f"{number:04d}.json", metadata)


def samples(*numbers: int) -> bytes:
    return b"".join(map(sample, numbers))


def nested(number: int, count: int = 12, end: bytes = bytes(1024)) -> bytes:
    """Make a sample with a member that is a tar."""
    inner = b"".join(sample(900 + index) for index in range(count)) + end
    return member_bytes(f"{number:04d}.tar", inner) + sample(number)


MISLEADING = samples(*range(8)) + nested(8) + samples(*range(9, 20)) + nested(20) + nested(21) + samples(*range(22, 30))


def put(folder: Path, **tars: bytes) -> str:
    for name, data in tars.items():
        (folder / f"{name}.tar").write_bytes(data + bytes(1024))
    return str(folder)


# A launch


def make(output: str) -> Run:
    return Run.create(output=output, configuration={"task": "read"}, recorded={}, outputs=())


def launch(output: str, source: str, part_bytes: int = PART) -> RunReport:
    run = make(output)
    open_run(run)
    planned = extend_plan(run, list_shards([source]), unit_bytes=part_bytes)
    done = committed(run)
    if all(unit.id in done for unit in planned):
        return confirm_summary(run, repair(run, Totals.of(load_reports(run, [unit.id for unit in planned]))))
    return sum_up_units(run, [attempt(run, unit) for unit in planned])


def sum_up_units(run: Run, reports: Sequence[UnitReport]) -> RunReport:
    return write_summary(run, repair(run, Totals.of(reports)), 1.0)


def attempt(run: Run, unit: WorkUnit) -> UnitReport:
    kept = report_of(run, unit.id)
    if kept is not None and not unit.replace:
        return kept
    with UnitWriter(run, unit) as writer:
        for batch in read_batches(unit, Reading(), NEEDS, Windows(samples=3)):
            if batch.unit_error is not None:
                return report_failed_unit(run, unit, batch.unit_error, batch.inputs_read)
            writer.write(batch)
        return writer.commit()


def rows(output: str) -> list[tuple[str, Row]]:
    """Read all published rows, by shard and offset."""
    store = Store(output)
    published = []
    for name in store.list("data"):
        with open_part(store, f"data/{name}") as parquet:
            for row in parquet.read().to_pylist():
                published.append((row["shard"].rpartition("/")[2], (row["key"], row["offset"], row["text"])))
    return sorted(published)


def whole(source: str, tmp_path: Path) -> list[tuple[str, Row]]:
    output = fresh_output("local", tmp_path)
    report = launch(output, source, part_bytes=1 << 40)
    assert report.units_failed == 0
    return rows(output)


def files(output: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(output).rglob("*") if path.is_file()}


# Giant shards


@pytest.mark.parametrize("store", STORES)
def test_a_giant_shard_is_read_in_parts(store: str, tmp_path: Path) -> None:
    output, folder = fresh_output(store, tmp_path), fresh_output(store, tmp_path)
    fs, path = fsspec.core.url_to_fs(folder)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/giant.tar", samples(*range(10)) + bytes(1024))
    fs.pipe_file(f"{path}/small.tar", samples(50, 51) + bytes(1024))
    report = launch(output, folder)
    assert (report.units_written, report.units_failed) == (6, 0)  # 10 samples of 2 KiB, two in a part
    assert rows(output) == whole(folder, tmp_path)
    assert launch(output, folder).units_kept == 6


def test_a_web_server_without_ranges_is_read_from_the_beginning_by_every_part(output: str, tmp_path: Path) -> None:
    put(tmp_path, giant=samples(*range(10)))
    with served(tmp_path, Quiet) as url:
        assert launch(output, f"{url}/giant.tar").units_written == 5  # too small for range requests
        assert rows(output) == whole(f"{url}/giant.tar", tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_large_shard_is_cut_unless_every_part_would_be_read_from_the_beginning(
    ranges: bool, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, giant=samples(*range(10)))
    monkeypatch.setattr("mmbeam.readers.listing.CUTTABLE_BYTES", PART)
    with served(tmp_path, Ranges if ranges else Quiet) as url:
        assert launch(output, f"{url}/giant.tar").units_written == (5 if ranges else 1)
        assert rows(output) == whole(f"{url}/giant.tar", tmp_path)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        return


class Ranges(Quiet):
    """Sends the requested range."""

    def do_GET(self) -> None:
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class BreaksOff(Ranges):
    """Fails for the second half of one file."""

    broken = "tiny-2.tar"

    def do_GET(self) -> None:
        begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
        if self.path.endswith(f"/{self.broken}") and 2 * begin >= Path(self.translate_path(self.path)).stat().st_size:
            self.send_error(500)
        else:
            super().do_GET()


@contextmanager
def served(folder: Path, handler: type[Quiet], port: int = 0) -> Iterator[str]:
    """Serve a folder on loopback; yield the URL."""
    with ThreadingHTTPServer(("127.0.0.1", port), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_parts_keep_their_ids_when_shards_are_added(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, giant=samples(*range(40)))
    launch(output, source)
    before = set(committed(make(output)))
    put(tmp_path, another=samples(*range(40)))
    report = launch(output, source, part_bytes=10_000)
    assert (report.units_kept, report.units_written) == (20, 8)
    assert before < committed(make(output))
    assert rows(output) == whole(source, tmp_path)


def test_a_shard_with_misread_parts_is_read_whole_by_the_second_run(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, misleading=MISLEADING, plain=samples(*range(40)))
    expected = whole(source, tmp_path)
    first = launch(output, source)
    assert (first.units_failed, first.units_written) == (1, 20)
    assert first.tally.rows == len(rows(output)) == 40  # no row of the misread shard
    (reason,) = first.failed.values()
    assert "misleading.tar: its 34 parts were not read from the right bytes" in reason
    assert "Run the same command again" in reason
    assert "units: 21 planned, 20 committed, 1 FAILED" in "".join(status(output))
    second = launch(output, source)
    assert (second.units_failed, second.units_kept, second.units_written) == (0, 20, 1)
    assert rows(output) == expected
    assert second.tally.samples == len(expected)
    assert list(Store(output).list("_failures")) == []
    before = files(output)
    assert launch(output, source).units_written == 0
    assert files(output) == before


def status(output: str) -> Iterator[str]:
    from mmbeam.report.status import status_text

    return status_text(output)


def test_samples_of_a_second_tar_after_the_end_of_archive_marker_are_read(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, two_in_one=samples(*range(10)) + bytes(1024) + samples(*range(20, 60)))
    launch(output, source)  # where a part ends at the marker, the shard is read again as a whole
    assert launch(output, source).units_failed == 0
    assert [key for _, (key, *_) in rows(output)] == [f"{number:04d}" for number in (*range(10), *range(20, 60))]


def test_warnings_of_a_shard_are_counted_once(output: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(samples(*range(40)))
    assert launch(output, str(tmp_path)).tally.warnings == {"shards without an end-of-archive marker": 1}


def test_a_truncated_giant_loses_only_its_last_sample(output: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(samples(*range(40))[:-700])
    report = launch(output, str(tmp_path))
    assert (report.units_failed, report.tally.samples) == (0, 40)
    assert report.tally.failures == {"read: DecodeError": 1}


def test_parts_within_a_large_member_are_empty(output: str, tmp_path: Path) -> None:
    giant = member_bytes("0001.bin", random.Random(0).randbytes(50_000))
    source = put(tmp_path, x=samples(0) + giant + samples(1, 2, 3))
    report = launch(output, source)
    assert report.units_failed == 0
    assert [key for _, (key, *_) in rows(output)] == ["0000", "0001", "0002", "0003"]
    assert report.tally.present == {"text": 4}


@pytest.mark.parametrize("seed", range(6))
def test_any_shard_is_complete_after_two_runs(seed: int, output: str, tmp_path: Path) -> None:
    draw = random.Random(seed)
    made = [sample(0)]
    for number in range(1, draw.randrange(2, 30)):
        kinds = [
            sample(number, draw.randrange(0, 3000)),
            nested(number, draw.randrange(0, 15), draw.choice([b"", bytes(1024)])),
        ]
        made.append(draw.choice([*kinds, kinds[0], b"\xff" * 512, sample(draw.randrange(5))]))
    source = put(tmp_path, x=b"".join(made))
    part_bytes = draw.choice([1024, 3000, 10_000])
    first = launch(output, source, part_bytes)
    second = launch(output, source, part_bytes)
    assert second.units_failed == 0
    assert (second.units_written > 0) == (first.units_failed > 0)
    assert rows(output) == whole(source, tmp_path)


# Kills, slow attempts, unreadable parts


class Killed(BaseException):
    """Raised where the process would end."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise Killed just before change number `step` / 2 of the store, or just after it if `step` is odd."""
    remaining = step

    def dying(name: str) -> Any:
        change = getattr(Store, name)

        def changed(*args: Any, **options: Any) -> Any:
            nonlocal remaining
            remaining -= 2
            if remaining < -1:
                raise Killed
            change(*args, **options)
            if remaining == -1:
                raise Killed

        return changed

    for name in ("create", "replace", "remove"):
        monkeypatch.setattr(Store, name, dying(name))


@pytest.mark.parametrize("before", ["the summary", "the second launch", "a launch that withdraws"])
def test_a_kill_at_any_step_loses_and_repeats_no_row(before: str, tmp_path: Path) -> None:
    source = put(tmp_path, misleading=samples(*range(3)) + nested(3, 5) + nested(4, 5) + samples(5))
    expected = whole(source, tmp_path)
    template = fresh_output("local", tmp_path)
    commit_all(template, source)
    if before == "the second launch":
        assert launch(template, source).units_failed > 0
    elif before == "a launch that withdraws":
        survive(template, source, step=1, again=0)  # the plan is corrected, and nothing is removed
    launches = []
    for step in range(1000):
        output = fresh_output("local", tmp_path)
        shutil.copytree(template, output)
        needed = survive(output, source, step)
        if needed is None:
            break
        launches.append(needed)
        assert rows(output) == expected, step
    assert len(launches) >= 8  # changes of the store, each killed before and after
    assert max(launches) == (2 if before == "the summary" else 1)


def commit_all(output: str, source: str) -> None:
    """Commit all units without a summary."""
    run = make(output)
    open_run(run)
    for unit in extend_plan(run, list_shards([source]), unit_bytes=PART):
        attempt(run, unit)


def survive(output: str, source: str, step: int, again: int = 9) -> int | None:
    """Return the number of launches needed after one that is killed at `step`; None if it is not killed."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        try:
            launch(output, source)
        except Killed:
            pass
        else:
            return None
    return next((number for number in range(1, again + 1) if not launch(output, source).units_failed), again)


def test_a_process_killed_while_it_withdraws_parts_is_resumed(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, misleading=MISLEADING)
    process = start(launch_and_die, output, source)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with_misread = rows(output)
    assert launch(output, source).units_failed == 0
    assert rows(output) == whole(source, tmp_path)
    assert with_misread != rows(output)


def launch_and_die(output: str, source: str) -> None:
    tar.LOOK_BACK = 512
    remove = Store.remove

    def dying(store: Store, name: str) -> None:
        if name.startswith("_mmbeam/commits"):
            os.kill(os.getpid(), signal.SIGKILL)
        remove(store, name)

    Store.remove = dying  # type: ignore[method-assign]
    launch(output, source)


@pytest.mark.parametrize("launches", [1, 2])
def test_rows_that_a_slow_attempt_commits_for_a_withdrawn_part_are_removed(
    launches: int, output: str, tmp_path: Path
) -> None:
    source = put(tmp_path, misleading=MISLEADING)
    run = make(output)
    open_run(run)
    planned = extend_plan(run, list_shards([source]), unit_bytes=PART)
    for _ in range(launches):
        launch(output, source)
    for unit in planned[3:9]:
        attempt(run, unit)
    assert len(rows(output)) > 0
    report = launch(output, source)
    assert (report.units_failed, report.units_kept + report.units_written) == (0, 1)
    assert rows(output) == whole(source, tmp_path)
    assert list(Store(output).list("_failures")) == []
    before = files(output)
    assert launch(output, source).units_kept == 1
    assert files(output) == before


def test_a_slow_launch_does_not_withdraw_the_whole_shard(output: str, tmp_path: Path) -> None:
    """Its reports describe parts that another launch has withdrawn and replaced by the whole shard."""
    source = put(tmp_path, misleading=MISLEADING)
    run = make(output)
    open_run(run)
    reports = [attempt(run, unit) for unit in extend_plan(run, list_shards([source]), unit_bytes=PART)]
    assert sum_up_units(run, reports).units_failed == 1
    assert launch(output, source).units_failed == 0
    report = sum_up_units(run, reports)
    assert (report.units_failed, report.units_kept) == (0, 1)
    assert launch(output, source).units_written == 0
    assert rows(output) == whole(source, tmp_path)


@pytest.mark.parametrize("source_tar", ["plain", "misleading"])
def test_parts_are_compared_only_if_all_are_committed(source_tar: str, output: str, tmp_path: Path) -> None:
    source = put(tmp_path, x=samples(*range(40)) if source_tar == "plain" else MISLEADING)
    run = make(output)
    open_run(run)
    planned = extend_plan(run, list_shards([source]), unit_bytes=PART)
    reports = [attempt(run, unit) for unit in planned[:3]]
    reports += [report_failed_unit(run, planned[3], "connection lost")]
    reports += [attempt(run, unit) for unit in planned[4:]]
    assert sum_up_units(run, reports).failed == {planned[3].id: "connection lost"}
    report = launch(output, source)
    if source_tar == "plain":
        assert (report.units_written, report.units_failed) == (1, 0)
    else:
        assert report.units_failed == 1
        assert launch(output, source).units_failed == 0
    assert rows(output) == whole(source, tmp_path)


def test_repeated_units_replace_the_whole_shard(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, misleading=MISLEADING)
    run = make(output)
    launch(output, source)
    launch(output, source)
    again = [replace(unit, replace=True) for unit in extend_plan(run, list_shards([source]), unit_bytes=PART)]
    report = sum_up_units(run, [attempt(run, unit) for unit in again])
    assert (report.units_written, report.units_failed) == (1, 0)
    assert rows(output) == whole(source, tmp_path)


# Packs of tiny shards


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNPACKED_SHARDS", 2)


def tiny(folder: Path) -> str:
    return put(folder, **{f"tiny-{number}": samples(number) for number in range(8)})


@pytest.mark.usefixtures("packing")
def test_tiny_shards_share_a_unit(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    report = launch(output, source, part_bytes=100_000)
    assert report.units_written == 2
    assert rows(output) == whole(source, tmp_path)


@pytest.mark.usefixtures("packing")
def test_an_unreadable_shard_of_a_pack_becomes_a_separate_unit(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    bad, good = tmp_path / "tiny-2.tar", (tmp_path / "tiny-2.tar").read_bytes()
    bad.write_bytes(b"<html>not found</html>".ljust(len(good)))
    first = launch(output, source, part_bytes=100_000)
    assert (first.units_written, first.units_failed) == (2, 1)
    assert "tiny-2.tar: not a tar file" in first.failed[f"tiny-2-{next(iter(first.failed))[-10:]}"]
    assert len(rows(output)) == 7
    second = launch(output, source, part_bytes=100_000)
    assert (second.units_kept, second.units_failed) == (2, 1)
    assert second.failed == first.failed
    bad.write_bytes(good)
    third = launch(output, source, part_bytes=100_000)
    assert (third.units_kept, third.units_written, third.units_failed) == (2, 1, 0)
    assert rows(output) == whole(source, tmp_path)
    assert list(Store(output).list("_failures")) == []


@pytest.mark.usefixtures("packing")
def test_a_shard_whose_read_fails_halfway_is_removed_from_its_pack(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples are in a unit that is being written, so the pack is read again without the shard."""
    folder = put(tmp_path, **{f"tiny-{number}": samples(2 * number, 2 * number + 1) for number in range(8)})
    monkeypatch.setattr("mmbeam.readers.samples.open_shard", partial(open_shard, waits=()))
    monkeypatch.setattr("mmbeam.readers.stream.BLOCK_BYTES", 512)
    monkeypatch.setattr("mmbeam.readers.stream.READ_BYTES", 512)
    with served(tmp_path, BreaksOff) as url:
        source = f"{url}/tiny-{{0..7}}.tar"
        first = launch(output, source, part_bytes=100_000)
        assert (first.units_written, first.units_failed) == (1, 2)  # the pack, and its interrupted shard
        second = launch(output, source, part_bytes=100_000)
        assert (second.units_kept, second.units_written, second.units_failed) == (1, 1, 1)
        assert rows(output) == [row for row in whole(folder, tmp_path) if row[0] != "tiny-2.tar"]
        third = launch(output, source, part_bytes=100_000)
        assert (third.units_kept, third.failed) == (2, second.failed)
    monkeypatch.setattr(BreaksOff, "broken", "")
    with served(tmp_path, BreaksOff, int(url.rpartition(":")[2])):
        assert launch(output, source, part_bytes=100_000).units_failed == 0
    assert rows(output) == whole(folder, tmp_path)
    assert list(Store(output).list("_failures")) == []


@pytest.mark.usefixtures("packing")
def test_a_repeated_pack_does_not_read_a_shard_that_is_a_separate_unit(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    bad, good = tmp_path / "tiny-2.tar", (tmp_path / "tiny-2.tar").read_bytes()
    bad.write_bytes(b"x" * len(good))
    run = make(output)
    launch(output, source, part_bytes=100_000)
    bad.write_bytes(good)
    again = [replace(unit, replace=True) for unit in extend_plan(run, list_shards([source]))]
    report = sum_up_units(run, [attempt(run, unit) for unit in again])
    assert report.units_failed == 0
    assert rows(output) == whole(source, tmp_path)


@pytest.mark.usefixtures("packing")
def test_a_deleted_shard_is_not_reported(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    bad = tmp_path / "tiny-2.tar"
    bad.write_bytes(b"x" * bad.stat().st_size)
    assert launch(output, source, part_bytes=100_000).units_failed == 1
    bad.unlink()
    report = launch(output, source, part_bytes=100_000)
    assert (report.units_kept, report.units_failed) == (2, 0)
    assert rows(output) == whole(source, tmp_path)


@pytest.mark.usefixtures("packing")
def test_a_pack_is_read_after_one_of_its_shards_was_deleted(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    run = make(output)
    open_run(run)
    extend_plan(run, list_shards([source]), unit_bytes=100_000)
    (tmp_path / "tiny-2.tar").unlink()
    first = launch(output, source)
    assert first.units_failed == 1
    assert rows(output) == whole(source, tmp_path)
    assert launch(output, source).units_failed == 0
