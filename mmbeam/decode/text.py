"""Bytes to strings: UTF-8 text and JSON. Not cleaning: the strings come as they were."""

import json

from mmbeam.config import Limits
from mmbeam.errors import DecodeError, LimitError, printable

_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def decode_text(data: bytes, limits: Limits) -> str:
    """Strict UTF-8, as it was but for a byte order mark. Raises DecodeError naming the first bad byte."""
    if len(data) > 4 * (limits.text_chars + 1):  # no character takes more than 4 bytes
        raise LimitError(f"text of {len(data):,} bytes, at most {limits.text_chars:,} characters are read")
    try:
        text = data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 4]
        raise DecodeError(f"no UTF-8: {error.reason} at byte {error.start:,}, where {bad!r} begins") from error
    if len(text) > limits.text_chars:
        raise LimitError(f"text of {len(text):,} characters, at most {limits.text_chars:,} are read")
    return text


def decode_metadata(data: bytes, limits: Limits) -> str:
    """JSON text, as it was but for a byte order mark, that is known to parse.

    NaN and Infinity are accepted, although no JSON: Python writes them, and so do the usual makers of
    shards. Raises DecodeError for what does not parse, or is nested deeper than Python parses.
    """
    text = decode_text(data, limits)
    try:
        json.loads(text)
    except RecursionError as error:
        raise DecodeError("JSON that is nested too deeply") from error
    except ValueError as error:
        raise DecodeError(f"no valid JSON: {printable(str(error))}") from error
    return text
