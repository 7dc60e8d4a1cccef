"""The embed command on a giant shard: read in parts, and as one unit by the second run if they were misread."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shards
from outputs import read_rows

from mmbeam.cli import main
from mmbeam.readers.units import plan_units
from mmbeam.runs import control

Command = Callable[[str], int]


@pytest.fixture
def giant(tmp_path: Path) -> Path:
    """A shard of 12 samples; one has a member that is a tar of 8 samples, which do not belong to the shard."""
    truths = shards.make_truths(20)
    inner = shards.tar_bytes(shards.named_members(truths[12:]))
    members = shards.named_members(truths[:12])
    members.insert(20, ("000005.tar", inner))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "giant.tar").write_bytes(shards.tar_bytes(members))
    return folder


@pytest.fixture
def embed(giant: Path, clip: Path, tmp_path: Path) -> Command:
    def call(output: str) -> int:
        where = ["--input", str(giant), "--output", str(tmp_path / output)]
        return main(["embed", *where, "--model", str(clip), "--device", "cpu"])

    return call


def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut shards into parts of 20 kB, and read no part from the beginning of its shard."""
    monkeypatch.setattr("mmbeam.readers.tar.LOOK_BACK", 512)
    monkeypatch.setattr("mmbeam.runs.plan.plan_units", lambda shards, known, _: plan_units(shards, known, 20_000))


def test_two_runs_in_parts_write_the_rows_of_a_whole_read(
    embed: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed("whole") == 0
    cut(monkeypatch)
    assert embed("cut") == 3
    assert list((tmp_path / "cut/data").iterdir()) == []
    assert embed("cut") == 0
    assert len(list((tmp_path / "cut/data").iterdir())) == 1  # the whole shard
    whole, again = read_rows(tmp_path / "whole"), read_rows(tmp_path / "cut")
    assert [row["key"] for row in again] == [f"{number:06d}" for number in range(12)]
    for expected, row in zip(whole, again, strict=True):
        for name in ("image_embedding", "text_embedding"):
            np.testing.assert_allclose(row.pop(name), expected.pop(name), atol=1e-5)
        assert row == expected
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*")}
    assert embed("cut") == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*")}


def test_failures_in_a_misread_part_do_not_stop_the_job(
    embed: Command, giant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member is a tar of broken images. All samples of a part that begins in it fail, and the part is withdrawn."""
    monkeypatch.setattr(control, "RATE_SAMPLES", 5)
    members = shards.named_members(shards.make_truths(12))
    members.insert(20, ("000005.tar", shards.tar_bytes([(f"{number:03}.jpg", b"x" * 2000) for number in range(40)])))
    (giant / "giant.tar").write_bytes(shards.tar_bytes(members))
    cut(monkeypatch)
    assert embed("cut") == 3
    assert embed("cut") == 0
    assert [row["key"] for row in read_rows(tmp_path / "cut")] == [f"{number:06d}" for number in range(12)]
