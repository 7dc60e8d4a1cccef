"""The embed command over a giant shard: parts by several workers, and a part that was misread in a second run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import shards
from tiny_clip import save_clip

from mmbeam import runs
from mmbeam.cli import main
from mmbeam.readers import parts
from mmbeam.runs import control

Command = Callable[[str], int]


@pytest.fixture
def giant(tmp_path: Path) -> Path:
    """Twelve samples, and one with a member that is a tar of eight more, which are none of the shard's."""
    truths = shards.make_truths(20)
    inner = shards.tar_bytes(shards.named_members(truths[12:]))
    members = shards.named_members(truths[:12])
    members.insert(20, ("000005.tar", inner))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "giant.tar").write_bytes(shards.tar_bytes(members))
    return folder


@pytest.fixture
def embed(giant: Path, tmp_path: Path) -> Command:
    model = save_clip(tmp_path / "clip")

    def call(output: str) -> int:
        where = ["--input", str(giant), "--output", str(tmp_path / output)]
        return main(["embed", *where, "--model", str(model), "--device", "cpu"])

    return call


def test_the_command_twice_gives_the_rows_of_a_whole_read(
    embed: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed("whole") == 0
    monkeypatch.setattr(parts, "LOOK_BACK", 512)
    extend_plan = runs.extend_plan
    monkeypatch.setattr(runs, "extend_plan", lambda run, shards, **_: extend_plan(run, shards, unit_bytes=20_000))
    assert embed("cut") == 3
    assert embed("cut") == 0
    units = len(list((tmp_path / "cut/data").iterdir()))
    assert units > 8
    whole, cut = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    assert [row["key"] for row in cut] == [f"{number:06d}" for number in range(12)]
    for one, other in zip(whole, cut, strict=True):
        for name in ("image_embedding", "text_embedding"):
            np.testing.assert_allclose(one.pop(name), other.pop(name), atol=1e-5)
        assert one == other
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*")}
    assert embed("cut") == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*")}


def test_samples_that_are_none_do_not_stop_the_job(
    embed: Command, giant: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A member that is a tar of broken pictures: a part that begins in it fails on each, and will be withdrawn."""
    monkeypatch.setattr(control, "JUDGED_SAMPLES", 5)
    monkeypatch.setattr(parts, "LOOK_BACK", 512)
    members = shards.named_members(shards.make_truths(12))
    members.insert(20, ("000005.tar", shards.tar_bytes([(f"{number:03}.jpg", b"x" * 2000) for number in range(40)])))
    (giant / "giant.tar").write_bytes(shards.tar_bytes(members))
    extend_plan = runs.extend_plan
    monkeypatch.setattr(runs, "extend_plan", lambda run, shards, **_: extend_plan(run, shards, unit_bytes=20_000))
    assert embed("cut") == 3
    assert embed("cut") == 0
    assert [row["key"] for row in rows(tmp_path / "cut")] == [f"{number:06d}" for number in range(12)]


def rows(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ds.dataset(output / "data").to_table().to_pylist()
    return sorted(found, key=lambda row: int(row["offset"]))
