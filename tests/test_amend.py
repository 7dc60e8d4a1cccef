"""Giant shards in parts and tiny ones in packs, through a run: what is misread is withdrawn and read again.

A launch here is the job without a model: planned, read, written and summed up by the real thing, one unit
after the other.
"""

import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from outputs import start
from servers import STORES, fresh_output
from shards import member_bytes

from mmbeam import runs
from mmbeam.config import Reading, Windows
from mmbeam.readers import parts, units
from mmbeam.readers.listing import list_shards
from mmbeam.readers.stream import open_shard
from mmbeam.readers.windows import read_batches
from mmbeam.runs import Run
from mmbeam.runs.store import Store
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Needs, RunReport, UnitReport, WorkUnit

PART = 4096
NEEDS = Needs(modalities=frozenset({"text"}))
Row = tuple[str, int, str]  # key, offset, text


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are small here: none is to be read from the beginning of its shard. And nobody cuts the power."""
    monkeypatch.setattr(parts, "LOOK_BACK", 512)
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
    """A sample one member of which is a tar of its own."""
    inner = b"".join(sample(900 + each) for each in range(count)) + end
    return member_bytes(f"{number:04d}.tar", inner) + sample(number)


FOOLING = samples(*range(8)) + nested(8) + samples(*range(9, 20)) + nested(20) + nested(21) + samples(*range(22, 30))


def put(folder: Path, **tars: bytes) -> str:
    for name, data in tars.items():
        (folder / f"{name}.tar").write_bytes(data + bytes(1024))
    return str(folder)


# A launch


def make(output: str) -> Run:
    return Run.create(output=output, configuration={"task": "read"}, recorded={}, outputs=())


def launch(output: str, source: str, part_bytes: int = PART) -> RunReport:
    run = make(output)
    runs.open_run(run)
    planned = runs.extend_plan(run, list_shards([source]), unit_bytes=part_bytes)
    done = runs.committed(run)
    if all(unit.id in done for unit in planned):
        return runs.confirm_summary(run, list(runs.load_reports(run, [unit.id for unit in planned])))
    return runs.write_summary(run, [attempt(run, unit) for unit in planned], 1.0)


def attempt(run: Run, unit: WorkUnit) -> UnitReport:
    kept = runs.report_of(run, unit.id)
    if kept is not None and not unit.replace:
        return kept
    with UnitWriter(run, unit) as writer:
        for batch in read_batches(unit, Reading(), NEEDS, Windows(samples=3)):
            if batch.unit_error is not None:
                return runs.report_failed_unit(run, unit, batch.unit_error, batch.inputs_read)
            writer.write(batch)
        return writer.commit()


def rows(output: str) -> list[tuple[str, Row]]:
    """What is published, by shard and then by offset; twice what is there twice."""
    store = Store(output)
    found = []
    for name in store.list("data"):
        with store.open(f"data/{name}") as file:
            for row in pq.read_table(file).to_pylist():
                found.append((row["shard"].rpartition("/")[2], (row["key"], row["offset"], row["text"])))
    return sorted(found)


def whole(source: str, tmp_path: Path) -> list[tuple[str, Row]]:
    output = fresh_output("local", tmp_path)
    report = launch(output, source, part_bytes=1 << 40)
    assert report.units_failed == 0
    return rows(output)


def files(output: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(output).rglob("*") if path.is_file()}


# Giant shards


@pytest.mark.parametrize("store", STORES)
def test_a_giant_shard_is_read_in_parts_once_and_for_all(store: str, tmp_path: Path) -> None:
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
        assert launch(output, f"{url}/giant.tar").units_written == 5  # too small to be asked for ranges
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
    """Sends the bytes that are asked for."""

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
    """Does not send the second half of one file."""

    broken = "tiny-2.tar"

    def do_GET(self) -> None:
        begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
        if self.path.endswith(f"/{self.broken}") and 2 * begin >= Path(self.translate_path(self.path)).stat().st_size:
            self.send_error(500)
        else:
            super().do_GET()


@contextmanager
def served(folder: Path, handler: type[Quiet], port: int = 0) -> Iterator[str]:
    """The URL of a web server over a folder."""
    with ThreadingHTTPServer(("127.0.0.1", port), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_parts_keep_their_names_when_shards_come(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, giant=samples(*range(40)))
    launch(output, source)
    before = set(runs.committed(make(output)))
    put(tmp_path, another=samples(*range(40)))
    report = launch(output, source, part_bytes=10_000)
    assert (report.units_kept, report.units_written) == (20, 8)
    assert before < runs.committed(make(output))
    assert rows(output) == whole(source, tmp_path)


def test_misread_parts_are_withdrawn_and_the_second_run_is_whole(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, fooling=FOOLING, plain=samples(*range(40)))
    expected = whole(source, tmp_path)
    first = launch(output, source)
    assert first.units_failed > 0
    assert first.tally.rows == len(rows(output))
    reason = next(iter(first.failed.values()))
    assert "fooling.tar: the part from byte" in reason
    assert "the same command again reads it" in reason
    assert f"{first.units_failed} FAILED" in "".join(status(output))
    second = launch(output, source)
    assert second.units_failed == 0
    assert rows(output) == expected
    assert second.tally.samples == len(expected)
    assert list(Store(output).list("failures")) == []
    before = files(output)
    assert launch(output, source).units_written == 0
    assert files(output) == before


def status(output: str) -> Iterator[str]:
    from mmbeam.report.status import status_text

    return status_text(output)


def test_a_part_that_truly_holds_nothing_is_read_as_such(output: str, tmp_path: Path) -> None:
    """What stands behind an end mark is no part of the tar, though a part that begins there finds samples in it."""
    source = put(tmp_path, two_in_one=samples(*range(10)) + bytes(1024) + samples(*range(20, 60)))
    launch(output, source)
    assert launch(output, source).units_failed == 0
    assert [key for _, (key, *_) in rows(output)] == [f"{number:04d}" for number in range(10)]


def test_the_oddities_of_a_shard_are_counted_once(output: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(samples(*range(40)))
    assert launch(output, str(tmp_path)).tally.warnings == {"shards without an end-of-archive marker": 1}


def test_a_truncated_giant_loses_its_last_sample_only(output: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(samples(*range(40))[:-700])
    report = launch(output, str(tmp_path))
    assert (report.units_failed, report.tally.samples) == (0, 40)
    assert report.tally.failures == {"read: DecodeError": 1}


def test_a_member_larger_than_parts_leaves_them_empty(output: str, tmp_path: Path) -> None:
    giant = member_bytes("0001.mp4", random.Random(0).randbytes(50_000))
    source = put(tmp_path, x=samples(0) + giant + samples(1, 2, 3))
    report = launch(output, source)
    assert report.units_failed == 0
    assert [key for _, (key, *_) in rows(output)] == ["0000", "0001", "0002", "0003"]
    assert report.tally.present == {"text": 4}


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_is_whole_after_two_runs(seed: int, output: str, tmp_path: Path) -> None:
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


# Killed, overtaken, unreadable


class Killed(BaseException):
    """The end of a process, as far as its store can see."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process end just before the change of the store numbered half of `step`, or if that is odd just after."""
    left = step

    def dying(name: str) -> Any:
        change = getattr(Store, name)

        def changed(*args: Any, **named: Any) -> Any:
            nonlocal left
            left -= 2
            if left < -1:
                raise Killed
            change(*args, **named)
            if left == -1:
                raise Killed

        return changed

    for name in ("create", "replace", "remove"):
        monkeypatch.setattr(Store, name, dying(name))


