"""The command line. It starts fast: a command imports what it needs when it runs.

Exit status: 0 done, 1 failed, 2 invalid arguments, 3 done but some work units failed (run again to retry), 130
interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

import argparse
import atexit
import errno
import io
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
from mmbeam.errors import MmbeamError, UsageError, redact
from mmbeam.terminal import before_exit, clear_line, log_to_stderr

_MESSAGES = {
    int(signal.SIGINT): "interrupted",
    int(signal.SIGTERM): "terminated",
}  # the message to print, by signal number
CLEANUP_SECONDS = 3.0  # time limit of the `before_exit` callbacks
_FULL = (errno.ENOSPC, errno.EDQUOT)
_exiting = threading.Lock()


def entry() -> NoReturn:
    """Run `main`, and exit the process with its status without joining threads that libraries left.

    Threads of Beam and gRPC outlive a job. If the interpreter shuts down while one of them is in C++ code, the process
    aborts after its work is done (about one run in fifty). `atexit._run_exitfuncs` is private, but Python has
    no public function that runs the exit handlers, which end child processes and remove temporary files, without
    joining all threads first.
    """
    status = main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` (default: sys.argv) and return its exit status."""
    args = argparse.Namespace(verbose=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")  # a caption in another script must not end the command
    try:
        args = parse(argv)
        if args.verbose:
            log_to_stderr(logging.DEBUG, libraries=logging.INFO)
        else:  # mmbeam prints its own message for an error of a library
            log_to_stderr(logging.WARNING, libraries=logging.CRITICAL)
            warnings.simplefilter("ignore")
        with _exit_on_signal():
            lines = command(args.command).run(args)
            while True:
                try:
                    line = next(lines)
                except StopIteration as end:
                    sys.stdout.flush()
                    return int(end.value)
                print(_without_control_characters(line), flush=True)
    except UsageError as error:
        return _report_error(error, 2, args)
    except BrokenPipeError:  # the reader of our output, `head` for example, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MmbeamError, OSError) as error:
        return _report_error(error, 1, args)
    except Exception as error:  # raised by a store or a runner, or a bug: print one line instead of a traceback
        return _report_error(f"{type(error).__name__}: {error} (--verbose shows where)", 1, args)


def _report_error(error: object, status: int, args: argparse.Namespace) -> int:
    """Print one message on stderr, after the traceback if --verbose was given. Return `status`."""
    if args.verbose:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        advice = "; free some space, and run the same command again to resume" if error.errno in _FULL else ""
        error = f"{place}{error.strerror}{advice}"
    message = _with_options(redact(str(error)), args)
    print(f"mmbeam: {_without_control_characters(message)}", file=sys.stderr)
    return status


def _with_options(message: str, args: argparse.Namespace) -> str:
    """Return `message` with each Python argument that it quotes (`batch_size`) replaced by its option --batch-size."""
    options = {name: f"--{name.replace('_', '-')}" for name in vars(args)}
    # Messages also name plurals (`models`), and `split_fractions`, which --split sets. Exact names win.
    # Commands that read a job's results lack --input and --output, but their messages may refer to them.
    options = {"input": "SHARDS" if "shards" in options else "--input", "output": "--output"} | options
    options = {f"{name}s": option for name, option in options.items()} | {"split_fractions": "--split"} | options
    return re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[0]), message)


def _without_control_characters(text: str) -> str:
    """Return `text` fit for a terminal: keys and names of shards come from untrusted input."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


@contextmanager
def _exit_on_signal() -> Iterator[None]:
    """End the process on Ctrl-C and SIGTERM immediately, without finishing the units in progress.

    That loses nothing: a unit is committed whole or not at all. A separate thread waits for the signal, because the
    main thread may be in a runner's code that runs no signal handler for seconds. A signal that this process was
    started to ignore (Ctrl-C, in a background job of a shell) is still ignored.
    """
    before = {number: signal.getsignal(number) for number in _MESSAGES}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    for number in before:
        signal.signal(number, _exit_now)
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_signal, args=(receiver,), name="mmbeam-signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()


def _wait_for_signal(receiver: socket.socket) -> None:
    """End the process when the number of a signal arrives; return when the other end is closed."""
    with receiver:
        while number := receiver.recv(1):
            if number[0] in _MESSAGES:
                _exit_now(number[0])


def _exit_now(number: int, _frame: object = None) -> None:
    """End this process and its children because of a signal: called by the handler and by the waiting thread."""
    if not _exiting.acquire(blocking=False):
        return  # the other caller is ending the process
    cleaning = threading.Thread(target=lambda: [call() for call in before_exit], daemon=True)
    cleaning.start()
    cleaning.join(timeout=CLEANUP_SECONDS)  # a store may not answer
    for file in Path("/proc/self/task").glob("*/children"):  # a job server, for example, would outlive this process
        with suppress(OSError):  # a thread or child may have ended
            for pid in file.read_text().split():
                os.kill(int(pid), signal.SIGTERM)
    on_cluster = any(arg.partition("=")[0] == "--runner" for arg in sys.argv)
    cluster = " (a job on a cluster continues until it is cancelled there)" if on_cluster else ""
    message = f"{clear_line()}mmbeam: {_MESSAGES[number]}. Run the same command again to resume{cluster}\n"
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress line after the message
    os.write(stderr, message.encode())
    os._exit(128 + number)


if __name__ == "__main__":
    entry()
