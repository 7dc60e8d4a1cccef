"""Single samples, read again by shard and offset from plain and compressed tars."""

from pathlib import Path

import pytest
import tars

from mmbeam.config import Limits
from mmbeam.errors import ShardError
from mmbeam.readers.samples import read_sample, read_samples
from mmbeam.types import Input, Shard

LONG = "folder/" + "x" * 150  # needs a pax or GNU header ahead of the member's


@pytest.fixture(params=["plain", "gzip", "zstd"])
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> Shard:
    pairs = [*tars.corpus(count=12), (f"{LONG}.txt", b"long"), (f"{LONG}.json", b"{}"), ("last.txt", b"last")]
    path = tmp_path / "s.tar"
    path.write_bytes(tars.PACK[request.param](tars.write(pairs)))
    return Shard(path=str(path), url=str(path))


def test_each_sample_is_read_again_by_its_offset(shard: Shard) -> None:
    data = Path(shard.path).read_bytes()
    expected = [(raw.key, raw.offset, dict(raw.members)) for raw in tars.read(data)]
    assert expected[-2][0] == LONG
    singles = [read_sample(shard.path, offset) for _, offset, _ in expected]
    assert [(raw.key, raw.offset, dict(raw.members)) for raw in singles] == expected
    assert {raw.shard for raw in singles} == {shard.path}
    offsets = [offset for _, offset, _ in expected[::-3]]
    several = list(read_samples(Input(shard=shard), [*offsets, offsets[0]]))
    assert [(raw.key, raw.offset, dict(raw.members)) for raw in several] == expected[::-3][::-1]


def test_unwanted_members_are_named_and_not_read(shard: Shard) -> None:
    first = tars.read(Path(shard.path).read_bytes())[0]
    [raw] = read_samples(Input(shard=shard), [first.offset], want=lambda field: field == "txt")
    assert raw.fields == first.fields
    assert set(raw.members) == {"txt"} & set(first.fields)


@pytest.mark.parametrize("offset", [512 * 7 + 1, 10**9])
def test_a_byte_without_a_sample_is_an_error(shard: Shard, offset: int) -> None:
    with pytest.raises(ShardError, match=rf"s\.tar: no sample begins at byte {offset:,}"):
        read_sample(shard.path, offset)


def test_damage_and_limits_apply_as_in_a_job(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    data = tars.write([("a.txt", b"a"), ("b.jpg", b"b" * 3000), ("b.txt", b"b")])
    path.write_bytes(data[: 1024 + 512 + 1000])
    offset = tars.read(path.read_bytes())[1].offset
    [expected] = tars.read(path.read_bytes())[1:]
    assert expected.truncated
    assert read_sample(str(path), offset).damages == expected.damages
    path.write_bytes(data)
    assert read_sample(str(path), offset, Limits(member_bytes=100)).damages[0].error == "LimitError"


def test_a_changed_or_missing_shard_is_an_error(shard: Shard) -> None:
    changed = Shard(path=shard.path, url=shard.url, size=1)
    with pytest.raises(ShardError, match="changed since it was listed"):
        list(read_samples(Input(shard=changed), [0]))
    Path(shard.path).unlink()
    with pytest.raises(ShardError, match="does not exist"):
        read_sample(shard.path, 0)
