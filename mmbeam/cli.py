"""The command line. Quick to start: what a command needs is imported when the command runs.

Exit status: 0 done, 1 the job failed, 2 bad arguments, 3 done but some units failed (run again), 130 interrupted.
"""

import argparse
import atexit
import logging
import os
import re
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from mmbeam.commands import command, parse
from mmbeam.errors import MmbeamError, UsageError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def entry() -> NoReturn:
    """What the shell starts: `main`, and an end that waits for no thread of a library.

    Beam's and gRPC's threads outlive a job; where the interpreter takes them down in the middle of C++
    code, the process aborts after all its work is done (seen once in about fifty runs).
    """
    status = main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = argparse.Namespace(verbose=False)
    try:
        args = parse(argv)
        _set_up_logging(args.verbose)
        with _interrupt_ends_it():
            status = _run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _report_error(error, 2, args)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MmbeamError, OSError) as error:
        return _report_error(error, 1, args)
    except Exception as error:  # of a store, a runner, or ours: nobody reads 50 lines to find the last one
        return _report_error(f"{type(error).__name__}: {error} (--verbose shows where)", 1, args)


def _run(args: argparse.Namespace) -> int:
    lines = command(args.command).run(args)
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            return int(end.value)
        print(_harmless(line), flush=True)


def _report_error(error: object, status: int, args: argparse.Namespace) -> int:
    """Print one message on stderr, after the traceback if --verbose was given. Return `status`."""
    if args.verbose:
        traceback.print_exc()
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    print(f"mmbeam: {_harmless(_with_options(str(error), args))}", file=sys.stderr)
    return status


def _with_options(message: str, args: argparse.Namespace) -> str:
    """Return the message of a library error with the arguments it names (`batch_size`) as options (--batch-size)."""
    options = {name: f"--{name.replace('_', '-')}" for name in vars(args)} | {"models": "--model"}
    return re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[0]), message)


def _harmless(text: str) -> str:
    """Without control characters: keys and names of shards come from strangers and go to a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


@contextmanager
def _interrupt_ends_it() -> Iterator[None]:
    """While this lasts, Ctrl-C ends the process at once, and not when the units that are being worked on are done.

    Nothing is lost by it: a unit is committed whole or not at all. A thread of its own waits for the
    signal, because the main one may be in a runner's code that lets no handler run for seconds.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a shell's background job, say, is not to be interrupted
        yield
        return
    told, teller = socket.socketpair()
    teller.setblocking(False)
    signal.signal(signal.SIGINT, _interrupted)
    woken = signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_interrupt, args=(told,), name="mmbeam-interrupt", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGINT, before)
        teller.close()


def _wait_for_interrupt(told: socket.socket) -> None:
    """End the process when the number of SIGINT comes; return when the other end is closed."""
    with told:
        while number := told.recv(1):
            if number[0] == signal.SIGINT:
                _interrupted()


def _interrupted(*_: object) -> None:
    cluster = " (a cluster goes on with its job until it is cancelled there)" if _has_runner() else ""
    os.write(2, f"{_clear_line()}mmbeam: interrupted; the same command again does the rest{cluster}\n".encode())
    with suppress(OSError):  # one that is gone by now
        for child in _children():  # a job server, say, which would outlive this process
            os.kill(child, signal.SIGTERM)
    os._exit(INTERRUPTED)


def _has_runner() -> bool:
    """Whether the command named one, which may be another machine's."""
    return any(arg.partition("=")[0] == "--runner" for arg in sys.argv)


def _children() -> list[int]:
    """The processes that this one has started, where the system tells."""
    return [int(pid) for each in Path("/proc/self/task").glob("*/children") for pid in each.read_text().split()]


def _clear_line() -> str:
    """What removes a progress line that may stand on the terminal."""
    return "\r\x1b[K" if os.isatty(2) else ""


def _set_up_logging(verbose: bool) -> None:
    """mmbeam's own messages to stderr; the libraries' only with --verbose: what fails, mmbeam says itself."""
    level = logging.INFO if verbose else logging.CRITICAL
    line = f"{_clear_line()}%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, level=level, stream=sys.stderr)
    logging.getLogger("mmbeam").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    entry()
