"""The operations on an output directory, over local paths and any URL that fsspec opens.

A file is built in scratch and becomes visible as a whole when it is published. No operation opens a file for writing
under its final name, because an exception during such a write would publish a truncated file.
"""

import errno
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from mmbeam.errors import JobError
from mmbeam.readers.paths import file_system, public_path
from mmbeam.readers.retry import retry

SCRATCH = "_mmbeam/tmp"
ATTEMPTS = "_mmbeam/attempts"  # marks of attempts at units
SCRATCH_SECONDS = 24 * 3600.0  # age at which scratch files of another machine are stale

_SCRATCH_FILE = re.compile(
    r"mmbeam-.+-\d+-[0-9a-f]{32}(\.\w+)?"
)  # as scratch_file names them; /tmp holds files of other programs too
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_moving = threading.Lock()

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A directory of files, named by their relative path ("data/part-0.parquet"). Picklable, thread-safe.

    - Local: `create` makes a hard link from scratch on the same file system; data and directory are synchronised to
      the disk. A file system without hard links is an error.
    - GCS and S3: `create` is one conditional put (if-generation-match 0; If-None-Match *).
    - Others (memory, sftp, hdfs): a put under a temporary name, then a check and a move under a lock. This is exclusive
      among the threads of one process only: two processes may both create a file. `replace` briefly leaves no file.
    """

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        if "://" not in self.url:  # a worker may have another working directory
            object.__setattr__(self, "url", str(Path(self.url).expanduser().absolute()))

    def __str__(self) -> str:
        return public_path(self.url)

    def list(self, folder: str) -> dict[str, int]:
        """Return name and size in bytes of the files directly in `folder`; empty if it does not exist."""
        fs, path = self._at(folder)
        if isinstance(fs, LocalFileSystem):
            return _list_local(path)
        fs.invalidate_cache(path)
        try:
            entries = self._ask(folder, "cannot be listed", lambda: fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        files = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}
        return {name: size for name, size in files.items() if name}

    def read(self, name: str) -> bytes:
        """Return the content of the file. Raises FileNotFoundError."""
        fs, path = self._at(name)
        return bytes(self._ask(name, "cannot be read", lambda: fs.cat_file(path)))

    def tail(self, name: str, size: int) -> bytes:
        """Return the last `size` bytes of the file, or all of it if it is shorter."""
        fs, path = self._at(name)
        return bytes(self._ask(name, "cannot be read", lambda: fs.cat_file(path, start=-size)))

    def exists(self, name: str) -> bool:
        """Return whether the file exists."""
        fs, path = self._at(name)
        fs.invalidate_cache(path)
        return bool(self._ask(name, "cannot be read", lambda: fs.exists(path)))

    def modified(self, name: str) -> float:
        """Return when the file was written, in Unix time by the store's clock. Raises FileNotFoundError."""
        fs, path = self._at(name)
        fs.invalidate_cache(path)
        time_written: datetime = self._ask(name, "cannot be read", lambda: fs.modified(path))
        return (time_written if time_written.tzinfo else time_written.replace(tzinfo=UTC)).timestamp()

    def now(self) -> float:
        """Return the time by the store's clock. It writes a file."""
        name = f"_mmbeam/clock-{uuid.uuid4().hex}"
        self.replace(name, b"")
        try:
            return self.modified(name)
        finally:
            self.remove(name)

    def size(self, name: str) -> int | None:
        """Return the size of the file in bytes; None if it does not exist."""
        fs, path = self._at(name)
        fs.invalidate_cache(path)
        try:
            return int(self._ask(name, "cannot be read", lambda: fs.size(path)))
        except FileNotFoundError:
            return None

    def create(self, name: str, source: Path | bytes) -> None:
        """Publish bytes or a scratch file under a new name. The scratch file is removed.

        Raises FileExistsError if the file exists. If a response is lost, the client of the store repeats the request,
        which may then fail with FileExistsError although this call created the file. If the difference matters, read
        the file.
        """
        self._publish(name, source, exclusive=True)

    def replace(self, name: str, source: Path | bytes) -> None:
        """Publish bytes or a scratch file, replacing any file of that name. The scratch file is removed."""
        self._publish(name, source, exclusive=False)

    def remove(self, name: str) -> None:
        """Remove the file if it exists."""
        fs, path = self._at(name)
        try:
            self._ask(name, "cannot be removed", lambda: fs.rm_file(path))
        except FileNotFoundError:
            return

    def scratch(self) -> Path:
        """Return the local directory in which files are built: in the store if it is local, so that links work."""
        fs, path = self._at(SCRATCH)
        if not isinstance(fs, LocalFileSystem):
            return Path(tempfile.gettempdir())
        Path(path).mkdir(parents=True, exist_ok=True)
        return Path(path)

    def scratch_file(self, suffix: str = "") -> Path:
        """Return a new path in scratch, unique to this attempt."""
        return self.scratch() / f"mmbeam-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}{suffix}"

    def sweep_scratch(self) -> None:
        """Remove scratch files of dead attempts: those of ended processes of this host, and those older than a day.

        Containers that share a host name but not their processes can lose files in use. Their attempt then fails to
        publish and is retried.
        """
        for path in self.scratch().glob("mmbeam-*"):
            if _SCRATCH_FILE.fullmatch(path.name) and path.is_file() and _is_stale(path):
                with suppress(PermissionError):  # of another user, in a shared temporary directory
                    path.unlink(missing_ok=True)

    def _ask(self, name: str, failure: str, action: Callable[[], T]) -> T:
        """Return `action()`, a request for `name`, repeated after faults if the store is not local."""
        fs, _ = self._at(name)
        return action() if isinstance(fs, LocalFileSystem) else retry(action, f"{self}/{name}", failure)

    def _at(self, name: str) -> tuple[Any, str]:
        fs, root = _file_system(self.url, os.getpid())
        return fs, f"{root}/{name}"

    def _publish(self, name: str, source: Path | bytes, exclusive: bool) -> None:
        fs, path = self._at(name)
        if isinstance(source, bytes):
            spooled = self.scratch_file()
            spooled.write_bytes(source)
            source = spooled
        try:
            if isinstance(fs, LocalFileSystem):
                _publish_local(source, Path(path), exclusive)
            elif isinstance(fs, AsyncFileSystem):
                mode = "create" if exclusive else "overwrite"
                self._ask(name, "cannot be written", lambda: fs.put_file(str(source), path, mode=mode))
            else:
                _publish_by_move(fs, source, path, exclusive)
        finally:
            source.unlink(missing_ok=True)


