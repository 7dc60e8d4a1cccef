"""The tar reader and the header parser on arbitrary bytes. `make fuzz` searches for inputs that break a rule.

`python tests/test_fuzz.py SECONDS [SEED]` mutates the corpus and small tars for a number of seconds. An input that
breaks a rule is printed as a line for the corpus.
"""

import base64
import io
import random
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import FORMATS, PACK, corpus, everything, info, write

from mmbeam.config import Limits
from mmbeam.errors import ShardError
from mmbeam.readers.tar import (
    BLOCK,
    TarReader,
    is_header_or_end,
    legible_name,
    part_origin,
    parts_are_contiguous,
    pax_records,
)
from mmbeam.types import InputRead, RawSample

CORPUS = Path(__file__).parent / "fuzz_corpus.txt"  # per line a name and zlib-compressed bytes in base 85
LIMITS = Limits(member_bytes=100_000)


def load() -> dict[str, bytes]:
    lines = (line.split() for line in CORPUS.read_text().splitlines())
    return {name: zlib.decompress(base64.b85decode(text)) for name, text in lines}


def line_of(name: str, data: bytes) -> str:
    return f"{name} {base64.b85encode(zlib.compress(data, 9)).decode()}"


def read(data: bytes, begin: int = 0, end: int | None = None) -> tuple[list[RawSample], TarReader]:
    stream = io.BytesIO(data)
    stream.seek(part_origin(begin))
    reader = TarReader(stream, "x.tar", everything, LIMITS, begin, end)
    return [replace(sample, repeated=False) for sample in reader], reader


def check(data: bytes, cuts: tuple[int, ...] = (1024, 4096)) -> None:
    """Raise AssertionError, or the error of the reader, if it breaks a rule on these bytes."""
    for block in (data[:BLOCK], data[BLOCK : 2 * BLOCK]):
        is_header_or_end(block)
        with suppress(ValueError):
            pax_records(block)
        assert legible_name(block).isprintable()
    try:
        samples, reader = read(data)
    except ShardError:
        return
    offsets = [sample.offset for sample in samples]
    assert offsets == sorted(set(offsets))
    for sample in samples:
        assert sample.members.keys() <= set(sample.fields)
        assert sample.members or sample.damages or sample.fields
        assert not sample.truncated or sample.damages
        assert all(len(value) <= LIMITS.member_bytes for value in sample.members.values())
    assert not reader.broken or reader.failures or any(sample.damages for sample in samples)
    begins = (0, *cuts)
    parts = [read(data, begin, end) for begin, end in zip(begins, (*cuts, None), strict=True)]
    if parts_are_contiguous(
        InputRead(first_sample=part.first_sample, next_sample=part.next_sample) for _, part in parts
    ):
        assert [sample for some, _ in parts for sample in some] == samples


@pytest.mark.parametrize("name", list(load()))
def test_corpus(name: str) -> None:
    check(load()[name])


@given(st.binary(max_size=3000))
def test_arbitrary_bytes(data: bytes) -> None:
    check(data)


@given(st.integers(0, 1 << 32))
def test_mutations(seed: int) -> None:
    check(mutated(random.Random(seed), SEEDS))


SEEDS = [
    pack(write([*corpus(seed, 3), ("n" * 120 + "/é.jpg", b"1" * 700)], name))
    for seed, name in enumerate(("gnu", "pax"))
    for pack in PACK.values()
] + [write(corpus(count=3), "ustar", end=False)]


def mutated(source: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed after a few changes of bits, bytes, blocks, sizes and its length."""
    data = bytearray(source.choice(seeds))
    for _ in range(source.choice([1, 1, 2, 4, 16])):
        if not data:
            break
        at = source.randrange(len(data))
        block = at // BLOCK * BLOCK
        match source.randrange(8):
            case 0:
                data[at] ^= 1 << source.randrange(8)
            case 1:
                data[at : at + source.randrange(40)] = source.randbytes(source.randrange(40))
            case 2:
                data[block : block + BLOCK * source.randrange(4)] = bytes(BLOCK * source.randrange(4))
            case 3:
                other = source.choice(seeds)
                begin = source.randrange(len(other)) // BLOCK * BLOCK
                data[block:block] = other[begin : begin + BLOCK * source.randrange(6)]
            case 4:
                del data[at:]
            case 5:
                name = source.choice(["a.jpg", "00001.txt", "d/", "", "x.tar"])
                size = source.choice([0, 1, 700, (1 << 33) - 1])
                kind = source.choice(b"0 \0 5 1 2 3 6 7 S x g L K V ?".split(b" "))
                header = info(name, size=size, type=kind, linkname="b.jpg").tobuf(source.choice(list(FORMATS.values())))
                data[block : block + source.choice([0, BLOCK])] = header
            case 6 if len(data) >= block + BLOCK:  # another size or name with a right checksum
                header = bytearray(data[block : block + BLOCK])
                header[source.choice([source.randrange(100), source.randrange(124, 136), 156])] = source.randrange(256)
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                data[block : block + BLOCK] = header
            case 7:
                data += source.choice(seeds)
    return bytes(data)


def search(seconds: float, seed: int) -> None:
    """Mutate the corpus and the seeds for some time."""
    source, end, count, broken = random.Random(seed), time.monotonic() + seconds, 0, 0
    seeds = [*SEEDS, *load().values()]
    while time.monotonic() < end:
        data = mutated(source, seeds)
        cuts = tuple(sorted({source.randrange(1, len(data) + 2) for _ in range(2)}))
        count += 1
        try:
            check(data, cuts)
        except Exception as error:  # any error but a ShardError is a fault of the reader
            broken += 1
            sys.stderr.write(f"{line_of(f'{type(error).__name__}-{zlib.crc32(data):08x}', data)} {cuts}\n")
    sys.stderr.write(f"{count:,} inputs, {broken:,} of which broke a rule\n")
    sys.exit(broken > 0)


if __name__ == "__main__":
    search(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns())
