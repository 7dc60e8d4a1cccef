"""Shared by the decoders: codec exceptions as sample errors, the memory of one value, and unknown bytes in words."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmbeam.errors import DecodeError, LimitError, SampleError, printable

_SIGNS_OF_A_CUT = ("truncat", "premature end", "not enough data", "end of file", "eof")


class LargeValueError(Exception):
    """Decoding a value takes more memory than the caller allows now; `nbytes` is how much. Not the sample's fault."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"{nbytes:,} bytes")
        self.nbytes = nbytes


def check_memory(what: str, nbytes: int, limit: int, allowed: int | None) -> None:
    """Raise LimitError if decoding takes more than `limit`, LargeValueError if more than `allowed`."""
    if nbytes > limit:
        raise LimitError(
            f"{what} takes {nbytes / 1e6:,.0f} MB to decode, at most {limit / 1e6:,.0f} MB are used "
            "(--max-decode-bytes)"
        )
    if allowed is not None and nbytes > allowed:
        raise LargeValueError(nbytes)


@contextmanager
def codec_errors(what: str, size: int) -> Iterator[None]:
    """Raise any exception of a codec on `size` bytes of `what` as a DecodeError.

    Codecs raise OSError, SyntaxError, struct.error, zlib.error and others. MemoryError, SampleError and LargeValueError
    pass through.
    """
    try:
        yield
    except (MemoryError, SampleError, LargeValueError):
        raise
    except Exception as error:
        text = getattr(error, "error_string", str(error))  # soundfile's, without the address of the file object
        reason = printable(text) or type(error).__name__
        state = "truncated" if any(sign in reason.lower() for sign in _SIGNS_OF_A_CUT) else "damaged"
        raise DecodeError(f"{state} {what} ({size:,} bytes): {reason}") from error


def first_bytes(data: bytes) -> str:
    """Return a description of the first bytes, for an error about an unknown format."""
    return f"it begins with {data[:16]!r}" if data else "it is empty"