@dataclass(frozen=True)
class DryStore(Store):
    """A store for a dry run: what is written or removed is seen by this object, and nothing reaches the directory."""

    written: dict[str, bytes | None] = field(default_factory=dict, repr=False, compare=False)  # None: removed

    def __reduce__(self) -> tuple[type["DryStore"], tuple[str]]:
        """Pickle without what was written: the description of a job does not grow with its plan."""
        return DryStore, (self.url,)

    def list(self, folder: str) -> dict[str, int]:
        """As `Store.list`."""
        sizes = super().list(folder)
        for name, content in self.written.items():
            parent, _, file = name.rpartition("/")
            if parent == folder:
                sizes.pop(file, None)
                sizes |= {} if content is None else {file: len(content)}
        return sizes

    def read(self, name: str) -> bytes:
        """As `Store.read`."""
        if name not in self.written:
            return super().read(name)
        content = self.written[name]
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self}/{name}")
        return content

    def tail(self, name: str, size: int) -> bytes:
        """As `Store.tail`."""
        return self.read(name)[-size:] if name in self.written else super().tail(name, size)

    def exists(self, name: str) -> bool:
        """As `Store.exists`."""
        return self.written[name] is not None if name in self.written else super().exists(name)

    def size(self, name: str) -> int | None:
        """As `Store.size`."""
        content = self.written.get(name)
        return (None if content is None else len(content)) if name in self.written else super().size(name)

    def modified(self, name: str) -> float:
        """As `Store.modified`."""
        return time.time() if self.written.get(name) is not None else super().modified(name)

    def now(self) -> float:
        """Return the time by this machine's clock."""
        return time.time()

    def create(self, name: str, source: Path | bytes) -> None:
        """As `Store.create`, in memory."""
        if self.exists(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self}/{name}")
        self.replace(name, source)

    def replace(self, name: str, source: Path | bytes) -> None:
        """As `Store.replace`, in memory."""
        self.written[name] = source if isinstance(source, bytes) else source.read_bytes()
        if isinstance(source, Path):
            source.unlink()

    def remove(self, name: str) -> None:
        """As `Store.remove`, in memory."""
        self.written[name] = None

    def scratch(self) -> Path:
        """Return the directory for temporary files of this machine."""
        return Path(tempfile.gettempdir())

    def sweep_scratch(self) -> None:
        """Do nothing."""


