"""From what a user typed to the shards a job reads.

Not here: the units of work they make (units.py), opening a shard (stream.py), what is inside it (tar.py).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mmbeam.config import MIB
from mmbeam.errors import NoShardsError, UsageError
from mmbeam.names import LIST_SUFFIXES, SHARD_SUFFIXES
from mmbeam.readers.paths import Info, etag_of, plain_url, public_path, public_text, without_query
from mmbeam.readers.stream import sends_ranges
from mmbeam.types import Shard

LIST_FOLDER_ABOVE = 16  # so many paths in one folder: one listing is cheaper than a request for each
HTTP_PROBES = 1000  # a web server lists no sizes: ask for the first so many, the others stay unknown
REQUESTS_AT_ONCE = 32
LARGE = 32 * MIB  # above it a server is asked whether it sends parts: a shard may be cut so small
LOOKED_AT = 5  # places named in an error


def expand(patterns: Sequence[str]) -> list[str]:
    """The paths and globs that `patterns` stand for, in order, each once.

    A pattern may join several with `::`, hold brace ranges (`data-{00000..00099}.tar`), or name a list
    of shards (`@LIST`, or a path that ends in .txt or .list): one pattern per line, lines that begin
    with # are comments, relative paths are relative to the list. Raises UsageError for a pattern that
    would run a command, unbalanced braces, and a list that cannot be read.
    """
    return list(dict.fromkeys(entry for pattern in patterns for entry in _expand_joined(pattern)))


def _expand_joined(pattern: str) -> Iterator[str]:
    for entry in _expand_braces(pattern):
        if _is_list(entry):
            yield from _read_list(entry.removeprefix("@"))
        else:
            yield entry


def _expand_braces(pattern: str) -> Iterator[str]:
    for part in filter(None, (part.strip() for part in pattern.split("::"))):
        if part.startswith(("pipe:", "|")) or part.endswith("|"):
            raise UsageError("an input that runs a command (pipe:) is refused: give paths or URLs of shards")
        try:
            yield from braceexpand(part)
        except ValueError:
            raise UsageError(f"{public_path(part)}: unbalanced braces; write \\{{ for a brace in a name") from None


def _is_list(entry: str) -> bool:
    return entry.startswith("@") or without_query(entry).lower().endswith(LIST_SUFFIXES)


def _read_list(url: str) -> Iterator[str]:
    try:
        with fsspec.open(url, "rt", encoding="utf-8-sig", expand=False) as lines:
            text = lines.read()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, ValueError, ImportError) as error:
        reason = type(error).__name__
        raise UsageError(f"{public_path(url)}: cannot be read as a list of shards ({reason})") from None
    folder = without_query(url).rpartition("/")[0]
    for line in filter(None, map(str.strip, text.splitlines())):
        if not line.startswith("#"):
            yield from (_relative_to(folder, url, entry) for entry in _expand_braces(line))


def _relative_to(folder: str, url: str, entry: str) -> str:
    if _is_list(entry):
        raise UsageError(f"{public_path(url)}: a list in a list ({public_path(entry)}); give both to --input")
    if not folder or "://" in entry or entry.startswith(("/", "~")):
        return entry
    return f"{folder}/{entry.removeprefix('./')}"


@dataclass(frozen=True)
class _Place:
    """A pattern, the file system it lies on, its path there, and what turns such a path into a URL."""

    url: str
    fs: Any
    path: str
    prefix: str

    @property
    def is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    @property
    def is_glob(self) -> bool:
        return re.search("[*[]" if self.is_http else "[*?[]", self.path) is not None

    def shard(self, info: Info) -> Shard:
        if info.get("islink"):  # a local listing dates the link, not the file
            info = self.fs.info(info["name"])
        return self.shard_at(self.prefix + info["name"], info)

    def shard_at(self, url: str, info: Info) -> Shard:
        path = public_path(url)
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{path!r}: the name is not UTF-8; rename the shard") from None
        cuttable = info.get("partial", True)
        return Shard(path=path, url=plain_url(url), size=info.get("size"), etag=etag_of(info), cuttable=cuttable)


def _place(url: str) -> _Place:
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{public_path(url)}: needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UsageError(f"{public_path(url)}: {public_text(str(error))}") from None
    plain = url.rstrip("/")
    remote = not isinstance(fs, LocalFileSystem) and plain.endswith(path.rstrip("/"))
    return _Place(url, fs, path, plain[: len(plain) - len(path.rstrip("/"))] if remote else "")


@dataclass
class _Listing:
    """What was found, and where nothing was."""

    shards: dict[str, Shard] = field(default_factory=dict)  # by path
    missing: list[str] = field(default_factory=list)

    def add(self, shard: Shard) -> None:
        known = self.shards.setdefault(shard.path, shard)
        if known.url != shard.url:
            raise UsageError(f"{shard.path}: given twice, with different user parts or query strings; give one")


def list_shards(patterns: Sequence[str]) -> list[Shard]:
    """The shards that `patterns` (see `expand`) name, with the sizes and etags that listings give.

    A glob's matches, and the tars of a folder, are sorted by path. A path that does not exist is a
    shard too: its unit fails later, the others go on. Raises NoShardsError if nothing exists at all,
    UsageError for a pattern that cannot be meant, and what the store raises if it refuses access.
    """
    places = [_place(entry) for entry in expand(patterns)]
    infos = _look_up([place for place in places if not place.is_glob])
    listing = _Listing()
    for place in places:
        _add_place(listing, place, infos)
    for fs in {id(place.fs): place.fs for place in places}.values():
        fs.invalidate_cache()  # a listing of 100,000 shards is not kept for the whole job
    if len(listing.missing) == len(places):
        looked = "\n  ".join([*listing.missing[:LOOKED_AT], *["..."] * (len(listing.missing) > LOOKED_AT)])
        raise NoShardsError(f"no shard found; {len(places)} place(s) looked at:\n  {looked or 'no pattern was given'}")
    return list(listing.shards.values())


def _add_place(listing: _Listing, place: _Place, infos: Mapping[str, Info | None]) -> None:
    info = infos.get(place.url, {})
    is_folder = info is not None and (info.get("type") == "directory" or place.url.endswith("/"))
    if place.is_glob or is_folder:
        found = _list_folder(place) if is_folder else place.fs.glob(place.path, detail=True).values()
        shards = [place.shard(entry) for entry in found if entry["type"] != "directory"]
        if not shards:
            listing.missing.append(f"{public_path(place.url)}: {_why_nothing(place, is_folder)}")
        for shard in sorted(shards, key=lambda shard: shard.path):
            listing.add(shard)
        return
    if info is None:
        listing.missing.append(
            f"{public_path(place.url)}: does not exist{', or access is refused' if place.is_http else ''}"
        )
    listing.add(place.shard_at(place.url, info or {}))


def _list_folder(place: _Place) -> list[Info]:
    found = place.fs.ls(place.url if place.is_http else place.path, detail=True)
    return [entry for entry in found if without_query(entry["name"]).lower().endswith(SHARD_SUFFIXES)]


def _why_nothing(place: _Place, is_folder: bool) -> str:
    if is_folder:
        return f"holds no {', '.join('*' + suffix for suffix in SHARD_SUFFIXES)}"
    folder = re.split("[*?[]", place.path)[0].rpartition("/")[0]
    there = place.fs.exists(folder)
    return f"no match in {public_path(place.prefix + folder)}, which {'exists' if there else 'does not exist'}"


def _look_up(places: Sequence[_Place]) -> dict[str, Info | None]:
    """Each place's entry by its URL, None for what does not exist; unknown ones ({}) past HTTP_PROBES."""
    folders: dict[tuple[int, str], list[_Place]] = defaultdict(list)
    for place in places:
        folders[id(place.fs), place.path.rstrip("/").rpartition("/")[0]].append(place)
    infos: dict[str, Info | None] = {}
    singles: list[_Place] = []
    for (_, folder), siblings in folders.items():
        entries = (
            None if siblings[0].is_http or len(siblings) <= LIST_FOLDER_ABOVE else _entries(siblings[0].fs, folder)
        )
        if entries is None:
            singles += siblings
        else:
            infos.update((place.url, entries.get(place.path.rstrip("/"))) for place in siblings)
    web = [place for place in singles if place.is_http]
    unknown = {place.url for place in web[HTTP_PROBES:]}
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        asked = [place for place in singles if place.url not in unknown]
        infos.update(zip((place.url for place in asked), pool.map(_info, asked), strict=True))
    return infos | {url: {} for url in unknown}


def _entries(fs: Any, folder: str) -> dict[str, Info] | None:
    try:
        return {entry["name"].rstrip("/"): entry for entry in fs.ls(folder, detail=True)}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (PermissionError, NotImplementedError):  # a store may let files be read and not be listed
        return None


def _info(place: _Place) -> Info | None:
    if place.is_http and place.url.endswith("/"):
        return {"type": "directory"}
    try:
        info: Info = place.fs.info(place.path)
        if place.is_http and (info.get("size") or 0) > LARGE:
            return {**info, "partial": sends_ranges(place.fs, place.path, info["size"])}
        return info
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # over HTTP also what is refused: some stores answer so for what is not
        return None
