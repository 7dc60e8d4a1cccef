"""Jobs in worker processes of this machine (`workers`). The processes alone: test_workers.py."""

import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import shards
from hypothesis import given
from hypothesis import strategies as st
from known import Known, assert_same, counts, options, read_parts
from test_workers import children

from mmbeam import process
from mmbeam.cli import main
from mmbeam.config import Labelling, ModelRef
from mmbeam.errors import UsageError
from mmbeam.jobs.caption import CaptionOptions
from mmbeam.jobs.caption import prepare as prepare_caption
from mmbeam.jobs.embed import EmbedOptions, embed, prepare
from mmbeam.jobs.execute import Job
from mmbeam.jobs.label import LabelOptions, label
from mmbeam.jobs.label import prepare as prepare_label
from mmbeam.jobs.options import check_workers
from mmbeam.jobs.workers import UnitWork, share_cores, share_devices
from mmbeam.process import cores, progress
from mmbeam.runs.summary import read_summary
from mmbeam.stages.embed import EmbedStage
from mmbeam.types import Batch, Tally


def kill_one(started_before: set[int], data: Path) -> None:
    """Kill a worker process once the first units are committed."""
    while len(list(data.glob("*.parquet"))) < 2:
        time.sleep(0.002)
    os.kill(min(children() - started_before), signal.SIGKILL)


def test_a_killed_worker_is_replaced_and_the_same_command_resumes_the_job(known: Known, tmp_path: Path) -> None:
    """The number of processes may change: this process does all units but one, and worker processes the last."""
    shards.make_webdataset(tmp_path / "in", shards.make_truths(20), shards=20)
    job = options(known.root, tmp_path / "out", input=(str(tmp_path / "in"),), workers=2)
    data, before = tmp_path / "out" / "data", children()
    killer = threading.Thread(target=kill_one, args=(before, data))
    killer.start()
    report = embed(job)
    killer.join()
    assert children() == before
    assert (report.units_written + report.units_kept, report.units_failed) == (20, 0)
    assert not list((tmp_path / "out" / "_mmbeam" / "attempts").iterdir())
    job = replace(job, output=str(tmp_path / "resumed"))
    alone = prepare(replace(job, workers=1))
    replace(alone, units=alone.units[:-1]).execute()
    report = embed(job)
    assert (report.units_written, report.units_kept, report.units_failed) == (1, 19, 0)
    assert (progress.units_done, progress.tally.samples, progress.kept.samples) == (20, 1, 19)
    assert read_summary(alone.run) == report
    assert 0 < report.model_utilisation <= 1
    for output in (tmp_path / "out", tmp_path / "resumed"):
        assert not list((output / "_mmbeam" / "tmp").glob("*"))
    other = replace(job, output=str(tmp_path / "alone"), workers=1)
    assert counts(report) == counts(embed(other))
    for output in (tmp_path / "out", tmp_path / "resumed"):
        assert_same(read_parts(output), read_parts(tmp_path / "alone"))


def test_a_finished_run_starts_no_process(known: Known, tmp_path: Path) -> None:
    job = options(known.root, tmp_path)
    embed(job)
    report = embed(replace(job, workers=2))
    assert (report.units_kept, counts(report)) == (5, counts(known.report))


def in_this_process(job: EmbedOptions | CaptionOptions | LabelOptions) -> list[Tally]:
    """Do in this process what a worker process does with every unit of a job; return the counts that it sends."""
    prepared: Job
    if isinstance(job, CaptionOptions):
        prepared = prepare_caption(job)
    else:
        prepared = prepare_label(job) if isinstance(job, LabelOptions) else prepare(job)
    work = pickle.loads(pickle.dumps(UnitWork(replace(prepared, units=()).steps, ("cpu",), 1)))
    sent: list[Tally] = []
    try:
        for unit in prepared.units:
            assert work(unit, sent.append).status == "written"
    finally:
        process.reset()
    return sent


def test_a_worker_process_writes_the_same_rows_and_sends_every_count(known: Known, tmp_path: Path) -> None:
    sent = in_this_process(options(known.root, tmp_path))
    assert_same(read_parts(tmp_path), known.parts)
    assert sum(sent, Tally()).samples == known.report.tally.samples
    assert len(sent) > 5


