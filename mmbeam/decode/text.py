"""Bytes to strings: UTF-8 text and JSON, without any cleaning."""

import json

from mmbeam.clean.text import json_integer
from mmbeam.config import Limits
from mmbeam.errors import DecodeError, LimitError, printable

_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def decode_text(data: bytes, limits: Limits) -> str:
    """Decode strict UTF-8 and remove a byte order mark. Raises DecodeError naming the first bad byte, LimitError."""
    if len(data) > 4 * (limits.text_chars + 1):  # no character takes more than 4 bytes
        raise LimitError(
            f"text of {len(data):,} bytes, at most {limits.text_chars:,} characters are read (--max-text-chars)"
        )
    text = _from_utf8(data)
    if len(text) > limits.text_chars:
        raise LimitError(f"text of {len(text):,} characters, at most {limits.text_chars:,} are read (--max-text-chars)")
    return text


def decode_metadata(data: bytes, limits: Limits) -> str:
    """Return JSON text that is known to parse, without a byte order mark.

    NaN and Infinity are accepted: they are not JSON, but Python and the usual tools that make shards write them.
    Raises DecodeError for invalid JSON and for JSON nested deeper than Python parses, LimitError.
    """
    if len(data) > limits.metadata_bytes:
        raise LimitError(
            f"JSON of {len(data):,} bytes, at most {limits.metadata_bytes:,} are read (--max-metadata-bytes)"
        )
    text = _from_utf8(data)
    try:
        json.loads(text, parse_int=json_integer)
    except RecursionError as error:
        raise DecodeError("JSON is nested too deeply") from error
    except ValueError as error:
        raise DecodeError(f"invalid JSON: {printable(str(error))}") from error
    return text


def _from_utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 4]
        raise DecodeError(f"not UTF-8: {error.reason} at byte {error.start:,}: {bad!r}") from error
