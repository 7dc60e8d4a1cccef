"""The progress line with and without a terminal, the summary, the status, and `inspect`."""

import fcntl
import io
import json
import os
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import shards
from outputs import make_run, make_unit, write_unit
from servers import STORES, fresh_output

from mmbeam.cli import main
from mmbeam.config import FieldMap
from mmbeam.errors import JobError
from mmbeam.process import Progress, progress
from mmbeam.report import progress as module
from mmbeam.report.inspect import inspect, inspect_text
from mmbeam.report.progress import Committed, ProgressLine, clock, progress_line
from mmbeam.report.status import read_status, status_text
from mmbeam.report.summary import summary_text
from mmbeam.runs.attempts import attempt
from mmbeam.runs.commits import Totals, load_reports, report_failed_unit
from mmbeam.runs.control import clear_stop, stop_run
from mmbeam.runs.plan import extend_plan
from mmbeam.runs.run import Run, find_run, open_run, part_name
from mmbeam.runs.store import Store
from mmbeam.runs.summary import read_summary, write_summary
from mmbeam.types import RunReport, Shard, Tally, UnitReport


def unit(samples: int, status: Any = "written", name: str = "a") -> UnitReport:
    return UnitReport(unit=name, status=status, tally=Tally(samples=samples, rows=samples))


# Counters


class Clock:
    """Replaces time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(module.time, "monotonic", ticking)
    return ticking


def test_the_rate_is_that_of_the_last_half_minute(ticking: Clock) -> None:
    seen = Progress()
    seen.start(10)
    for _ in range(60):  # a minute at 100 per second, then a minute at 10
        ticking.now += 1
        seen.add(Tally(samples=100))
        progress_line(seen)
    assert "6,000 samples  100/s" in progress_line(seen)
    for _ in range(60):
        ticking.now += 1
        seen.add(Tally(samples=10))
        progress_line(seen)
    assert "6,600 samples  10/s" in progress_line(seen)


def test_the_remaining_time_is_estimated_from_finished_units(ticking: Clock) -> None:
    seen = Progress()
    seen.start(5)
    assert "left" not in progress_line(seen)
    seen.unit_done(unit(50, "kept"))  # costs no time
    ticking.now += 10
    seen.add(Tally(samples=100))
    seen.unit_done(unit(50))
    assert progress_line(seen) == "2/5 units  150 samples  10/s  10s left"  # 5 x 50, less 150, at 10 per second
    seen.unit_done(unit(0, "failed"))
    assert progress_line(seen) == "3/5 units  150 samples  10/s  1 units FAILED  5s left"
    seen.add(Tally(samples=100, failed=3))
    for _ in range(2):
        seen.unit_done(unit(50))
    assert progress_line(seen) == "5/5 units  250 samples  20/s  3 samples failed  1 units FAILED"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (200, "3m20s"), (7530, "2h05m")])
def test_durations_are_formatted_for_people(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_commits_of_workers_on_other_machines_are_counted(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    write_unit(run, make_unit("a-1")).commit()
    seen = Committed(find_run(str(tmp_path / "out")), 3)
    seen.update()
    assert (seen.progress.units_done, seen.progress.kept.samples, seen.progress.tally.samples) == (1, 10, 0)
    write_unit(run, make_unit("a-2")).commit()
    seen.update()
    seen.update()
    assert (seen.progress.units_done, seen.progress.kept.samples, seen.progress.tally.samples) == (2, 10, 10)
    assert progress_line(seen.progress).startswith("2/3 units  20 samples")


# The line


@pytest.fixture(autouse=True)
def fresh_progress() -> Iterator[None]:
    progress.start(0)
    yield
    progress.start(0)


class Terminal:
    """A pseudo-terminal of 40 columns, and the text that it shows."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self.seen = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            while chunk := os.read(self.master, 4096):
                self.seen += chunk.decode()
        except OSError:  # closed on the other side
            return

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + 10
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            time.sleep(0.005)

    def close(self) -> None:
        self.stream.close()
        self._thread.join()
        os.close(self.master)


def test_a_terminal_shows_one_line_that_is_rewritten_and_removed() -> None:
    terminal = Terminal()
    with ProgressLine("nowhere", terminal.stream, seconds=0.01):
        terminal.wait_for("starting")
        progress.start(4)
        progress.add(Tally(samples=1234, failed=56))
        progress.unit_done(unit(1234))
        terminal.wait_for("1/4 units  1,234 samples")
    terminal.close()
    lines = terminal.seen.split("\r\x1b[K")
    assert "\n" not in terminal.seen
    assert (lines[0], lines[-1]) == ("", "")
    assert max(map(len, lines)) == 39  # truncated: a wrapped line cannot be rewritten