def test_a_worker_process_uses_its_devices_and_cores_only(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, int]] = []
    run = EmbedStage.run

    def recorded(stage: EmbedStage, model: Any, batch: Batch) -> Batch:
        used.append((stage.device, cores()))
        return run(stage, model, batch)

    monkeypatch.setattr(EmbedStage, "run", recorded)
    job = prepare(options(known.root, tmp_path))
    try:
        UnitWork(replace(job, units=()).steps, ("cpu:1",), 3)(job.units[0], lambda _: None)
    finally:
        process.reset()
    assert set(used) == {("cpu:1", 3)}


def test_worker_processes_write_captions(tmp_path: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(4), shards=2)
    job = CaptionOptions(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), device="cpu")
    assert sum(tally.samples for tally in in_this_process(job)) == 4
    captions = [text for path in (tmp_path / "out" / "data").glob("*.parquet") for text in captions_of(path)]
    assert len(captions) == 4
    assert all(captions)


def test_worker_processes_write_labels(known: Known, tmp_path: Path) -> None:
    job = LabelOptions(
        input=(str(known.root / "in"),),
        output=str(tmp_path / "out"),
        models=(ModelRef(model=str(known.root / "clip")),),
        labelling=Labelling(task="zero-shot", labels=("a cat", "a dog")),
        device="cpu",
        max_failure_rate=1.0,
    )
    assert sum(in_this_process(job), Tally()).samples == known.report.tally.samples
    of_workers = read_parts(tmp_path / "out")
    label(replace(job, output=str(tmp_path / "alone")))
    assert_same(of_workers, read_parts(tmp_path / "alone"))
    assert any(row["labels"] for rows in of_workers.values() for row in rows)


def captions_of(path: Path) -> list[str]:
    captions: list[str] = pq.read_table(path, columns=["caption"])["caption"].to_pylist()
    return captions


# Invalid options


@pytest.mark.parametrize(
    ("beam_args", "message"),
    [
        (["--runner=FlinkRunner", "--flink_master=[local]"], r"--runner=flink use --parallelism .* --sdk_worker_para"),
        (["--runner=DataflowRunner"], "--runner=dataflow use --num_workers and --max_num_workers"),
        (["--runner=FnApiRunner"], r"--direct_num_workers \(units in flight\)"),
        (["--runner=PrismRunner"], "--runner=prism use its own options, or leave --runner out"),
        (["--direct_num_workers=3"], "mutually exclusive"),
        (["--no_wait_until_finish"], "must wait"),
    ],
)
def test_workers_exclude_other_runners(beam_args: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"`workers`.*{message}"):
        check_workers(options(tmp_path, tmp_path, *beam_args, workers=2))
    check_workers(options(tmp_path, tmp_path, *beam_args, workers=1))


def test_a_store_in_memory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="memory://"):
        check_workers(replace(options(tmp_path, tmp_path), output="memory://out", workers=2))


def test_more_workers_than_cores_are_allowed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_workers(options(tmp_path, tmp_path, workers=1000))
    assert "1000 workers: more than the" in caplog.text


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
@pytest.mark.parametrize("command", ["embed", "caption"])
def test_an_invalid_number_of_workers_is_an_error(
    command: str, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--input", "x", "--output", "y", "--workers", workers]) == 2
    assert "--workers: expected a whole number of at least 1" in capsys.readouterr().err
    with pytest.raises(UsageError, match="expected at least 1"):
        check_workers(options(Path(), Path(), workers=0))


# Cores and devices of a process


@given(st.integers(1, 300), st.integers(1, 100))
def test_cores_are_divided_evenly_and_each_process_has_one(count: int, workers: int) -> None:
    shares = share_cores(count, workers)
    assert len(shares) == workers
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1
    assert sum(shares) == max(count, workers)


@given(st.integers(1, 16), st.integers(1, 40))
def test_every_device_is_used_and_each_process_has_one(count: int, workers: int) -> None:
    devices = [f"cuda:{number}" for number in range(count)]
    shares = share_devices(devices, workers)
    assert len(shares) == workers
    assert {device for share in shares for device in share} == set(devices[: count if workers <= count else None])
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1
    assert sum(sizes) == max(count, workers)
    users = [sum(device in share for share in shares) for device in devices]
    assert max(users) - min(users) <= 1