@pytest.mark.parametrize("before", ["the summary", "the second launch", "a launch that withdraws"])
def test_killed_at_any_step_nothing_is_lost_or_doubled(before: str, tmp_path: Path) -> None:
    source = put(tmp_path, fooling=samples(*range(3)) + nested(3, 5) + nested(4, 5) + samples(5))
    expected = whole(source, tmp_path)
    template = fresh_output("local", tmp_path)
    commit_all(template, source)
    if before == "the second launch":
        assert launch(template, source).units_failed > 0
    elif before == "a launch that withdraws":
        survive(template, source, step=1, again=0)  # the plan is corrected, and nothing is removed yet
    launches = []
    for step in range(1000):
        output = fresh_output("local", tmp_path)
        shutil.copytree(template, output)
        needed = survive(output, source, step)
        if needed is None:
            break
        launches.append(needed)
        assert rows(output) == expected, step
    assert len(launches) > 12
    assert max(launches) == (2 if before == "the summary" else 1)


def commit_all(output: str, source: str) -> None:
    """A launch that did not come to its summary."""
    run = make(output)
    runs.open_run(run)
    for unit in runs.extend_plan(run, list_shards([source]), unit_bytes=PART):
        attempt(run, unit)


def survive(output: str, source: str, step: int, again: int = 9) -> int | None:
    """How many more launches it takes when one is killed at `step`; None if that comes to its end."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        try:
            launch(output, source)
        except Killed:
            pass
        else:
            return None
    return next((number for number in range(1, again + 1) if not launch(output, source).units_failed), again)


def test_a_process_killed_while_it_withdraws(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, fooling=FOOLING)
    process = start(launch_and_die, output, source)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    invented = len(rows(output))
    assert launch(output, source).units_failed == 0
    assert rows(output) == whole(source, tmp_path)
    assert invented != len(rows(output))


def launch_and_die(output: str, source: str) -> None:
    parts.LOOK_BACK = 512
    remove = Store.remove

    def dying(store: Store, name: str) -> None:
        if name.startswith("_mmbeam/commits"):
            os.kill(os.getpid(), signal.SIGKILL)
        remove(store, name)

    Store.remove = dying  # type: ignore[method-assign]
    launch(output, source)


def test_an_attempt_that_comes_too_late_is_withdrawn_again(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, fooling=FOOLING)
    run = make(output)
    runs.open_run(run)
    planned = {unit.id: unit for unit in runs.extend_plan(run, list_shards([source]), unit_bytes=PART)}
    failed = launch(output, source).failed
    for unit in failed:
        attempt(run, planned[unit])  # as it was planned at first
    assert launch(output, source).units_failed == 0
    assert rows(output) == whole(source, tmp_path)


def test_a_part_read_anew_by_another_launch_is_not_removed(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, fooling=FOOLING)
    run = make(output)
    runs.open_run(run)
    reports = [attempt(run, unit) for unit in runs.extend_plan(run, list_shards([source]), unit_bytes=PART)]
    runs.write_summary(run, reports, 1.0)
    assert launch(output, source).units_failed == 0
    assert runs.write_summary(run, reports, 1.0).units_failed > 0  # a launch that was slow: its reports are old
    assert launch(output, source).units_written == 0
    assert rows(output) == whole(source, tmp_path)


def test_nothing_is_judged_behind_a_part_that_failed(output: str, tmp_path: Path) -> None:
    source = put(tmp_path, plain=samples(*range(40)))
    run = make(output)
    runs.open_run(run)
    planned = runs.extend_plan(run, list_shards([source]), unit_bytes=PART)
    reports = [attempt(run, unit) for unit in planned[:3]]
    reports += [runs.report_failed_unit(run, planned[3], "connection lost")]
    reports += [attempt(run, unit) for unit in planned[4:]]
    assert runs.write_summary(run, reports, 1.0).failed == {planned[3].id: "connection lost"}
    report = launch(output, source)
    assert (report.units_written, report.units_failed) == (1, 0)


def test_a_shard_that_cannot_be_followed_is_left_to_its_units(output: str, tmp_path: Path, monkeypatch: Any) -> None:
    source = put(tmp_path, fooling=FOOLING)
    run = make(output)
    launch(output, source)
    shards = list_shards([source])
    monkeypatch.setattr("mmbeam.readers.stream.RETRY_WAITS", ())
    (tmp_path / "fooling.tar").rename(tmp_path / "gone")
    assert len(runs.extend_plan(run, shards, unit_bytes=PART)) > 5
    (tmp_path / "gone").rename(tmp_path / "fooling.tar")
    launch(output, source)
    assert launch(output, source).units_failed == 0
    assert rows(output) == whole(source, tmp_path)


# Packs of tiny shards


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "LEAST_UNITS", 2)


def tiny(folder: Path) -> str:
    return put(folder, **{f"tiny-{number}": samples(number) for number in range(8)})


@pytest.mark.usefixtures("packing")
def test_tiny_shards_share_a_unit(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    report = launch(output, source, part_bytes=100_000)
    assert report.units_written == 2
    assert rows(output) == whole(source, tmp_path)


@pytest.mark.usefixtures("packing")
def test_a_bad_shard_costs_its_pack_nothing_and_is_tried_alone(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    bad, good = tmp_path / "tiny-2.tar", (tmp_path / "tiny-2.tar").read_bytes()
    bad.write_bytes(b"<html>not found</html>".ljust(len(good)))
    first = launch(output, source, part_bytes=100_000)
    assert (first.units_written, first.units_failed) == (2, 1)
    assert "tiny-2.tar: is no tar" in first.failed[f"tiny-2-{next(iter(first.failed))[-10:]}"]
    assert len(rows(output)) == 7
    second = launch(output, source, part_bytes=100_000)
    assert (second.units_kept, second.units_failed) == (2, 1)
    assert second.failed == first.failed
    bad.write_bytes(good)
    third = launch(output, source, part_bytes=100_000)
    assert (third.units_kept, third.units_written, third.units_failed) == (2, 1, 0)
    assert rows(output) == whole(source, tmp_path)
    assert list(Store(output).list("failures")) == []


@pytest.mark.usefixtures("packing")
def test_a_shard_that_breaks_off_is_parted_from_its_pack(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of it cannot be taken back from a unit that is under way, so the pack is read again without it."""
    folder = put(tmp_path, **{f"tiny-{number}": samples(2 * number, 2 * number + 1) for number in range(8)})
    monkeypatch.setattr("mmbeam.readers.windows.open_shard", partial(open_shard, waits=()))
    monkeypatch.setattr("mmbeam.readers.stream.BLOCK_BYTES", 512)
    monkeypatch.setattr("mmbeam.readers.stream.READ_BYTES", 512)
    with served(tmp_path, BreaksOff) as url:
        source = f"{url}/tiny-{{0..7}}.tar"
        first = launch(output, source, part_bytes=100_000)
        assert (first.units_written, first.units_failed) == (1, 2)  # the pack, and what broke off in it
        second = launch(output, source, part_bytes=100_000)
        assert (second.units_kept, second.units_written, second.units_failed) == (1, 1, 1)
        assert rows(output) == [row for row in whole(folder, tmp_path) if row[0] != "tiny-2.tar"]
        third = launch(output, source, part_bytes=100_000)
        assert (third.units_kept, third.failed) == (2, second.failed)
    monkeypatch.setattr(BreaksOff, "broken", "")
    with served(tmp_path, BreaksOff, int(url.rpartition(":")[2])):
        assert launch(output, source, part_bytes=100_000).units_failed == 0
    assert rows(output) == whole(folder, tmp_path)
    assert list(Store(output).list("failures")) == []


