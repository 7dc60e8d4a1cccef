"""docs/scale.md: its model against a simulated fleet, its requests against a store's, and its run with few units.

The run with 100,000 units is `python bench/scale.py`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import gcsfs.core
import pytest
import servers

from mmbeam.readers.stream import BLOCK_BYTES, open_shard
from mmbeam.runs.commits import committed
from mmbeam.runs.plan import extend_plan
from mmbeam.runs.run import Run, open_run
from mmbeam.types import Batch, Shard, UnitReport, WorkUnit

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import scale  # noqa: E402
import scale_model  # noqa: E402
from scale_model import COMMIT, JOBS, KEPT, LAUNCH, LOOK, OPEN, Job, Requests, simulate, simulate_restarts  # noqa: E402

UNITS = 60
FLEETS = {
    "50 workers, losses": Job(workers=50, losses_per_hour=0.5),
    "slow, losses": Job(rate=100, losses_per_hour=0.2),
    "even units": Job(spread=0.1),
    "uneven units": Job(spread=1.0),
}


# On paper


def test_the_document_shows_the_models_table() -> None:
    assert scale_model.table() in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("job", [*FLEETS.values(), *JOBS.values()], ids=[*FLEETS.keys(), *JOBS.keys()])
def test_the_fleet_takes_as_long_as_the_model_says(job: Job) -> None:
    for dealt, seconds in ((False, job.seconds), (True, job.dealt_seconds)):
        fleet = simulate(job, dealt)
        assert fleet.seconds >= job.start_seconds + job.ideal_seconds * 0.98
        assert fleet.seconds == pytest.approx(seconds, rel=0.05)
        share = fleet.lost_seconds / (job.ideal_seconds * job.workers * job.at_once)
        assert share == pytest.approx(job.lost_share, abs=0.01)


@pytest.mark.parametrize(("rate", "losses"), [(1_000, 0.05), (1_000, 0.2), (100, 0.05)])
def test_restarts_of_the_whole_job_cost_as_much_as_the_model_says(rate: float, losses: float) -> None:
    job = Job(workers=50, rate=rate, losses_per_hour=losses)
    assert 0.02 < job.restart_share < 0.4
    assert simulate_restarts(job).seconds == pytest.approx(job.restarted_seconds, rel=0.1)


def test_above_that_share_the_model_says_too_little() -> None:
    """What the document warns of: units that take longer than the job lives hardly ever end."""
    job = JOBS["caption, 20/s, losses"]
    assert job.restart_share > 0.9
    assert simulate_restarts(job).seconds > 5 * job.restarted_seconds


# Requests, counted at the GCS server of this machine

needs_gcs = pytest.mark.skipif("gcs" not in servers.STORES, reason=servers.report_header())


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Requests]]:
    """What is asked of GCS inside: one Requests for each that is billed."""
    real = gcsfs.core.GCSFileSystem._request
    found: list[Requests] = []

    async def counting(self: Any, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        is_listing = method == "GET" and path.endswith("/o")
        if method != "DELETE":
            found.append(Requests(writes=1) if is_listing or method in ("POST", "PUT") else Requests(reads=1))
        return await real(self, method, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(gcsfs.core.GCSFileSystem, "_request", counting)
        yield found


def assert_within(found: list[Requests], most: Requests) -> None:
    """As many as the model says, but for those by which gcsfs looks for files: of them it may make fewer."""
    total = sum(found, Requests())
    assert most.writes / 2 <= total.writes <= most.writes
    assert most.reads / 2 <= total.reads <= most.reads


@needs_gcs
def test_the_requests_of_a_run_and_of_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scale.make_run(servers.fresh_output("gcs", tmp_path))
    shards = [Shard(path=f"gs://b/{number}.tar", url=f"gs://b/{number}.tar", size=10) for number in range(3)]
    with counted(monkeypatch) as found:
        open_run(run)
        units = extend_plan(run, shards)
    assert_within(found, LAUNCH)
    for status, each in (("written", LOOK + COMMIT), ("kept", LOOK + KEPT)):
        with counted(monkeypatch) as found:
            assert [report.status for report in run_units(run, units)] == [status] * 3
        assert_within(found, each * 3)
    resumed = scale_model.requests_of_resume(Job(units=3))
    assert resumed == LAUNCH + scale_model.listing(3) * 2 + (LOOK + KEPT) * 3
    with counted(monkeypatch) as found:
        assert len(committed(run)) == 3
    assert_within(found, scale_model.listing(3))


def run_units(run: Run, units: list[WorkUnit]) -> list[UnitReport]:
    """The steps' functions, as a worker calls them."""
    reader, writer = scale.read_nothing(run), scale.WriteParquet(run).dofn
    batches: Iterator[Batch] = (batch for unit in units for batch in reader.process(unit))
    return [report for batch in batches for report in writer.process(batch)]


@needs_gcs
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # how gcsfs uploads the shard
def test_the_requests_of_reading_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 20_000_000
    url = f"{servers.fresh_output('gcs', tmp_path)}/a.tar"
    (tmp_path / "a.tar").write_bytes(os.urandom(size))
    fsspec.filesystem("gs").put_file(str(tmp_path / "a.tar"), url)
    with counted(monkeypatch) as found, open_shard(Shard(path=url, url=url, size=size)) as stream:
        while stream.read(1 << 20):
            pass
    blocks = Requests(reads=-(-size // BLOCK_BYTES))
    assert sum(found, Requests()).reads >= blocks.reads
    assert sum(found, Requests()).writes <= OPEN.writes
    assert sum(found, Requests()).reads <= (OPEN + blocks).reads


# In fact, with few units


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed when half of its units were written."""
    directory = tmp_path_factory.mktemp("scale")
    scale.make_shards(directory / "shards", UNITS)
    assert scale.in_a_process("write", directory, UNITS // 2) is None
    return directory


def test_a_killed_run_goes_on_where_it_was(directory: Path) -> None:
    before = scale.written(directory)
    assert UNITS // 2 - 2 <= len(before) <= UNITS // 2
    found = scale.step_write(directory)
    assert (found["kept"], found["written"]) == (len(before), UNITS - len(before))
    after = scale.written(directory)
    assert before.items() <= after.items()
    assert len(after) == UNITS
    again = scale.step_write(directory)
    assert (again["kept"], again["written"]) == (UNITS, 0)
    assert scale.written(directory) == after
    assert scale.step_reports(directory)["gathered_mb"] < 1e-3 * UNITS  # a kilobyte each


def test_the_plan_and_the_description_stay_small(directory: Path, tmp_path: Path) -> None:
    found = scale.step_plan(directory)
    assert found["units"] == UNITS
    scale.make_shards(tmp_path / "shards", 10 * UNITS)
    more = scale.step_plan(tmp_path)
    grown = (more["description_mb"] - found["description_mb"]) * 1e6 / (more["units"] - found["units"])
    assert grown < 60  # bytes for each unit
