"""Shared by the decoders: codec exceptions as sample errors, and the description of unknown bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmbeam.errors import DecodeError, SampleError, printable

_SIGNS_OF_A_CUT = ("truncat", "premature end", "not enough data", "end of file", "eof")


@contextmanager
def codec_errors(what: str, size: int) -> Iterator[None]:
    """Raise any exception of a codec on `size` bytes of `what` as a DecodeError.

    Codecs raise OSError, SyntaxError, struct.error, zlib.error and others. MemoryError and SampleError pass
    through.
    """
    try:
        yield
    except (MemoryError, SampleError):
        raise
    except Exception as error:
        text = getattr(error, "error_string", str(error))  # soundfile's, without the address of the file object
        reason = printable(text) or type(error).__name__
        state = "truncated" if any(sign in reason.lower() for sign in _SIGNS_OF_A_CUT) else "damaged"
        raise DecodeError(f"{state} {what} ({size:,} bytes): {reason}") from error


def first_bytes(data: bytes) -> str:
    """Return a description of the first bytes, for an error about an unknown format."""
    return f"it begins with {data[:16]!r}" if data else "it is empty"
