"""Damaged, truncated and hostile tars: only ShardError is raised, no byte is wrong, and every loss is recorded."""

import gzip
import io
import random
import tarfile
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import FORMATS, PACK, content, corpus, everything, grouped, info, read, write

from mmbeam.config import Limits
from mmbeam.errors import ShardError
from mmbeam.readers.tar import BLOCK, TarReader, pax_records, split_name


class TestEnds:
    def test_not_a_tar(self) -> None:
        """The error says what the file looks like and quotes none of its bytes: it may be any file."""
        for data, message in [
            (b"", "is empty"),
            (b"PK\x03\x04 this is a zip" * 100, "not a tar file; it looks like a zip archive"),
            (b"\n <!doctype html>" * 100, "not a tar file; it looks like HTML or XML"),
            (b'{"a": 1}', "not a tar file; it looks like JSON"),
            (b"PAR1" + bytes(1000) + b"PAR1", "not a tar file; it looks like a Parquet file"),
            (b"secret", "not a tar file: it has no tar header$"),
            (b"secret" * 1000, "not a tar file: it has no tar header$"),
            (b"\0" * 100, "not a tar file"),
            (b"\0" * 32768 + b"\1CD001" * 1000, "not a tar file"),
            (
                gzip.compress(b"secret" * 200, mtime=0),
                "a compressed file that does not contain a tar: it has no tar header$",
            ),
            (b"\x1f\x8b" + b"garbage" * 100, "does not contain a tar.*cannot be decompressed"),
        ]:
            with pytest.raises(ShardError, match=message):
                read(data)

    def test_the_first_header_is_searched_for_within_64_mib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mmbeam.readers.tar.SEARCH_BYTES", 4096)
        data = write([("a.jpg", b"1")])
        assert content(read(b"garbage!" * 500 + bytes(96) + data)) == [("a", {"jpg": b"1"})]
        with pytest.raises(ShardError, match="not a tar file"):
            read(b"garbage!" * 640 + data)

    @pytest.mark.parametrize("zeros", [512, 1024, 10240])
    def test_only_zero_blocks_are_an_empty_tar(self, zeros: int) -> None:
        assert read(b"\0" * zeros) == []

    def test_a_missing_end_of_archive_marker_is_noted(self) -> None:
        pairs = corpus()
        reader = TarReader(io.BytesIO(write(pairs, end=False)), "x", everything, Limits())
        assert content(list(reader)) == grouped(pairs)
        assert reader.unterminated

    @pytest.mark.parametrize("pad", [2 * BLOCK, 10240])
    def test_a_tar_behind_the_end_mark_is_read(self, pad: int) -> None:
        """As by `tar --ignore-zeros`; tarfile and webdataset stop at the mark."""
        before, after = [("a.jpg", b"1")], [("b.jpg", b"2")]
        data = write(before, end=False) + b"\0" * pad + write(after)
        reader = TarReader(io.BytesIO(data), "x", everything, Limits())
        assert content(list(reader)) == grouped([*before, *after])
        assert reader.concatenated
        assert (reader.trailing_data, reader.unterminated, reader.failures, reader.broken) == (False, False, [], None)

    def test_other_data_behind_the_end_mark_are_noted(self) -> None:
        reader = TarReader(io.BytesIO(write([("a.jpg", b"1")]) + b"signature" * 1000), "x", everything, Limits())
        assert content(list(reader)) == [("a", {"jpg": b"1"})]
        assert reader.trailing_data
        assert (reader.concatenated, reader.unterminated, reader.failures, reader.broken) == (False, False, [], None)

    def test_one_zero_block_is_not_an_end_mark(self) -> None:
        data = write([("a.jpg", b"1")], end=False) + bytes(BLOCK) + write([("b.jpg", b"2")])
        reader = TarReader(io.BytesIO(data), "x", everything, Limits())
        assert content(list(reader)) == [("a", {"jpg": b"1"}), ("b", {"jpg": b"2"})]
        [damage] = reader.failures
        assert (damage.offset, damage.error) == (1024, "DecodeError")
        assert "byte 1,024: expected a tar header, found 512 zeros; the next header is at byte 1,536" in damage.message