@cache
def _file_system(url: str, _pid: int) -> tuple[Any, str]:
    """Return the file system of a store, one per process (none survives a fork), without cached listings."""
    fs, root = file_system(url, use_listings_cache=False)
    return fs, root.rstrip("/")


def forget_file_systems() -> None:
    """Open every store anew from now on."""
    _file_system.cache_clear()


def _list_local(path: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        sizes[entry.name] = entry.stat().st_size
                except FileNotFoundError:  # removed during the listing
                    continue
    except FileNotFoundError:
        return {}
    return sizes


def _publish_local(source: Path, final: Path, exclusive: bool) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        os.fsync(file.fileno())
    try:
        if exclusive:
            os.link(source, final)
        else:
            source.replace(final)
    except OSError as error:
        if not exclusive or error.errno not in _NO_LINKS:
            raise
        raise JobError(
            f"{final.parent}: expected a file system with hard links, with which a finished file is published exactly "
            f"once; found one without ({error.strerror}). Choose an `output` on another file system"
        ) from error
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:  # some network file systems do not support it
            raise
    finally:
        os.close(descriptor)


def _publish_by_move(fs: Any, source: Path, final: str, exclusive: bool) -> None:
    folder, _, name = final.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}"
    fs.makedirs(folder, exist_ok=True)
    fs.put_file(str(source), temporary)
    with _moving:
        if fs.exists(final):
            if exclusive:
                fs.rm_file(temporary)
                raise FileExistsError(errno.EEXIST, "created by another attempt", final)
            fs.rm_file(final)
        fs.mv(temporary, final)


def _is_stale(path: Path) -> bool:
    host, pid = path.name.removeprefix("mmbeam-").rsplit("-", 2)[:2]
    if host == socket.gethostname() and pid.isdecimal() and not process_exists(int(pid)):
        return True
    try:
        return time.time() - path.stat().st_mtime > SCRATCH_SECONDS
    except FileNotFoundError:
        return False


def process_identity() -> dict[str, Any]:
    """Return what identifies this process among those of all hosts and containers, for `process_is_gone`."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "space": _process_namespace(),
        "start": _state(os.getpid())[1],
    }


def process_is_gone(identity: Mapping[str, Any]) -> bool | None:
    """Return whether the process of `process_identity` has ended; None if it cannot be looked up from here."""
    if identity.get("space", identity["host"]) not in (_process_namespace(), socket.gethostname()):
        return None
    pid = int(identity["pid"])
    state, start = _state(pid)
    return not process_exists(pid) or state == "Z" or identity.get("start") not in (None, start)


@cache
def _process_namespace() -> str:
    """Return an identifier of this process namespace; containers on one host have different ones."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # a system without /proc
        return socket.gethostname()


def _state(pid: int) -> tuple[str | None, int | None]:
    """Return the state of the process ("Z": ended, not yet reaped) and when it started, in the system's ticks.

    Process ids are reused, so that only both identify a process. None if unknown.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None, None


def process_exists(pid: int) -> bool:
    """Return whether a process of this host has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
