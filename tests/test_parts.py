"""The parts of a tar: any cut of any tar gives every sample once, in order, as a whole read does.

Where a member is itself a tar a part may be fooled; then the chain says so, and the part read again from the
place that it names is right.
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
from mmbeam.readers import parts
from mmbeam.readers.parts import Part, PartRead, misplaced
from mmbeam.readers.tar import TarReader
from mmbeam.types import Input, InputRead, RawSample, Seam, Shard

Cuts = Sequence[int]


def whole(data: bytes) -> list[RawSample]:
    return [plain(sample) for sample in TarReader(io.BytesIO(data), "x.tar", everything, Limits())]


def plain(sample: RawSample) -> RawSample:
    """The sample without what is counted within an input: whether its key came before."""
    return replace(sample, repeated=False)


def inputs_of(cuts: Cuts) -> list[Input]:
    begins = [0, *sorted({cut for cut in cuts if cut > 0})]
    shard = Shard(path="x.tar", url="x.tar")
    return [Input(shard=shard, begin=begin, end=end) for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def read_part(data: bytes, source: Input) -> tuple[list[RawSample], InputRead]:
    part = Part(source)
    if part.is_empty:
        return [], part.found
    stream = io.BytesIO(data)
    stream.seek(part.origin)
    return [plain(s) for s in TarReader(stream, "x.tar", everything, Limits(), part)], part.found


def judged(sources: Sequence[Input], read: Sequence[tuple[list[RawSample], InputRead]], data: bytes) -> dict[str, Seam]:
    """The parts to be read again, with their true beginnings, traced as a launch does."""
    claims = [
        PartRead(unit=str(number), shard="x.tar", begin=source.begin, end=source.end, committed=True, found=found)
        for number, (source, (_, found)) in enumerate(zip(sources, read, strict=True))
    ]

    def trace(part: PartRead, seam: Seam) -> Seam | None:
        return read_part(data, replace(sources[int(part.unit)], seam=seam))[1].end

    return {part.unit: seam for part, seam in misplaced(claims, trace)}


def in_parts(data: bytes, cuts: Cuts) -> tuple[list[RawSample], int]:
    """The samples of all parts after a second run, and how many parts it had to read again."""
    sources = inputs_of(cuts)
    read = [read_part(data, source) for source in sources]
    again = judged(sources, read, data)
    for unit, seam in again.items():
        read[int(unit)] = read_part(data, replace(sources[int(unit)], seam=seam))
    assert judged(sources, read, data) == {}
    return [sample for samples, _ in read for sample in samples], len(again)


KEYS = st.sampled_from(["a", "b", "c", "d/" + "e" * 120, "é"])
FIELDS = st.sampled_from(["jpg", "txt", "json"])
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1500, 6000])
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A member of a sample, with the headers before its own that a long or foreign name takes."""
    name = f"{draw(KEYS)}.{draw(FIELDS)}"
    try:
        return member_bytes(name, bytes([draw(st.integers(0, 255))]) * draw(SIZES), draw(FORMATS))
    except ValueError:  # too long a name for ustar
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
    st.just(bytes(512)),  # an end mark where there is none to be
    st.just(bytes(1024)),
    st.binary(min_size=512, max_size=512),
    st.just(tarfile.TarInfo.create_pax_global_header({"comment": "harmless"})),
    st.just(tarfile.TarInfo.create_pax_global_header({"path": "all.jpg"})),
    st.just(tarfile.TarInfo("v7.jpg").tobuf()[:257] + bytes(255)),  # whose checksum is wrong
)
CUTS = st.lists(st.integers(1, 40_000), max_size=6)
PLAIN = st.lists(st.one_of(files(), files(), files(), OTHERS), max_size=25).map(b"".join)


@st.composite
def nested(draw: st.DrawFn) -> bytes:
    """A member that is a tar, with or without its end."""
    data = draw(PLAIN) + draw(st.sampled_from([b"", bytes(1024)]))
    return member_bytes(f"{draw(KEYS)}.{draw(st.sampled_from(['jpg', 'tar']))}", data)


ANY = st.lists(st.one_of(files(), files(), OTHERS, TROUBLE, nested()), max_size=20).map(b"".join)
ENDS = st.sampled_from([b"", bytes(512), bytes(1024), bytes(1024) + member_bytes("z.jpg", b"behind")])


@pytest.fixture(params=[0, 1024, 4096], autouse=True, scope="module")
def look_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small tars are read from their beginning, where the reader looks back far."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LOOK_BACK", request.param)
        yield


