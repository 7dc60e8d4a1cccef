"""gzip and zstd streams: in many frames, truncated, corrupt, and far too large."""

import gzip
import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from mmbeam.errors import ShardError
from mmbeam.readers import decompress
from mmbeam.readers.decompress import Decompressed, is_compressed

DATA = np.random.default_rng(0).bytes(300_000) + b"easy to compress" * 30_000
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
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
    stored = pack(DATA[:400_000]) + pack(DATA[400_000:])
    boundary = len(pack(DATA[:400_000]))
    for cut in (*range(4, len(stored), 9973), len(stored) - 1):
        made, fault = unpack(stored[:cut])
        assert DATA.startswith(made)
        assert cut == boundary or fault is None or fault[0] == "DecodeError"
        assert cut == boundary or fault is not None or made == DATA  # zstd's last byte may be a mere end mark
        assert len(made) >= min(cut, 300_000) - 140_000  # nearly all that had come; a zstd block is 128 KiB


def test_a_truncated_gzip_yields_all_data_before_the_cut() -> None:
    made, fault = unpack(PACK["gzip"](DATA)[:200_000])
    assert len(made) > 199_000
    assert fault == ("DecodeError", "cannot be decompressed beyond stored byte 200,000: the gzip stream ends too early")


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
