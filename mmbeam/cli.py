"""The command line. It starts fast: a command imports what it needs when it runs.

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
    """Run `main` as the shell does, and exit without waiting for threads of libraries.

    Threads of Beam and gRPC outlive a job. If the interpreter shuts down while one of them is in C++ code, the process
    aborts after its work is done (about one run in fifty). Python has no public way to run the exit handlers, which end
    child processes and remove temporary files, without joining all threads first; hence the private one.
    """
    status = main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` (default: sys.argv) and return its exit status."""
    args = argparse.Namespace(verbose=False)
    try:
        args = parse(argv)
        _set_up_logging(args.verbose)
        with _exit_on_interrupt():
            status = _run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _report_error(error, 2, args)
    except BrokenPipeError:  # the reader of our output, `head` for example, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MmbeamError, OSError) as error:
        return _report_error(error, 1, args)
    except Exception as error:  # of a store, a runner, or a bug: one line instead of a traceback
        return _report_error(f"{type(error).__name__}: {error} (--verbose shows where)", 1, args)


def _run(args: argparse.Namespace) -> int:
    lines = command(args.command).run(args)
    while True:
        try:
            line = next(lines)
        except StopIteration as end:
            return int(end.value)
        print(_without_control_characters(line), flush=True)


def _report_error(error: object, status: int, args: argparse.Namespace) -> int:
    """Print one message on stderr, after the traceback if --verbose was given. Return `status`."""
    if args.verbose:
        traceback.print_exc()
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    print(f"mmbeam: {_without_control_characters(_with_options(str(error), args))}", file=sys.stderr)
    return status


def _with_options(message: str, args: argparse.Namespace) -> str:
    """Return the message of a library error with the arguments it names (`batch_size`) as options (--batch-size)."""
    options = {name: f"--{name.replace('_', '-')}" for name in vars(args)}
    options = {f"{name}s": option for name, option in options.items()} | {"shares": "--split"} | options
    return re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[0]), message)


def _without_control_characters(text: str) -> str:
    """Return `text` fit for a terminal: keys and names of shards come from untrusted input."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """End the process on Ctrl-C immediately, without finishing the units in progress.

    That loses nothing: a unit is committed whole or not at all. A separate thread waits for the signal, because the
    main thread may be in a runner's code that runs no signal handler for seconds.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a background job of a shell, for example
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.signal(signal.SIGINT, _interrupted)
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_interrupt, args=(receiver,), name="mmbeam-interrupt", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        signal.signal(signal.SIGINT, before)
        sender.close()


def _wait_for_interrupt(receiver: socket.socket) -> None:
    """End the process when the number of SIGINT arrives; return when the other end is closed."""
    with receiver:
        while number := receiver.recv(1):
            if number[0] == signal.SIGINT:
                _interrupted()


def _interrupted(*_: object) -> None:
    cluster = " (a job on a cluster continues until it is cancelled there)" if _names_runner() else ""
    os.write(2, f"{_clear_line()}mmbeam: interrupted. Run the same command again to resume{cluster}\n".encode())
    with suppress(OSError):  # a child may have ended
        for child in _children():  # a job server, for example, would outlive this process
            os.kill(child, signal.SIGTERM)
    os._exit(INTERRUPTED)


def _names_runner() -> bool:
    """Return whether the command names a runner; it may run on other machines."""
    return any(arg.partition("=")[0] == "--runner" for arg in sys.argv)


def _children() -> list[int]:
    """Return the child processes of this one; none if the system has no /proc."""
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def _clear_line() -> str:
    """Return the characters that clear a progress line on a terminal."""
    return "\r\x1b[K" if os.isatty(2) else ""


def _set_up_logging(verbose: bool) -> None:
    """Log mmbeam's messages to stderr, and those of libraries only with --verbose: mmbeam reports failures itself."""
    level = logging.INFO if verbose else logging.CRITICAL
    line = f"{_clear_line()}%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, level=level, stream=sys.stderr)
    logging.getLogger("mmbeam").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    entry()
