"""The few verbs that an output directory needs, over local paths and any URL that fsspec opens.

Files are written whole, once, and become visible at once: what is being written lies in scratch, and
publishing is the last step. There is no verb that opens a file for writing under its final name, since
an exception in the middle of such a write publishes a short file. Shards are not read through this.
"""

import errno
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mmbeam.errors import JobError
from mmbeam.readers.paths import public_path

SCRATCH = "_mmbeam/tmp"
SCRATCH_SECONDS = 24 * 3600.0  # scratch of another machine is stale when it is this old

_SCRATCH_FILE = re.compile(r"mmbeam-.+-\d+-[0-9a-f]{32}(\.\w+)?")  # as scratch_file names them; /tmp holds others' too
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_moving = threading.Lock()


@dataclass(frozen=True)
class Store:
    """A directory of files, named by their path in it ("data/part-0.parquet"). Picklable, thread-safe.

    - Local: `create` is a hard link made from scratch on the same file system; the data and the
      directory are synchronised to the disk. A file system without hard links is refused.
    - GCS and S3: `create` is one conditional put (if-generation-match 0; If-None-Match *).
    - Anything else (memory, sftp, hdfs): a look, a put under a temporary name, and a move. That is
      exclusive among the threads of one process; two processes may both believe they created a file,
      and `replace` leaves a moment without the file.
    """

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        if "://" not in self.url:  # a worker may have another working directory
            object.__setattr__(self, "url", str(Path(self.url).expanduser().absolute()))

    def __str__(self) -> str:
        return public_path(self.url)

    def list(self, folder: str) -> dict[str, int]:
        """Names and sizes in bytes of the files right under `folder`; empty if it does not exist."""
        fs, path = self._at(folder)
        if isinstance(fs, LocalFileSystem):
            return _list_local(path)
        fs.invalidate_cache(path)
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        files = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}
        return {name: size for name, size in files.items() if name}

    def read(self, name: str) -> bytes:
        """The whole file. FileNotFoundError if there is none."""
        fs, path = self._at(name)
        return bytes(fs.cat_file(path))

    def open(self, name: str) -> Any:
        """The file as a stream to read from, at any place; a context manager. FileNotFoundError if there is none."""
        fs, path = self._at(name)
        return fs.open(path, "rb")

    def tail(self, name: str, size: int) -> bytes:
        """The last `size` bytes of the file, or all of it if it is shorter."""
        fs, path = self._at(name)
        return bytes(fs.cat_file(path, start=-size))

    def exists(self, name: str) -> bool:
        """Whether the file is there now."""
        fs, path = self._at(name)
        fs.invalidate_cache(path)
        return bool(fs.exists(path))

    def create(self, name: str, source: Path | bytes) -> None:
        """Publish a scratch file, or bytes, under a name that nobody has yet. The scratch file is gone after it.

        Raises FileExistsError for whoever comes second. A store that repeats a request whose answer was
        lost may say so to the one who came first: who needs to know reads what is there.
        """
        self._publish(name, source, exclusive=True)

    def replace(self, name: str, source: Path | bytes) -> None:
        """Publish a scratch file, or bytes, over whatever has the name. The scratch file is gone after it."""
        self._publish(name, source, exclusive=False)

    def remove(self, name: str) -> None:
        """Remove the file if it is there."""
        fs, path = self._at(name)
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return

    def scratch(self) -> Path:
        """The local directory in which files are built: in the store if it is local, so that a link can publish."""
        fs, path = self._at(SCRATCH)
        if not isinstance(fs, LocalFileSystem):
            return Path(tempfile.gettempdir())
        Path(path).mkdir(parents=True, exist_ok=True)
        return Path(path)

    def scratch_file(self, suffix: str = "") -> Path:
        """A path in scratch that does not exist yet and that no other attempt will have."""
        return self.scratch() / f"mmbeam-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}{suffix}"

    def sweep_scratch(self) -> None:
        """Remove what dead attempts left in scratch: of a process of this host that is gone, or a day old.

        Containers that share a host name but not their processes can lose live scratch by this; their
        attempt then fails to publish, loudly, and is tried again.
        """
        for path in self.scratch().glob("mmbeam-*"):
            if _SCRATCH_FILE.fullmatch(path.name) and path.is_file() and _is_stale(path):
                with suppress(PermissionError):  # another user's, in a temporary directory that all share
                    path.unlink(missing_ok=True)

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
                fs.put_file(str(source), path, mode="create" if exclusive else "overwrite")
            else:
                _publish_by_move(fs, source, path, exclusive)
        finally:
            source.unlink(missing_ok=True)


@cache
def _file_system(url: str, _pid: int) -> tuple[Any, str]:
    """One file system per store and process (none survives a fork), whose listings are always fresh."""
    fs, root = url_to_fs(url, use_listings_cache=False)
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
                except FileNotFoundError:  # removed while we list
                    continue
    except FileNotFoundError:
        return {}
    return sizes


def _publish_local(source: Path, final: Path, exclusive: bool) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        os.fsync(file.fileno())
    if exclusive:
        _link(source, final)
    else:
        source.replace(final)
    _sync_directory(final.parent)


def _link(source: Path, final: Path) -> None:
    try:
        os.link(source, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise JobError(
            f"{final.parent}: expected a file system with hard links, by which a finished file is published exactly "
            f"once; found one without ({error.strerror}). Choose an --output on another file system"
        ) from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:  # some network file systems know no such thing
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


def process_exists(pid: int) -> bool:
    """Whether a process of this host has the number `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
