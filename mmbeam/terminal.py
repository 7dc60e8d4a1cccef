"""The terminal of a command: its log, the characters that clear a line, and what a signal from it calls."""

import logging
import os
import sys
from collections.abc import Callable

from mmbeam.errors import redact

CLEAR_LINE = "\r\x1b[K"  # removes the progress line from a terminal
before_exit: list[Callable[[], None]] = []  # called before a signal ends the process


def clear_line() -> str:
    """Return CLEAR_LINE if stderr is a terminal, else an empty string."""
    return CLEAR_LINE if os.isatty(2) else ""


class _RedactingFormatter(logging.Formatter):
    """Formats records without credentials, whatever library wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_stderr(level: int, libraries: int) -> None:
    """Log mmbeam's messages from `level` on to stderr, and those of libraries from `libraries` on."""
    line = f"{clear_line()}%(levelname)s %(name)s: %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter(line))
    logging.basicConfig(level=libraries, handlers=[handler])
    logging.getLogger("mmbeam").setLevel(level)
