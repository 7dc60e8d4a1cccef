"""The identity of a shard: its public path, its origin, and the etag of its content; and the file system to open it."""

import os
import posixpath
import re
import socket
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mmbeam.errors import ShardError, public_url
from mmbeam.names import TABLE_SUFFIXES, ZIP_SUFFIX

ETAG_KEYS = ("md5Hash", "ETag", "etag", "generation", "Last-Modified")  # the most specific first
ALIASES = {"gcs": "gs", "s3a": "s3"}
LOCAL = ("", "file", "local")  # the schemes of paths of this machine
NAMES_ONLY = (*LOCAL, "gs", "s3")  # with these, ? and # are part of a name; elsewhere they end the path
DEFAULT_PORTS = {"http": 80, "https": 443, "ftp": 21, "ssh": 22, "sftp": 22}
_COLONS = "\ue000"  # stands for ::, which fsspec takes for a chain of file systems

SILENT_SECONDS = 20.0  # without data, after which a connection is closed and a request is repeated

META_NAME = re.compile(r"__[^/]*__($|/)")  # names that webdataset reserves

Info = Mapping[str, Any]  # of one path, as fsspec reports it


class FileError(Exception):
    """An error of one file. `kind` is the name of the error class in its record."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def file_system(url: str, may_redirect: bool = True, **options: Any) -> tuple[Any, str]:
    """Return the file system that opens `url`, and the path there. A `::` in `url` is part of a name, not a chain.

    `options` are arguments of the file system, unless it is local. Its client repeats no request, as far as it has an
    option for that: `stream.retry` does. Unless `may_redirect`, a web server may not redirect to another server.

    Raises ImportError if its package is not installed, ValueError for an unknown scheme, and ConnectionError if Google
    Cloud Storage is not reachable from this machine.
    """
    if is_local(url):
        return LocalFileSystem(), local_path(url)
    scheme, _, rest = url.partition("://")
    authority, _, name = rest.partition("/")
    has_user = "@" in authority or (":" in authority and "@" in name and not authority.startswith("arn:"))
    if has_user and scheme_of(url) in ("s3", "gs"):
        raise ValueError("credentials in the URL are not supported; give them in the environment")
    url = f"{scheme.lower()}://{rest}"
    if scheme_of(url) == "s3":
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        ours = {"connect_timeout": SILENT_SECONDS, "read_timeout": SILENT_SECONDS}
        once = {"retries": {"mode": "standard", "total_max_attempts": 1}}
        options["config_kwargs"] = {**ours, **once, **configured}
    elif scheme_of(url) == "gs":
        configured = {**fsspec.config.conf.get("gcs", {}), **fsspec.config.conf.get("gs", {})}
        if "STORAGE_EMULATOR_HOST" not in os.environ and not configured.get("endpoint_url"):
            _find_host("storage.googleapis.com")
        session = configured.get("session_kwargs", {})
        options["session_kwargs"] = {**session, "trace_configs": [*session.get("trace_configs", ()), _once()]}
    elif scheme_of(url) in ("http", "https") and not may_redirect:
        options["get_client"] = _bound_client
    fs, path = url_to_fs(url.replace("::", _COLONS), **options)
    if scheme_of(url) == "s3":
        fs.retries = 1
    return fs, path.replace(_COLONS, "::")


@cache
def _find_host(host: str) -> None:
    """Raise ConnectionError if `host` has no address. gcsfs would look for credentials for a minute first."""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        reason = f"{host}: cannot be found ({error.strerror}); check the network of this machine"
        raise ConnectionError(reason) from None


class StoreError(OSError):
    """A response with an error status, which may be temporary."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"{status}, {reason}")
        self.status, self.headers = status, headers


@cache
def _once() -> Any:
    """Return hooks that raise faults as errors after which gcsfs does not repeat a request; it does up to 36 times."""
    import aiohttp  # here, since only HTTP and GCS need it

    async def check(session: Any, context: Any, end: Any) -> None:
        if end.response.status >= 500 or end.response.status in (401, 408, 429):
            end.response.close()
            raise StoreError(end.response.status, end.response.reason, end.response.headers)

    async def fail(session: Any, context: Any, failure: Any) -> None:
        if isinstance(failure.exception, aiohttp.ClientError):
            raise ConnectionError(str(failure.exception)) from failure.exception

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(check)
    trace.on_request_exception.append(fail)
    return trace


async def _bound_client(**options: Any) -> Any:
    """Return an HTTP client that refuses redirects to other servers."""
    import aiohttp  # here, since only HTTP needs them
    import yarl

    async def check(session: Any, context: Any, redirect: Any) -> None:
        source = redirect.url
        target = source.join(yarl.URL(redirect.response.headers.get("Location") or redirect.response.headers["URI"]))
        upgraded = source.scheme == "http" and source.host == target.host and origin(str(target))[1].endswith(":443")
        if origin(str(target)) != origin(str(source)) and not (upgraded and source.port == 80):
            redirect.response.close()
            raise ShardError(
                f"{public_path(str(source))}: named by a list that was fetched, and redirects to another server "
                f"({origin(str(target))[1]}); check the list, then name the shard with `input` or use "
                "`allow_local_paths`"
            )

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check)
    return aiohttp.ClientSession(trace_configs=[trace], **options)