class TestDamage:
    def test_a_damaged_header_costs_one_member(self) -> None:
        pairs = corpus(count=5)
        data = bytearray(write(pairs, "ustar"))
        samples = read(bytes(data))
        broken = samples[2].offset  # the header of 00002.jpg
        data[broken + 10] ^= 1
        remaining = read(bytes(data))
        rest = {field: value for field, value in samples[2].members.items() if field != "jpg"}
        assert content(remaining) == [*content(samples[:2]), ("00002", rest), *content(samples[3:])]
        [damage] = remaining[2].damages
        assert (damage.field, damage.offset, damage.error) == ("jpg", broken, "DecodeError")
        assert f"byte {broken:,}: expected a tar header, found a bad checksum" in damage.message
        assert f"the next header is at byte {remaining[2].offset:,}" in damage.message
        assert not any(sample.damages for sample in remaining if sample is not remaining[2])

    def test_a_damaged_header_inside_a_sample_costs_its_field(self) -> None:
        data = bytearray(write([("a.jpg", b"1"), ("a.txt", b"2"), ("a.json", b"3"), ("b.jpg", b"4")], "ustar"))
        data[1024 + 150] ^= 1
        first, second = read(bytes(data))
        assert content([first, second]) == [("a", {"jpg": b"1", "json": b"3"}), ("b", {"jpg": b"4"})]
        assert [damage.field for damage in first.damages] == ["txt"]
        assert set(first.fields) == {"jpg", "json", "txt"}
        assert second.damages == ()

    def test_garbage_up_to_the_end_truncates_the_shard(self) -> None:
        """The last sample fails unless it has all the fields of the one before."""
        for last, is_whole in (("txt", True), ("json", False)):
            pairs = [("a.jpg", b"1"), ("a.txt", b"2"), ("b.jpg", b"3"), (f"b.{last}", b"4")]
            reader = TarReader(io.BytesIO(write(pairs, end=False) + b"garbage" * 10_000), "x", everything, Limits())
            _, sample = reader
            assert sample.truncated is not is_whole
            damage = reader.failures[0] if is_whole else sample.damages[0]
            assert "no header follows: the shard ends at byte 74,096" in damage.message
            assert reader.broken is not None

    def test_damage_before_the_first_sample(self) -> None:
        """It belongs to the first sample if that lacks a field of the second."""
        readme = write([("README", b"no sample")], end=False) + b"garbage!" * 64
        for pairs, lost in [([("a.jpg", b"1")], []), ([("a.txt", b"1"), ("b.jpg", b"2"), ("b.txt", b"3")], ["jpg"])]:
            reader = TarReader(io.BytesIO(readme + write(pairs)), "x.tar", everything, Limits())
            samples = list(reader)
            assert content(samples) == grouped(pairs)
            assert [damage.field for damage in samples[0].damages] == lost
            assert [damage.offset for damage in reader.failures] == ([] if lost else [1024])
        with pytest.raises(ShardError, match=r"x\.tar: holds no sample that can be read: byte 1,024"):
            read(readme + b"garbage!" * 640)

    @pytest.mark.parametrize("wanted", [True, False])
    def test_a_truncated_member_is_a_failure(self, wanted: bool) -> None:
        data = write([("a.jpg", b"1"), ("b.jpg", b"2" * 1000), ("b.txt", b"3" * 5000)], "ustar")
        offset = 1024 + 512 + 1024
        whole, cut = read(data[: offset + 512 + 4000], lambda field: wanted)
        assert (whole.truncated, whole.damages) == (False, ())
        assert cut.truncated
        assert cut.fields == ("jpg", "txt")
        assert "txt" not in cut.members
        [damage] = cut.damages
        assert (damage.field, damage.offset, damage.error) == ("txt", offset, "DecodeError")
        assert damage.message == (
            f"member b.txt at byte {offset:,}: expected 5,000 bytes, found 4,000; "
            f"the shard ends at byte {offset + 4512:,}"
        )

    def test_padding_may_be_missing(self) -> None:
        reader = TarReader(io.BytesIO(write([("a.jpg", b"1" * 100)])[:612]), "x", everything, Limits())
        assert content(list(reader)) == [("a", {"jpg": b"1" * 100})]
        assert reader.unterminated

    def test_impossible_sizes_are_damage(self) -> None:
        for size in (-5, 1 << 62, 1 << 80):
            header = bytearray(info("b.jpg").tobuf(tarfile.GNU_FORMAT))
            header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size & ((1 << 88) - 1)).to_bytes(11, "big")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            samples = read(write([("a.jpg", b"1")], end=False) + bytes(header) + b"x" * 2000)
            assert samples[-1].truncated or samples[-1].damages

    @pytest.mark.parametrize(
        "payload",
        [b"99 path=a\n", b"x path=a\n", b"0 path=a\n", b"12 path=abc", b"14 size=-5000\n", b"30 " + b"9" * 26 + b"\n"],
    )
    def test_malformed_pax_header(self, payload: bytes) -> None:
        with pytest.raises(ValueError, match="pax header"):
            pax_records(payload)
        extension = info("p", size=len(payload), type=b"x").tobuf(tarfile.USTAR_FORMAT)
        data = write([("a.jpg", b"1")], end=False) + extension + payload.ljust(512, b"\0")
        samples = read(data + write([("b.jpg", b"2"), ("c.jpg", b"3")]))
        assert content(samples) == [("a", {"jpg": b"1"}), ("b", {}), ("c", {"jpg": b"3"})]
        assert "a member whose name is unknown" in samples[1].damages[0].message
        assert samples[0].damages == samples[2].damages == ()


