"""What is written to a terminal beside the output of a command: the log, and the characters that clear a line."""

import logging
import os
import sys

CLEAR_LINE = "\r\x1b[K"  # removes the progress line from a terminal


def clear_line() -> str:
    """Return CLEAR_LINE if stderr is a terminal, else an empty string."""
    return CLEAR_LINE if os.isatty(2) else ""


def log_to_stderr(level: int, libraries: int) -> None:
    """Log mmbeam's messages from `level` on to stderr, and those of libraries from `libraries` on."""
    line = f"{clear_line()}%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, level=libraries, stream=sys.stderr)
    logging.getLogger("mmbeam").setLevel(level)
