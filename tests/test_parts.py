"""The parts of a tar: if they join, they hold every sample once, in the order of the tar.

The parts of any tar join unless a part is misled by a member that is itself a tar, or cannot find or interpret headers.
"""

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards import member_bytes
from tars import everything, info, write

from mmbeam.config import Limits
from mmbeam.errors import ShardError
from mmbeam.readers import tar as tar_reader
from mmbeam.readers.tar import TarReader, part_origin, parts_are_contiguous
from mmbeam.types import Input, InputRead, RawSample, Shard

Cuts = Sequence[int]


def whole(data: bytes) -> list[RawSample]:
    return [plain(sample) for sample in TarReader(io.BytesIO(data), "x.tar", everything, Limits())]


def plain(sample: RawSample) -> RawSample:
    """Return the sample without `repeated`, which is counted per input."""
    return replace(sample, repeated=False)


def inputs_of(cuts: Cuts) -> list[Input]:
    begins = [0, *sorted({cut for cut in cuts if cut > 0})]
    shard = Shard(path="x.tar", url="x.tar")
    return [Input(shard=shard, begin=begin, end=end) for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def read_part(data: bytes, source: Input) -> tuple[list[RawSample], InputRead]:
    stream = io.BytesIO(data)
    stream.seek(part_origin(source.begin))
    reader = TarReader(stream, "x.tar", everything, Limits(), source.begin, source.end)
    samples = [plain(sample) for sample in reader]
    return samples, InputRead(first_sample=reader.first_sample, next_sample=reader.next_sample)


def in_parts(data: bytes, cuts: Cuts) -> tuple[list[RawSample], bool]:
    """Return the samples of all parts, and whether the parts join."""
    parts = [read_part(data, source) for source in inputs_of(cuts)]
    return [sample for samples, _ in parts for sample in samples], parts_are_contiguous(read for _, read in parts)


KEYS = st.sampled_from(["a", "b", "c", "d/" + "e" * 120, "é"])
FIELDS = st.sampled_from(["jpg", "txt", "json"])
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1500, 6000])
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Draw a member, with the extended headers that a long or non-ASCII name needs."""
    name = f"{draw(KEYS)}.{draw(FIELDS)}"
    try:
        return member_bytes(name, bytes([draw(st.integers(0, 255))]) * draw(SIZES), draw(FORMATS))
    except ValueError:  # the name is too long for ustar
        return member_bytes(name, b"", tarfile.PAX_FORMAT)


OTHERS = st.sampled_from(
    [
        info("folder", type=tarfile.DIRTYPE).tobuf(),
        info("a.jpg", type=tarfile.SYMTYPE, linkname="b.jpg").tobuf(),
        member_bytes("folder/.hidden", b"no part of a sample"),
        member_bytes("README", b"nor this" * 300),
    ]
)
TROUBLE = st.one_of(
    st.just(b"\xff" * 512),
    st.just(bytes(512)),  # an end-of-archive block inside the tar
    st.just(bytes(1024)),
    st.binary(min_size=512, max_size=512),
    st.just(tarfile.TarInfo.create_pax_global_header({"comment": "harmless"})),
    st.just(tarfile.TarInfo.create_pax_global_header({"path": "all.jpg"})),
    st.just(tarfile.TarInfo("v7.jpg").tobuf()[:257] + bytes(255)),  # with an invalid checksum
)
CUTS = st.lists(st.integers(1, 40_000), max_size=6)
PLAIN = st.lists(st.one_of(files(), files(), files(), OTHERS), max_size=25).map(b"".join)


@st.composite
def nested(draw: st.DrawFn) -> bytes:
    """Draw a member that is a tar, with or without its end-of-archive marker."""
    data = draw(PLAIN) + draw(st.sampled_from([b"", bytes(1024)]))
    return member_bytes(f"{draw(KEYS)}.{draw(st.sampled_from(['jpg', 'tar']))}", data)


ANY = st.lists(st.one_of(files(), files(), OTHERS, TROUBLE, nested()), max_size=20).map(b"".join)
ENDS = st.sampled_from([b"", bytes(512), bytes(1024), bytes(1024) + member_bytes("z.jpg", b"behind")])


@pytest.fixture(params=[0, 1024, 4096], autouse=True, scope="module")
def look_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Look back over few bytes, because otherwise small tars are read from their beginning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_reader, "LOOK_BACK", request.param)
        yield


@given(PLAIN, CUTS)
def test_parts_of_a_tar_cut_anywhere_hold_every_sample_once(tar: bytes, cuts: Cuts) -> None:
    data = tar + bytes(1024)
    samples, join = in_parts(data, cuts)
    assert join or tar_reader.LOOK_BACK == 0  # without it, a long name's header before the cut is not seen
    assert samples == whole(data) or not join


@given(ANY, ENDS, CUTS, st.integers(0, 600))
def test_parts_of_arbitrary_bytes_that_join_hold_every_sample_once(
    tar: bytes, end: bytes, cuts: Cuts, lost: int
) -> None:
    data = tar + end
    data = data[: len(data) - lost] if lost else data
    try:
        expected = whole(data)
    except ShardError:
        with pytest.raises(ShardError):
            read_part(data, inputs_of(cuts)[0])
        return
    samples, join = in_parts(data, cuts)
    assert samples == expected or not join


@given(ANY, CUTS)
def test_parts_behind_the_first_never_fail(tar: bytes, cuts: Cuts) -> None:
    """A misled part must not fail: the parts of a shard are compared once all of them are committed."""
    for source in inputs_of(cuts)[1:]:
        read_part(tar, source)


def joins_of_every_cut(data: bytes) -> set[bool]:
    """Return whether the parts join, for every cut at and beside block edges; check the samples of those that do."""
    expected = whole(data)
    joins = set()
    for block in range(512, len(data), 512):
        for cut in (block - 1, block, block + 1):
            samples, join = in_parts(data, [cut])
            assert samples == expected or not join, cut
            joins.add(join)
    return joins


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax"])
def test_a_cut_inside_a_sample_or_a_header_loses_nothing(format: str) -> None:
    pairs = [
        (f"{key}{long}.{field}", b"x" * 700) for key in "abc" for long in ("", "é" * 60) for field in ("jpg", "txt")
    ]
    pairs = [pair for pair in pairs if format != "ustar" or len(pair[0].encode()) <= 100]
    assert joins_of_every_cut(write(pairs, format)) == {True} or tar_reader.LOOK_BACK == 0


def test_keys_that_repeat_are_samples_as_in_the_whole_tar() -> None:
    pairs = [("a.jpg", b"1"), ("a.txt", b"2"), ("a.jpg", b"3"), ("a.txt", b"4"), ("b.jpg", b"5"), ("a.jpg", b"6")]
    data = write(pairs)
    assert [sample.key for sample in whole(data)] == ["a", "a", "b", "a"]
    assert joins_of_every_cut(data) == {True}


def test_parts_misled_by_a_tar_in_a_tar_do_not_join() -> None:
    inner = write([(f"inner-{number}.jpg", b"x" * 600) for number in range(8)])
    data = write(
        [("a.jpg", b"1"), ("a.txt", b"2"), ("b.tar", inner), ("b.jpg", b"3"), ("c.jpg", b"4"), ("d.jpg", b"5")]
    )
    assert joins_of_every_cut(data) == {True, False}
    assert not in_parts(data, range(1024, len(data), 1024))[1]


@pytest.mark.parametrize("pax", [{"path": "all.jpg"}, {"size": "300"}])
def test_parts_behind_a_global_header_do_not_join(pax: dict[str, str]) -> None:
    files = [member_bytes(f"{number}.jpg", b"x", tarfile.PAX_FORMAT) for number in range(14)]
    files.insert(3, tarfile.TarInfo.create_pax_global_header(pax))
    assert joins_of_every_cut(b"".join(files) + bytes(1024)) == {True, False}


@pytest.mark.parametrize("packed", [False, True])
def test_parts_without_headers(packed: bool) -> None:
    """Headers of the v7 format have no magic, so the parts do not join. A compressed tar is in the first part."""
    infos = [info(f"{number}.jpg", b"x") for number in range(5)]
    data = b"".join(v7(header) + b"x" + bytes(511) for header in infos) + bytes(1024)
    data = gzip.compress(data, 0) if packed else data
    samples, join = in_parts(data, [1024, 3072])
    assert join == packed
    if packed:
        assert [sample.key for sample in samples] == list("01234")


@pytest.mark.parametrize(
    ("reads", "join"),
    [
        ([(0, None)], True),
        ([(0, 1024), (1024, 2048), (2048, None)], True),
        ([(0, 1024), (None, None), (1024, None)], True),  # a part inside a large member
        ([(0, 1024), (1024, 1024), (1024, None)], True),  # all samples belong to the previous part
        ([(0, None), (None, None)], True),
        ([(0, 1024)], False),
        ([(0, 1024), (None, None)], False),
        ([(0, 1024), (1536, None)], False),
        ([(0, 1024), (512, None)], False),
        ([(0, None), (1024, None)], False),
        ([(0, 1024), (1024, 2048), (None, None)], False),
    ],
)
def test_parts_join_if_every_part_begins_where_the_previous_ended(
    reads: list[tuple[int | None, int | None]], join: bool
) -> None:
    assert parts_are_contiguous(InputRead(first_sample=first, next_sample=after) for first, after in reads) == join


def v7(header: tarfile.TarInfo) -> bytes:
    block = bytearray(header.tobuf(tarfile.USTAR_FORMAT)[:257] + bytes(255))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_parts_within_a_large_member_are_not_buffered() -> None:
    data = write([("a.bin", bytes(16 << 20)), ("b.jpg", b"1"), ("c.jpg", b"2")])
    tracemalloc.start()
    try:
        inside, last = inputs_of([4 << 20, 12 << 20])[1:]
        assert read_part(data, inside) == ([], InputRead())
        samples, _ = read_part(data, last)
        assert [sample.key for sample in samples] == [
            "c"
        ]  # the first sample after the cut belongs to the previous part
        assert tracemalloc.get_traced_memory()[1] < (3 << 20)
    finally:
        tracemalloc.stop()