def is_local(url: str) -> bool:
    """Return whether `url` is a path of this machine, or a URL of one."""
    return scheme_of(url) in LOCAL


def local_path(url: str) -> str:
    """Return the absolute path of a local path or URL, with ~ expanded. Every other character is part of a name."""
    path = url.partition("://")[2] if "://" in url else url.removeprefix("file:") if url.startswith("file:/") else url
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111


def without_query(url: str) -> str:
    """Return `url` without query string and fragment; names on a disk or in a bucket, which may hold ? and #, as is."""
    return url if scheme_of(url) in NAMES_ONLY else re.split("[?#]", url, maxsplit=1)[0]


def scheme_of(url: str) -> str:
    """Return the scheme of `url` in lower case, without synonyms; "" for a path."""
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    return ALIASES.get(scheme, scheme)


def origin(url: str) -> tuple[str, str]:
    """Return the scheme of `url`, and the server, bucket or container that it names; ("", "") for a local path.

    Two URLs of one origin are under the control of one owner. What cannot be parsed beyond doubt has an origin of its
    own.
    """
    scheme, rest = scheme_of(url), url.partition("://")[2]
    if scheme in LOCAL:
        return "", ""
    if scheme in ("hf", "github", "git", "memory"):  # hf://datasets/OWNER/NAME/...; github://OWNER:NAME@REVISION/...
        return scheme, "/".join(rest.split("/")[: {"hf": 3, "memory": 0}.get(scheme, 1)])
    authority = re.split("[/?#]" if scheme in ("http", "https") else "/", rest, maxsplit=1)[0]
    if scheme not in DEFAULT_PORTS:
        return scheme, authority
    try:
        parts = urlsplit(f"{scheme}://{authority}")
        host, port = parts.hostname, parts.port or DEFAULT_PORTS[scheme]
    except ValueError:
        host, port = None, 0
    if not host or re.search(r"[\x00-\x20\\]", authority):  # clients differ in what they take for the host
        return scheme, f"{authority!r}, which is not a host"
    return scheme, f"{host}:{port}"


def public_path(url: str) -> str:
    """Return `url` without credentials, query string and fragment; a local path absolute and normalised.

    It identifies a shard, is the same for every spelling of the URL, and is safe in rows and logs.
    """
    scheme = scheme_of(url)
    if scheme in LOCAL:
        return posixpath.normpath(local_path(url))
    rest = without_query(public_url(url)).partition("://")[2]
    host, slash, path = rest.partition("/")
    plain = f"{host.rpartition('@')[2]}{slash}{path}"
    return f"{scheme}://{plain.lstrip('/') if scheme == 'memory' else plain}"


def plain_url(url: str) -> str:
    """Return the normalised URL, or `url` itself if that would drop credentials or a query string."""
    host = url.partition("://")[2].partition("/")[0]
    return url if "@" in host or without_query(url) != url else public_path(url)


def etag_of(info: Info) -> str | None:
    """Return what identifies the content of a path, from a listing's entry; None if the store reports nothing."""
    for key in ETAG_KEYS:
        if info.get(key):
            return str(info[key]).strip('"')
    if isinstance(info.get("mtime"), float) and "ino" in info:  # a local file; a float resolves microseconds
        return f"{round(info['mtime'] * 1e6)}-{info['size']}"
    return None


def is_zip(path: str) -> bool:
    """Return whether a shard is a zip archive, by its name."""
    return without_query(path).lower().endswith(ZIP_SUFFIX)


def is_table(path: str) -> bool:
    """Return whether an input is a table with a row per sample, by its name."""
    return without_query(path).lower().endswith(TABLE_SUFFIXES)


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and field (lower case) of a member's path; None if it does not belong to a sample.

    It follows webdataset's `base_plus_ext`, except for hidden files in folders (`a/.b.jpg`, macOS's `a/._b.jpg`):
    they are ignored at any depth, where webdataset makes them fields of a key `a/`.
    """
    folder, slash, last = name.rpartition("/")
    base, dot, extension = last.partition(".")
    if not base or not dot or META_NAME.match(name):
        return None
    return f"{folder}{slash}{base}", extension.lower()


def is_hidden(name: str) -> bool:
    """Return whether a part of a relative path begins with a dot, or is a folder that macOS adds to archives."""
    return any(part == "__MACOSX" or part.startswith(".") for part in name.split("/") if part not in (".", ".."))