@given(PLAIN, CUTS)
def test_any_cut_of_a_tar_gives_every_sample_once(tar: bytes, cuts: Cuts) -> None:
    data = tar + bytes(1024)
    samples, again = in_parts(data, cuts)
    assert samples == whole(data)
    assert again == 0 or parts.LOOK_BACK == 0  # a long name's header lies before the cut, and is not seen


@given(ANY, ENDS, CUTS, st.integers(0, 600))
def test_any_cut_of_anything_gives_every_sample_once_in_two_runs(tar: bytes, end: bytes, cuts: Cuts, lost: int) -> None:
    data = tar + end
    data = data[: len(data) - lost] if lost else data
    try:
        expected = whole(data)
    except ShardError:
        with pytest.raises(ShardError):
            read_part(data, inputs_of(cuts)[0])
        return
    samples, _ = in_parts(data, cuts)
    assert samples == expected


def every_cut(data: bytes) -> set[int]:
    """How many parts had to be read again, over each single cut, on block edges and beside them; all are whole."""
    expected = whole(data)
    again = set()
    for block in range(512, len(data), 512):
        for cut in (block - 1, block, block + 1):
            samples, count = in_parts(data, [cut])
            assert samples == expected, cut
            again.add(count)
    return again


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax"])
def test_a_part_that_begins_amid_a_sample_or_a_header_loses_nothing(format: str) -> None:
    pairs = [
        (f"{key}{long}.{field}", b"x" * 700) for key in "abc" for long in ("", "é" * 60) for field in ("jpg", "txt")
    ]
    pairs = [pair for pair in pairs if format != "ustar" or len(pair[0].encode()) <= 100]
    assert every_cut(write(pairs, format)) == {0} or parts.LOOK_BACK == 0


def test_keys_that_repeat_are_samples_as_in_a_whole_read() -> None:
    pairs = [("a.jpg", b"1"), ("a.txt", b"2"), ("a.jpg", b"3"), ("a.txt", b"4"), ("b.jpg", b"5"), ("a.jpg", b"6")]
    data = write(pairs)
    assert [sample.key for sample in whole(data)] == ["a", "a", "b", "a"]
    assert every_cut(data) == {0}


def test_a_tar_in_a_tar_fools_parts_and_the_chain_says_so() -> None:
    inner = write([(f"inner-{number}.jpg", b"x" * 600) for number in range(8)])
    data = write(
        [("a.jpg", b"1"), ("a.txt", b"2"), ("b.tar", inner), ("b.jpg", b"3"), ("c.jpg", b"4"), ("d.jpg", b"5")]
    )
    assert every_cut(data) == {0, 1}
    assert in_parts(data, range(1024, len(data), 1024))[1] > 3


@pytest.mark.parametrize("says", [{"path": "all.jpg"}, {"size": "300"}])
def test_what_a_global_header_says_holds_for_the_parts_behind_it(says: dict[str, str]) -> None:
    files = [member_bytes(f"{number}.jpg", b"x", tarfile.PAX_FORMAT) for number in range(14)]
    files.insert(3, tarfile.TarInfo.create_pax_global_header(says))
    assert every_cut(b"".join(files) + bytes(1024)) == {0, 1}


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_no_part_can_find_its_way_in_is_read_all_the_same(packed: bool) -> None:
    """In the v7 format headers have no mark; a compressed tar has no headers. A name tells neither."""
    infos = [info(f"{number}.jpg", b"x") for number in range(5)]
    data = b"".join(v7(each) + b"x" + bytes(511) for each in infos) + bytes(1024)
    data = gzip.compress(data, 0) if packed else data
    samples, again = in_parts(data, [1024, 3072])
    assert [sample.key for sample in samples] == list("01234")
    assert again == (0 if packed else 2)


def v7(header: tarfile.TarInfo) -> bytes:
    block = bytearray(header.tobuf(tarfile.USTAR_FORMAT)[:257] + bytes(255))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_the_parts_within_a_large_member_hold_nothing_in_memory() -> None:
    data = write([("a.bin", bytes(16 << 20)), ("b.jpg", b"1"), ("c.jpg", b"2")])
    tracemalloc.start()
    try:
        inside, last = inputs_of([4 << 20, 12 << 20])[1:]
        assert read_part(data, inside) == ([], InputRead())
        samples, _ = read_part(data, last)
        assert [sample.key for sample in samples] == ["c"]  # the first behind the cut belongs to the part before
        assert tracemalloc.get_traced_memory()[1] < (3 << 20)
    finally:
        tracemalloc.stop()
