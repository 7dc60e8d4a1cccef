"""Units on several devices of one process, and one device for each of several processes.

On a CPU the devices are cpu:0, cpu:1 and cpu:2, each with its thread and models. On a machine with GPUs the tests run
on these too.
"""

import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from apache_beam.options.pipeline_options import DirectOptions
from hypothesis import given
from hypothesis import strategies as st
from known import Known, assert_same, counts, options, read_parts

from mmbeam import process
from mmbeam.errors import DeviceError, UsageError
from mmbeam.jobs.embed import embed, prepare
from mmbeam.jobs.options import device_of, pipeline_options
from mmbeam.models import placement
from mmbeam.stages.embed import EmbedStage
from mmbeam.transforms.run_stage import RunStage
from mmbeam.types import Batch

SEVERAL = {"cpu": ("cpu:0", "cpu:1", "cpu:2"), "cuda": tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))}


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Drop loaded models and leases before and after the test."""
    process.reset()
    yield
    process.reset()


class Seen:
    """Record the devices that a job uses. The first window on each waits until every device has one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
        self.loads: Counter[str] = Counter()
        self.devices: dict[str, set[str]] = defaultdict(set)  # by unit
        self.meeting = threading.Barrier(devices, timeout=60)
        self._real_load, self._real_run = EmbedStage.load, EmbedStage.run
        monkeypatch.setattr(EmbedStage, "load", lambda stage: self._load(stage))
        monkeypatch.setattr(EmbedStage, "run", lambda stage, model, batch: self._run(stage, model, batch))

    def _load(self, stage: EmbedStage) -> Any:
        self.loads[stage.device] += 1
        self.meeting.wait()
        return self._real_load(stage)

    def _run(self, stage: EmbedStage, model: Any, batch: Batch) -> Batch:
        self.devices[batch.unit.id].add(stage.device)
        return self._real_run(stage, model, batch)


def test_units_are_spread_over_all_devices_and_the_model_is_loaded_once_on_each(
    known: Known, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SEVERAL[device.type]
    placement.use_devices(names)
    seen = Seen(monkeypatch, len(names))
    report = embed(options(known.root, tmp_path, device=device.type, dtype="float32"))
    assert seen.loads == dict.fromkeys(names, 1)
    assert len(seen.devices) == 5
    assert all(len(used) == 1 for used in seen.devices.values())  # a unit stays on its device
    assert not placement._leases
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)
    computed = report.tally.seconds["compute"]
    assert report.model_utilisation == pytest.approx(computed / (report.wall_seconds * len(names)))


def test_each_device_has_two_concurrent_units_unless_a_beam_option_says_otherwise() -> None:
    def threads(*args: str) -> int:
        return int(pipeline_options(args, devices=3).view_as(DirectOptions).direct_num_workers)

    assert (threads(), threads("--direct_num_workers=4")) == (6, 4)


def test_a_job_records_the_kind_of_several_devices_and_the_name_of_one(known: Known, tmp_path: Path) -> None:
    job = options(known.root, tmp_path)
    assert device_of(job) == "cpu"
    placement.use_devices(("cpu:2",))
    assert device_of(job) == "cpu:2"
    placement.use_devices(("cpu:0", "cpu:1"))
    assert device_of(job) == "cpu"
    assert placement.devices_of("cpu:1") == ("cpu:1",)


def test_an_absent_device_cannot_be_leased() -> None:
    with pytest.raises(DeviceError, match="this machine has"):
        placement.lease_device("cuda:99", "unit")
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        placement.devices_of("gpu")