@pytest.mark.usefixtures("packing")
def test_a_pack_done_again_leaves_its_bad_shard_to_the_unit_of_its_own(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    bad, good = tmp_path / "tiny-2.tar", (tmp_path / "tiny-2.tar").read_bytes()
    bad.write_bytes(b"x" * len(good))
    run = make(output)
    launch(output, source, part_bytes=100_000)
    bad.write_bytes(good)
    again = [replace(unit, replace=True) for unit in runs.extend_plan(run, list_shards([source]))]
    report = runs.write_summary(run, [attempt(run, unit) for unit in again], 1.0)
    assert report.units_failed == 0
    assert rows(output) == whole(source, tmp_path)


@pytest.mark.usefixtures("packing")
def test_a_bad_shard_that_is_taken_away_is_forgotten(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    bad = tmp_path / "tiny-2.tar"
    bad.write_bytes(b"x" * bad.stat().st_size)
    assert launch(output, source, part_bytes=100_000).units_failed == 1
    bad.unlink()
    report = launch(output, source, part_bytes=100_000)
    assert (report.units_kept, report.units_failed) == (2, 0)
    assert rows(output) == whole(source, tmp_path)


@pytest.mark.usefixtures("packing")
def test_a_pack_runs_although_one_of_its_shards_was_taken_away(output: str, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    run = make(output)
    runs.open_run(run)
    runs.extend_plan(run, list_shards([source]), unit_bytes=100_000)
    (tmp_path / "tiny-2.tar").unlink()
    first = launch(output, source)
    assert first.units_failed == 1
    assert rows(output) == whole(source, tmp_path)
    assert launch(output, source).units_failed == 0
