"""The identity of a shard: its public path, and the etag of its content. Pure functions, no I/O."""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

from fsspec.implementations.local import LocalFileSystem

ETAG_KEYS = ("md5Hash", "ETag", "etag", "generation")  # the most specific first
ALIASES = {"gcs": "gs", "s3a": "s3"}
NAMES_ONLY = ("", "file", "local", "gs", "s3")  # with these, ? and # are part of a name; elsewhere they end the path
URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")

Info = Mapping[str, Any]  # of one path, as fsspec reports it


def without_query(url: str) -> str:
    """Return `url` without query string and fragment; names on a disk or in a bucket, which may hold ? and #, as is."""
    return url if _scheme(url) in NAMES_ONLY else re.split("[?#]", url, maxsplit=1)[0]


def _scheme(url: str) -> str:
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    return ALIASES.get(scheme, scheme)


def public_path(url: str) -> str:
    """Return `url` without credentials, query string and fragment; a local path absolute and normalised.

    It identifies a shard, is the same for every spelling of the URL, and is safe in rows and logs.
    """
    scheme = _scheme(url)
    if scheme in ("", "file", "local"):
        return posixpath.normpath(str(LocalFileSystem._strip_protocol(url)))
    rest = without_query(url).partition("://")[2]
    host, slash, path = rest.partition("/")
    plain = f"{host.rpartition('@')[2]}{slash}{path}"
    return f"{scheme}://{plain.lstrip('/') if scheme == 'memory' else plain}"


def plain_url(url: str) -> str:
    """Return the normalised URL, or `url` itself if that would drop credentials or a query string."""
    host = url.partition("://")[2].partition("/")[0]
    return url if "@" in host or without_query(url) != url else public_path(url)


def public_text(text: str) -> str:
    """Return `text`, for example an error message, with every URL in it made public."""
    return URL_IN_TEXT.sub(lambda match: public_path(match[0]), text)


def etag_of(info: Info) -> str | None:
    """Return what identifies the content of a path, from a listing's entry; None if the store reports nothing."""
    for key in ETAG_KEYS:
        if info.get(key):
            return str(info[key]).strip('"')
    if isinstance(info.get("mtime"), float) and "ino" in info:  # a local file; a float resolves microseconds
        return f"{round(info['mtime'] * 1e6)}-{info['size']}"
    return None