@given(st.lists(st.integers(0, 9)), st.integers(1, 4))
def test_a_unit_leases_the_least_busy_device_and_keeps_it(events: list[int], number: int) -> None:
    """Each event is a unit that begins, or that ends if it has begun."""
    placement.use_devices(tuple(f"cpu:{i}" for i in range(number)))
    held: dict[str, str] = {}
    for event in events:
        unit = f"unit-{event}"
        if unit in held and event % 2:
            assert placement.lease_device("cpu", unit).name == held[unit]
        if unit in held:
            placement.release_device("cpu", unit)
            del held[unit]
            continue
        busy = Counter(held.values())
        held[unit] = placement.lease_device("cpu", unit).name
        assert busy[held[unit]] == min(busy[f"cpu:{i}"] for i in range(number))
    for unit in held:
        placement.release_device("cpu", unit)
    assert not placement._leases


def test_an_abandoned_unit_releases_its_device(known: Known, tmp_path: Path) -> None:
    """A later step fails, and the runner drops the bundle in the middle of a unit."""
    placement.use_devices(("cpu:0", "cpu:1"))
    job = prepare(options(known.root, tmp_path))
    read, model = job.steps()[:2]
    assert isinstance(model, RunStage)
    with closing(cast(Generator[Batch], read.process(job.units[0]))) as batches:
        window = cast(Generator[Batch], model.process(next(batches)))
        next(window)
        assert len(placement._leases) == 1
        window.close()
    assert not placement._leases


# One device for each process


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_claims_an_unclaimed_device_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "gpu-a.0")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert placement.claim_least_used(["gpu-a", "gpu-b"], tmp_path) == 1
        other.kill()
        other.communicate()
    assert placement.claim_least_used(["gpu-a", "gpu-b"], tmp_path) == 0


def test_more_processes_than_devices_share_them_evenly_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = [placement.claim_least_used(["gpu-a", "gpu-b"], tmp_path) for _ in range(5)]
    assert taken == [0, 1, 0, 1, 0]
    assert [record.message for record in caplog.records if "gpu-a" in record.message] == [
        "gpu-a has 2 processes: more worker processes than devices",
        "gpu-a has 3 processes: more worker processes than devices",
    ]


def test_a_directory_of_locks_of_another_user_is_an_error(tmp_path: Path) -> None:
    """Any user can create it in /tmp, with links in it to our files."""
    (tmp_path / "target").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "target")
    with pytest.raises(DeviceError, match="locks: expected a directory of this user"):
        placement.claim_least_used(["gpu-a"], tmp_path / "locks")
    assert not list((tmp_path / "target").iterdir())


WORKER = """
import sys
from pathlib import Path
from mmbeam.models import placement
from mmbeam.stages.embed import embed_stage
from mmbeam.transforms.run_stage import RunStage
if sys.argv[3] != "cuda":
    placement.use_devices(("cpu:0", "cpu:1"))
step = RunStage(embed_stage(sys.argv[1], device=sys.argv[3]))
if sys.argv[4] == "worker":
    step.launcher = ("another host", 1)
step.setup()
Path(sys.argv[2]).write_text(" ".join(placement.devices_of(sys.argv[3])))
print("set up", file=sys.stderr, flush=True)
sys.stdin.read()
"""


def test_each_worker_process_of_a_runner_claims_one_device(known: Known, device: torch.device, tmp_path: Path) -> None:
    """The step claims it in its setup; the launcher's own process keeps all devices."""
    number = len(SEVERAL[device.type]) if device.type == "cuda" else 2
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with ExitStack() as started:
        devices_of_process = []
        for index, role in enumerate([*["worker"] * number, "launcher"]):
            where = tmp_path / f"{index}"
            command = [sys.executable, "-W", "ignore", "-c", WORKER, str(known.root / "clip"), str(where)]
            process = started.enter_context(
                subprocess.Popen(
                    [*command, device.type, role], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
            started.callback(process.kill)
            assert process.stderr is not None
            assert any(b"set up" in line for line in process.stderr)
            devices_of_process.append(where.read_text().split())
    assert [len(devices) for devices in devices_of_process] == [*[1] * number, number]
    assert len({devices[0] for devices in devices_of_process[:-1]}) == number