letters = st.text(st.characters(exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
keys = st.lists(letters, min_size=1, max_size=3).map("/".join)
fields = st.sampled_from(["jpg", "txt", "json", "a.png"])
samples_of = st.lists(
    st.tuples(keys, st.dictionaries(fields, st.binary(max_size=1500), min_size=1)),
    min_size=1,
    max_size=6,
)


class TestProperties:
    @given(samples_of, st.sampled_from(["gnu", "pax"]), st.sampled_from(list(PACK)), st.booleans())
    @settings(deadline=None, max_examples=60)
    def test_round_trip(
        self, made: list[tuple[str, Mapping[str, bytes]]], format: str, packing: str, end: bool
    ) -> None:
        pairs = [(f"{key}.{field}", data) for key, members in made for field, data in members.items()]
        pairs = [(name, data) for name, data in pairs if split_name(name) is not None]
        if pairs:
            samples = read(PACK[packing](write(pairs, format, end)))
            assert content(samples) == grouped(pairs)
            assert not any(sample.damages or sample.truncated for sample in samples)

    @pytest.mark.parametrize("packing", list(PACK))
    @pytest.mark.parametrize("format", list(FORMATS))
    def test_cut_at_any_byte(self, format: str, packing: str) -> None:
        """The samples before the cut are complete, and at most one more is marked as truncated."""
        pairs = [
            *corpus(count=3),
            *((f"{'ü' * 60 if format != 'ustar' else 'u'}.{x}", b"long" * 300) for x in ("a", "b")),
        ]
        whole, data = content(read(write(pairs, format))), PACK[packing](write(pairs, format))
        for cut in range(1, len(data), 3 if packing == "plain" else 37):
            reader = TarReader(io.BytesIO(data[:cut]), "x", everything, Limits())
            try:
                samples = list(reader)
            except ShardError:
                assert packing != "plain" or cut < BLOCK
                continue
            if not samples:
                continue
            *complete, last = samples
            assert content(complete) == whole[: len(complete)]
            assert not any(sample.damages for sample in complete)
            key, members = whole[len(complete)]
            assert last.key == key
            assert last.members.items() <= members.items()
            assert last.damages or last.members == members or reader.failures or reader.unterminated
            assert reader.broken or reader.unterminated or content(samples) == whole
            assert reader.unterminated or bool(last.damages or reader.failures) == (reader.broken is not None)

    def test_one_flipped_bit_in_a_header_costs_one_member(self) -> None:
        source = random.Random(1)
        pairs = corpus(count=4)
        data = write(pairs, "ustar")
        whole = set(pairs)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            headers = [(member.offset, member.name) for member in tar]
        for _ in range(100):
            offset, name = source.choice(headers)
            broken = bytearray(data)
            broken[offset + source.randrange(148)] ^= 1 << source.randrange(8)
            reader = TarReader(io.BytesIO(broken), "x.tar", everything, Limits())
            samples = list(reader)
            kept = {(f"{sample.key}.{field}", value) for sample in samples for field, value in sample.members.items()}
            assert kept == {pair for pair in whole if pair[0] != name}
            assert sum(len(sample.damages) for sample in samples) + len(reader.failures) == 1

    def test_a_damaged_header_costs_its_own_sample(self) -> None:
        """Small members of one block or two, so that a wrong size often leads to a header."""
        source = random.Random(2)
        for _ in range(400):
            fields = source.sample(["jpg", "json", "txt"], source.choice([1, 2, 3]))
            sizes = [source.choice([1, 100, 513, 1500]) for _ in range(4 * len(fields))]
            names = [f"{number:03}.{name}" for number in range(4) for name in fields]
            pairs = [(name, name.encode() * 300) for name in names]
            pairs = [(name, data[:size]) for (name, data), size in zip(pairs, sizes, strict=True)]
            data = bytearray(write(pairs, source.choice(["gnu", "ustar"])))
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                member = source.choice(tar.getmembers())
            begin, key = member.offset, member.name.partition(".")[0]
            match source.randrange(4):
                case 0:
                    data[begin + source.randrange(100, 156)] ^= 1 << source.randrange(8)
                case 1:
                    data[begin + 257 : begin + 265] = bytes(8)  # the magic
                case 2:
                    data[begin + 124 : begin + 136] = b"%011o\0" % source.choice([0, 4000, 1 << 20])
                case 3:
                    data[begin : begin + BLOCK] = source.randbytes(BLOCK)
            packed = PACK[source.choice(list(PACK))](bytes(data))
            reader = TarReader(io.BytesIO(packed), "x.tar", everything, Limits())
            samples = list(reader)
            intact = [pair for pair in content(samples) if pair[0] != key]
            assert intact == [pair for pair in grouped(pairs) if pair[0] != key]
            assert not [sample for sample in samples if sample.key != key and sample.damages]
            damages = [damage for sample in samples for damage in sample.damages] + reader.failures
            is_last = member.name == names[-1]  # whose data may end with the shard's marker
            assert len(damages) == 1 or content(samples) == grouped(pairs) or is_last

    def test_a_legible_name_tells_whose_header_is_damaged(self) -> None:
        """Also in a shard whose samples have different fields: that of no other sample is missing."""
        pairs = [("0.jpg", b"0"), ("0.txt", b"0"), ("1.wav", b"1"), ("2.json", b"2"), ("3.jpg", b"3"), ("3.txt", b"3")]
        for number, (name, _) in enumerate(pairs):
            data = bytearray(write(pairs))
            begin = number * 2 * BLOCK
            data[begin + 257 : begin + 265] = bytes(8)
            samples = read(bytes(data))
            assert [(s.key, tuple(s.members)) for s in samples if s.key != name[0]] == [
                (key, tuple(members)) for key, members in grouped(pairs) if key != name[0]
            ]
            assert {sample.key for sample in samples if sample.damages} == {name[0]}

    def check_fuzzed(self, data: bytes) -> None:
        try:
            samples = read(data, lambda field: field != "json", member_bytes=100_000)
        except ShardError:
            return
        assert len(samples) <= len(data) // BLOCK + 1
        for sample in samples:
            assert sample.key.encode()
            assert 0 <= sample.offset <= 10 * len(data) + 10_000_000
            assert sample.members.keys() <= set(sample.fields)
            assert not sample.truncated or sample.damages

    @pytest.mark.parametrize("packing", list(PACK))
    @pytest.mark.parametrize("format", list(FORMATS))
    def test_flipped_bytes(self, format: str, packing: str) -> None:
        source = random.Random(f"{format} {packing}")
        data = PACK[packing](write([*corpus(count=4), ("n" * 90 + "/" + "m" * 90 + ".jpg", b"1")], format))
        for _ in range(50):
            broken = bytearray(data)
            for _ in range(source.choice([1, 3, 30])):
                broken[source.randrange(len(broken))] ^= 1 << source.randrange(8)
            self.check_fuzzed(bytes(broken))

    def test_moved_lost_and_repeated_blocks(self) -> None:
        source = random.Random(5)
        data = b"".join(write(corpus(seed, 3), format) for seed, format in enumerate(FORMATS))
        blocks = [data[begin : begin + BLOCK] for begin in range(0, len(data), BLOCK)]
        for _ in range(100):
            self.check_fuzzed(b"".join(source.choices(blocks, k=source.randrange(1, 60))))

    def test_headers_of_any_kind_with_valid_checksums(self) -> None:
        source = random.Random(6)
        kinds = [b"0", b"\0", b"7", b"5", b"1", b"S", b"x", b"g", b"L", b"K", b"X", b"V", b"M", b"D", b"?"]
        sizes = [0, 1, 511, 512, 700, 3000, 1 << 20, 1 << 33]
        payloads = [b"", b"11 path=ab\n", b"20 GNU.sparse.major=", b"\xff" * 512, b"long name\0", b"12 size=999\n"]
        for _ in range(150):
            parts = []
            for _ in range(source.randrange(1, 12)):
                header = info(
                    source.choice(["a.jpg", "b.txt", "c", "d/"]), size=source.choice(sizes), type=source.choice(kinds)
                )
                parts.append(header.tobuf(tarfile.GNU_FORMAT))
                parts.append(source.choice(payloads).ljust(BLOCK * source.randrange(4), b"\0"))
            self.check_fuzzed(b"".join(parts))

    @given(st.binary(min_size=BLOCK, max_size=BLOCK))
    @settings(deadline=None)
    def test_random_header(self, block: bytes) -> None:
        """With a valid checksum it is a header or damage, never another error."""
        header = bytearray(block)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        self.check_fuzzed(bytes(header) + block * 5)
