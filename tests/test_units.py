"""Shards to units: ids, parts, packs, and their JSON in a plan."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmbeam.readers import units
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import (
    cut,
    input_read_from_json,
    inputs_to_json,
    limited_unit,
    plan_units,
    unit_from_json,
    unit_id,
    unit_to_json,
)
from mmbeam.types import Input, InputRead, Shard, WorkUnit


def make_shard(path: str, size: int | None = 5) -> Shard:
    return Shard(path=path, url=f"{path}?secret", size=size, etag="e")


def test_id_is_fixed() -> None:
    """A change of these names orphans every output in the world."""
    assert unit_id(Input(shard=make_shard("gs://bucket/a/data-00001.tar"))) == "data-00001-0981a16aff"
    assert unit_id(Input(shard=make_shard("/d/é ü.tar.gz"), begin=5, end=9)) == "shard-bb76b5d695"


@given(st.text(max_size=300), st.integers(0, 2**60))
def test_id_is_a_safe_file_name(name: str, begin: int) -> None:
    name = name.encode("utf-8", "replace").decode()
    identity = unit_id(Input(shard=make_shard(f"s3://bucket/{name}"), begin=begin))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}-[0-9a-f]{10}", identity)


def test_id_depends_on_path_and_range_only() -> None:
    whole = Input(shard=make_shard("/a/x.tar"))
    assert unit_id(whole) == unit_id(Input(shard=Shard(path="/a/x.tar", url="elsewhere")))
    others = [Input(shard=make_shard("/b/x.tar")), Input(shard=whole.shard, begin=1), Input(shard=whole.shard, end=1)]
    assert len({unit_id(part) for part in [whole, *others]}) == 4


def test_only_new_shards_are_planned() -> None:
    old, new = [make_shard(f"/d/{number}.tar") for number in range(3)], make_shard("/d/3.tar")
    known = plan_units(old, [])
    assert [unit.inputs for unit in known] == [(Input(shard=shard),) for shard in old]
    added = plan_units([new, *old], known)
    assert [unit.inputs[0].shard for unit in added] == [new]
    assert plan_units([*old, new], [*known, *added]) == []


def test_limit_is_one_unit() -> None:
    shards = [make_shard(f"/d/{number}.tar") for number in range(3)]
    unit = limited_unit(shards, 10)
    assert (unit.limit, [source.shard for source in unit.inputs]) == (10, shards)
    assert unit.id.startswith("first-10-0-")
    assert len({unit.id, limited_unit(shards, 11).id, limited_unit(shards[:2], 10).id}) == 3


def test_json_round_trip() -> None:
    for unit in [*plan_units([make_shard("s3://b/x.tar")], []), limited_unit([make_shard("s3://b/y.tar")], 3)]:
        text = json.dumps(unit_to_json(unit))
        assert "secret" not in text
        urls = {source.shard.path: source.shard.url for source in unit.inputs}
        assert unit_from_json(json.loads(text), urls) == unit
        assert unit_from_json(json.loads(text)).inputs[0].shard.url == unit.inputs[0].shard.path


def test_planning_is_quick(tmp_path: Path) -> None:
    """The requirement is 100,000 shards in 30 s; this is a tenth."""
    for number in range(10_000):
        (tmp_path / f"{number:05d}.tar").touch()
    begin = time.process_time()
    assert len(plan_units(list_shards([f"{tmp_path}/{{00000..09999}}.tar"]), [])) == 10_000
    assert time.process_time() - begin < 3


# Parts of giant shards


@given(st.integers(1, 10**12), st.integers(1, 10**9))
def test_parts_are_adjacent_and_near_the_target_size(size: int, part_bytes: int) -> None:
    size = min(size, 1000 * part_bytes)
    parts = cut(make_shard("/d/x.tar", size), part_bytes)
    ends = [part.end for part in parts]
    assert [part.begin for part in parts] == [0, *ends[:-1]]
    assert ends[-1] is None
    assert all(part.begin % 512 == 0 for part in parts)
    lengths = [end - part.begin for part, end in zip(parts, [*ends[:-1], size], strict=True)]
    assert all(0 < length <= 1.5 * part_bytes + 512 for length in lengths)
    assert len(parts) == 1 or min(lengths) >= part_bytes * 2 / 3 - 512


def test_compressed_small_and_unsized_shards_are_not_cut() -> None:
    for path, size in [("x.tar.gz", 10**9), ("x.tgz", 10**9), ("x", 10**9), ("x.tar", None), ("x.tar", 150)]:
        shard = make_shard(path, size)
        assert cut(shard, 101) == [Input(shard=shard)]
    assert len(cut(make_shard("X.TAR", 10**9), 10**8)) == 10


def test_parts_keep_their_names_when_shards_are_added_and_the_target_changes() -> None:
    giant = make_shard("/d/giant.tar", 10**9)
    known = plan_units([giant], [], 256 << 20)
    assert [unit.inputs[0].begin for unit in known] == [
        0,
        250_000_000 // 512 * 512,
        500_000_000 // 512 * 512,
        749_999_616,
    ]
    assert len({unit.id for unit in known}) == 4
    added = plan_units([giant, make_shard("/d/new.tar", 10**9)], known, 10**8)
    assert {source.shard.path for unit in added for source in unit.inputs} == {"/d/new.tar"}
    assert [unit.id for unit in plan_units([giant], [], 256 << 20)] == [unit.id for unit in known]


def test_without_a_target_size_nothing_is_cut() -> None:
    assert plan_units([make_shard("/d/giant.tar", 10**12)], [])[0].inputs[0].end is None


def test_units_grow_to_stay_below_the_maximum_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MAX_UNITS", 10)
    shards = [make_shard(f"/d/{number}.tar", 10**9) for number in range(10)]
    assert len(plan_units(shards, [], 10**8)) == 10


def test_plans_of_mmbeam_0_1_load() -> None:
    """These plans recorded the offset at which a misread part really begins."""
    (unit,) = plan_units([make_shard("/d/x.tar", 2000)], [], 2000)
    line = unit_to_json(unit)
    line["inputs"][0]["seam"] = [1536, 1024]
    assert unit_from_json(line, {"/d/x.tar": unit.inputs[0].shard.url}) == unit


@pytest.mark.parametrize("read", [InputRead(first_sample=1536, next_sample=4096), InputRead(error="not a tar file")])
def test_a_footer_describes_what_was_read(read: InputRead) -> None:
    unit = WorkUnit(id="x", inputs=(Input(shard=make_shard("/d/x.tar", 9000), begin=1024),))
    (data,) = inputs_to_json(unit, [read])
    assert input_read_from_json(json.loads(json.dumps(data))) == read


def test_footers_of_mmbeam_0_1_load() -> None:
    data = {"begin": 1024, "from": [1536, 1024], "to": [None, 2048]}
    assert input_read_from_json(data) == InputRead(first_sample=1536, next_sample=None)
    assert input_read_from_json({"begin": 0, "to": [1536, 1024]}) == InputRead(first_sample=0, next_sample=1536)


# Packs of tiny shards


def test_tiny_neighbours_are_packed_while_enough_units_remain() -> None:
    shards = [make_shard(f"/d/{number:05d}.tar", 1000) for number in range(20_000)]
    made = plan_units(shards, [], 256 << 20)
    assert [source.shard for unit in made for source in unit.inputs] == shards
    assert {len(unit.inputs) for unit in made} == {20}
    assert len({unit.id for unit in made}) == len(made) == 1000
    assert plan_units(shards, made, 256 << 20) == []


def test_packs_are_limited_in_bytes_and_in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNPACKED_SHARDS", 1)
    sizes = [10, 10, 200, 30, None, 0, 5, 5, 5, 1000]
    shards = [make_shard(f"/d/{number}.tar.gz", size) for number, size in enumerate(sizes)]
    packs = [[source.shard.size for source in unit.inputs] for unit in plan_units(shards, [], 40)]
    assert packs == [[10, 10], [200], [30], [None], [0], [5, 5, 5], [1000]]
    assert (
        max(len(unit.inputs) for unit in plan_units([make_shard(f"/{n}.tar", 1) for n in range(500)], [], 499)) == 100
    )


def test_packs_of_tiny_shards_exceed_the_unit_size_where_there_would_be_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "UNPACKED_SHARDS", 1)
    monkeypatch.setattr(units, "MAX_UNITS", 10)
    shards = [make_shard(f"/d/{number}.tar", 10) for number in range(100)]
    shards[50:50] = [make_shard("/d/large.tar", 60)]  # larger than a unit: not packed
    packs = [[source.shard.size for source in unit.inputs] for unit in plan_units(shards, [], 40)]
    assert packs == [[10] * 10] * 5 + [[60]] + [[10] * 10] * 5


def test_few_shards_are_not_packed() -> None:
    """So that a shard that cannot be read fails alone."""
    shards = [make_shard(f"/d/{number}.tar", 10) for number in range(units.UNPACKED_SHARDS)]
    assert len(plan_units(shards, [], 256 << 20)) == len(shards)