def test_without_a_terminal_progress_is_plain_lines_and_a_short_job_has_none() -> None:
    stream = io.StringIO()
    progress.start(2)
    progress.add(Tally(samples=5))
    with ProgressLine("nowhere", stream):
        time.sleep(0.05)
    assert stream.getvalue() == ""
    assert ProgressLine("nowhere", stream)._seconds == 10
    with ProgressLine("nowhere", stream, seconds=0.01):
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert len(lines) > 1
    assert all(line.partition("  ")[2].startswith("0/2 units  5 samples") for line in lines)
    assert all(datetime.fromisoformat(line.partition("  ")[0]).tzinfo for line in lines)


def test_progress_is_read_from_the_commits_if_this_process_has_no_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    run = make_run(str(tmp_path / "out"))
    terminal = Terminal()
    with ProgressLine(str(tmp_path / "out"), terminal.stream, seconds=0.01):
        progress.start(2)  # before the output exists
        terminal.wait_for("0/2 units")
        open_run(run)
        write_unit(run, make_unit("a-1")).commit()
        terminal.wait_for("1/2 units  10 samples")
        progress.add(Tally(samples=7))
        terminal.wait_for("0/2 units  7 samples")
    terminal.close()


def test_polling_takes_at_most_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store bills every page of a listing; 100,000 units are 100 pages."""
    looks: list[float] = []

    class Slow(Committed):
        def update(self) -> None:
            looks.append(time.monotonic())
            time.sleep(0.05)

    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "Committed", Slow)
    open_run(make_run(str(tmp_path / "out")))
    progress.start(2)
    with ProgressLine(str(tmp_path / "out"), io.StringIO(), seconds=0.01):
        time.sleep(1)
    assert len(looks) == 1


# The summary


def test_the_summary_names_counts_failures_and_paths(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    reports = [write_unit(run, make_unit(f"a-{number}")).commit() for number in range(2)]
    reports += [
        report_failed_unit(run, make_unit(f"b-{number}"), f"b-{number}.tar: is not a tar") for number in range(7)
    ]
    extra = Tally(samples=3, skipped={"image_width >= 64": 3}, repeated_keys=2, seconds={"compute": 3, "read_wait": 1})
    reports[0] = replace(reports[0], tally=reports[0].tally + extra)
    text = summary_text(write_summary(run, Totals.of(reports), wall_seconds=4.0), str(tmp_path / "out"))
    assert text.splitlines()[:4] == [
        "units: 2 written, 7 FAILED",
        "samples: 23 = 20 rows + 3 skipped (image_width >= 64); 4 rows lack some of their outputs",
        "outputs: 16 image_embedding, 16 text_embedding",
        "time: 4.0s, 5.8 samples/s, model utilisation 75%",
    ]
    assert "time per unit: model 7" in text
    assert "2 samples repeat a key of their shard" in text
    assert "failures: 4 decode: DecodeError, for example 00000 of /shards/a-0.tar: truncated JPEG" in text
    assert f"failure records: {tmp_path}/out/_failures/" in text
    assert "FAILED unit b-4: b-4.tar: is not a tar\nFAILED: 2 more units" in text
    assert "Run the same command again" in text
    assert text.endswith(f"rows: {tmp_path}/out/data/")


def test_the_summary_of_a_finished_run_is_short(tmp_path: Path) -> None:
    report = RunReport(
        units_written=0,
        units_kept=4,
        units_failed=0,
        tally=Tally(samples=8, rows=8, outputs={"image_embedding": 8}),
        wall_seconds=0.0,
        rate=0.0,
        model_utilisation=0.0,
    )
    assert summary_text(report, "memory://out/").splitlines() == [
        "units: 0 written, 4 committed by an earlier run",
        "samples: 8 = 8 rows",
        "outputs: 8 image_embedding",
        f"rows: {Store('memory://out/')}/data/",
    ]


def test_a_summary_of_an_unknown_number_of_workers_has_no_utilisation(tmp_path: Path) -> None:
    """Ten GPUs on other machines compute for longer than the job takes."""
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    report = write_summary(run, Totals.of([write_unit(run, make_unit("a-1")).commit()]), 2.0, devices=None)
    assert report == read_summary(run)
    extra = Tally(seconds={"compute": 75})
    text = "".join(summary_text(replace(report, tally=report.tally + extra), "memory://out/"))
    assert "5.0 samples/s, model time of all workers 1m15s" in text
    assert "model utilisation" not in text


# The status


@pytest.fixture(params=STORES)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return fresh_output(request.param, tmp_path)


def planned_run(output: str, units: int) -> tuple[Run, list[Any]]:
    run = make_run(output, dtype="float32", modalities={"clip": ["image", "text"]})
    open_run(run)
    paths = [f"/shards/{number}.tar" for number in range(units)]
    return run, extend_plan(run, [Shard(path=path, url=path, size=1 << 20, etag="e") for path in paths])


def test_status_tells_how_far_a_run_is_on_any_store(output: str) -> None:
    run, units = planned_run(output, 4)
    assert "units: 4 planned, 0 committed, 4 to do" in list(status_text(output))
    write_unit(run, units[0]).commit()
    report_failed_unit(run, units[1], "1.tar: is not a tar")
    before = listing(run)
    text = "\n".join(status_text(output))
    assert f"run: {run.store}, fingerprint {run.fingerprint}\ntask: embed, float32 on cpu" in text
    assert "units: 4 planned, 1 committed, 1 FAILED, 2 to do" in text
    assert "samples: 10 = 10 rows; 2 rows lack some of their outputs" in text
    assert f"FAILED unit {units[1].id}: 1.tar: is not a tar" in text
    assert "No process is known to work on it. To resume it, run the same command again" in text
    with attempt(run.store, units[2].id, part_name(units[2].id)):
        text = "\n".join(status_text(output))
        assert f"at work on {socket.gethostname()} (process {os.getpid()}): unit {units[2].id}, last sign of" in text
        assert "No process" not in text
        (working,) = read_status(output).to_json()["attempts"]
        assert (working["unit"], working["is_alive"]) == (units[2].id, True)
    stop_run(run, "too many failures")
    text = "\n".join(status_text(output))
    assert text.endswith("STOPPED: too many failures")
    clear_stop(run)
    assert listing(run) == before  # status writes nothing
    for unit in units[1:]:
        write_unit(run, unit).commit()
    text = "\n".join(status_text(output))
    assert "units: 4 planned, 4 committed\n" in text
    assert "FAILED" not in text
    write_summary(run, Totals.of(load_reports(run, [unit.id for unit in units])), 75.0)
    assert re.search(r"^ended: \d{4}-\d\d-\d\d .*, took 1m15s$", "\n".join(status_text(output)), re.MULTILINE)


def test_status_as_json_and_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, units = planned_run(str(tmp_path / "out"), 2)
    write_unit(run, units[0]).commit()
    assert main(["status", str(tmp_path / "out"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["planned"], values["committed"], values["left"], values["tally"]["rows"]) == (2, 1, 1, 10)
    write_unit(run, units[1]).commit()
    assert main(["status", str(tmp_path / "out"), "--json", "--watch", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == 0


def listing(run: Run) -> dict[str, dict[str, int]]:
    return {folder: run.store.list(folder) for folder in ("data", "_failures", "_mmbeam", "_mmbeam/commits")}


def test_status_of_a_limited_run_before_its_first_commit(tmp_path: Path) -> None:
    open_run(make_run(str(tmp_path / "out"), limit=8))
    text = "\n".join(status_text(str(tmp_path / "out")))
    assert 'options: "limit": 8' in text
    assert "units: 1 planned, 0 committed, 1 to do" in text


def test_status_of_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="not the output of an mmbeam job"):
        list(status_text(str(tmp_path)))
    assert not list(tmp_path.iterdir())


# Inspect


def test_inspect_describes_the_contents_of_shards(tmp_path: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(4), shards=1)
    text = "\n".join(inspect_text(inspect([str(tmp_path / "in")], FieldMap())))
    assert "keys: 000000, 000001, 000002" in text
    assert "fields of all 4 samples:" in text
    assert "modalities: audio, image, text" in text
    (tmp_path / "in" / "shard-000000.tar").write_bytes(bytes(1024))
    assert list(inspect_text(inspect([str(tmp_path / "in")], FieldMap())))[-1] == "no samples"


def test_inspect_names_each_bad_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = shards.make_webdataset(tmp_path / "in", shards.make_truths(6), shards=3)
    made.paths[0].write_bytes(made.paths[0].read_bytes()[:2000])
    made.paths[1].write_bytes(b"not a tar" * 200)
    paths = [str(tmp_path / "in"), str(tmp_path / "gone.tar")]
    assert main(["inspect", *paths]) == 3
    out = capsys.readouterr().out
    assert f"BAD {made.paths[0]}: cut off at byte 2,000, inside the sample 000000\n" in out
    assert f"BAD {made.paths[1]}: not a tar file" in out
    assert f"BAD {tmp_path}/gone.tar: " in out
    assert main(["inspect", "--json", *paths]) == 3
    contents = json.loads(capsys.readouterr().out)
    assert (len(contents["bad"]), contents["shards"], contents["sampled"]) == (3, 4, 2)
    assert main(["inspect", str(made.paths[2])]) == 0
