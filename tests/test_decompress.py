"""gzip and zstd streams: in many frames, truncated, corrupt, and far too large."""

import gzip
import io
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from mmbeam.errors import ShardError
from mmbeam.readers import decompress
from mmbeam.readers.decompress import Decompressed, is_compressed

DATA = np.random.default_rng(0).bytes(300_000) + b"easy to compress" * 30_000
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


@pytest.fixture(params=list(PACK))
def pack(request: pytest.FixtureRequest) -> Callable[[bytes], bytes]:
    return PACK[request.param]


def unpack(stored: bytes, expansion: float = 200.0, head: int = 512) -> tuple[bytes, tuple[str, str] | None]:
    """What comes out, and the fault."""
    stream = io.BytesIO(stored)
    raw = Decompressed(stream, stream.read(head), expansion)
    made = io.BufferedReader(raw, 50_000).read()
    assert not stream.closed
    return made, raw.fault


def test_whole(pack: Callable[[bytes], bytes]) -> None:
    assert unpack(pack(DATA)) == (DATA, None)
    assert is_compressed(pack(DATA))


def test_several_in_a_row(pack: Callable[[bytes], bytes]) -> None:
    pieces = [DATA[:1], b"", DATA[1:400_000], DATA[400_000:]]
    assert unpack(b"".join(map(pack, pieces))) == (DATA, None)


def test_zeros_between_and_behind_gzip_members() -> None:
    stored = PACK["gzip"](DATA[:500]) + b"\0" * 100_000 + PACK["gzip"](DATA[500:]) + b"\0" * 100_000
    assert unpack(stored) == (DATA, None)


def test_skippable_zstd_frames() -> None:
    stored = SKIPPABLE + PACK["zstd"](DATA) + SKIPPABLE
    assert is_compressed(stored)
    assert unpack(stored) == (DATA, None)


def test_cut_anywhere(pack: Callable[[bytes], bytes]) -> None:
    """All bytes ahead of the cut: with gzip each one, with zstd each whole block, of at most 128 KiB."""
    stored = pack(DATA[:400_000]) + pack(DATA[400_000:])
    boundary = len(pack(DATA[:400_000]))
    for cut in (*range(4, len(stored), 9973), boundary - 1, boundary + 1, len(stored) - 1):
        made, fault = unpack(stored[:cut])
        assert DATA.startswith(made)
        assert cut == boundary or fault is not None
        assert fault is None or "ends too early" in fault[1]
        assert len(made) >= min(cut - 500, 300_000) - (0 if stored[:2] == b"\x1f\x8b" else 131_072)


@pytest.mark.parametrize("back", [1, 4])
def test_wrong_checksum_costs_no_byte(pack: Callable[[bytes], bytes], back: int) -> None:
    stored = bytearray(pack(DATA))
    stored[-back] ^= 1
    made, fault = unpack(bytes(stored))
    assert made == DATA
    assert fault is not None
    assert fault[0] == "DecodeError"
    assert "checksum" in fault[1].lower() or "length of a gzip member" in fault[1]


@pytest.mark.parametrize("flags", [0, 2, 4, 8, 16, 30])
def test_gzip_headers_with_optional_fields(flags: int) -> None:
    plain = PACK["gzip"](DATA)
    extra = (b"\x03\0abc" if flags & 4 else b"") + (b"name\0" if flags & 8 else b"")
    extra += (b"a comment\0" if flags & 16 else b"") + (b"\x12\x34" if flags & 2 else b"")
    stored = plain[:3] + bytes([flags]) + plain[4:10] + extra + plain[10:]
    assert unpack(stored * 2) == (DATA * 2, None)


def test_bytes_ahead_of_damage(pack: Callable[[bytes], bytes]) -> None:
    """A flipped bit may leave a gzip stream valid; then the checksum finds it."""
    stored = pack(DATA)
    for where in range(20, len(stored), 7919):
        damaged = bytearray(stored)
        damaged[where] ^= 0x40
        made, fault = unpack(bytes(damaged))
        assert fault is not None
        same = next((at for at, (a, b) in enumerate(zip(made, DATA, strict=False)) if a != b), len(made))
        assert same >= min(where - 500, 290_000) - (0 if stored[:2] == b"\x1f\x8b" else 131_072)


def test_corrupt_data_in_the_middle_is_an_error(pack: Callable[[bytes], bytes]) -> None:
    stored = pack(DATA[:200_000]) + b"this is no frame" * 10_000
    made, fault = unpack(stored)
    assert DATA.startswith(made)
    assert fault is not None


def test_grows_beyond_the_limit(pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "EXPANSION_FREE", 1_000_000)
    stored = pack(b"\0" * 30_000_000)
    made, fault = unpack(stored, expansion=10.0)
    assert fault is not None
    assert fault[0] == "LimitError"
    assert "beyond 10 times" in fault[1]
    assert 0 < len(made) <= 1_000_000 + 10 * len(stored)
    assert unpack(stored, expansion=1e6)[1] is None


@pytest.mark.parametrize("error", [ShardError("changed"), PermissionError(13, "no"), OSError(5, "EIO")])
def test_errors_of_the_stream_pass(pack: Callable[[bytes], bytes], error: Exception) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 100_000:
                raise error
            return super().read(size)

    stream = Failing(pack(DATA))
    with pytest.raises(type(error)) as raised:
        io.BufferedReader(Decompressed(stream, stream.read(512), 200.0)).read()
    assert raised.value is error
