"""Resolve the paths and patterns of `input` to shards.

Not here: the work units they become (units.py), opening a shard (stream.py), reading it (tar.py).
"""

import errno
import logging
import os
import re
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeVar

from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from mmbeam.config import MIB, FieldMap
from mmbeam.errors import NoShardsError, ShardError, UsageError, printable, redact
from mmbeam.names import LIST_SUFFIXES, MODALITIES, NOT_INPUTS, PACK_FAILURES, PACK_INDEX, SHARD_SUFFIXES, TABLE_NAMES
from mmbeam.readers.paths import (
    Info,
    etag_of,
    file_system,
    is_hidden,
    is_local,
    is_table,
    local_path,
    origin,
    plain_url,
    public_path,
    split_name,
    without_query,
)
from mmbeam.readers.retry import http_status, retry
from mmbeam.readers.stream import supports_ranges
from mmbeam.types import FolderSample, Shard, SourceFile, utf8_name

log = logging.getLogger(__name__)

T = TypeVar("T")

LIST_FOLDER_ABOVE = 16  # paths in one folder, above which one listing is cheaper than a request per path
HTTP_PROBES = 1000  # maximum of shards of a web server whose size is requested
MAX_REQUESTS = 32  # concurrent
CUTTABLE_BYTES = (
    32 * MIB
)  # size above which a web server is asked whether it supports ranges, because the shard may be cut
PLACES_SHOWN = 5  # in an error
EXPECTED = (
    "Name tars, zip archives, a folder or pattern of image, audio, video or text files, or tables (Parquet, CSV, JSON "
    "lines); features (Parquet of `mmbeam embed`) are an input of `mmbeam caption` and `mmbeam train`"
)
LEFT_OUT_SHOWN = 6  # extensions of files that are not inputs, in a message
MAX_PATHS = 5_000_000  # that patterns stand for
MAX_LIST_BYTES = 256 * MIB  # of a list of shards
MAX_LINE_CHARS = 16_384  # of a line of it: a signed URL takes 2,000

_UNLISTED = "cannot be listed"
_NUMBERS = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}")  # a brace range
_PATTERN_CHARACTERS = re.compile(r"[][*?{}|@\\\s]|::|pipe:")


class Entry(NamedTuple):
    """A path or glob that a pattern stands for."""

    url: str
    may_redirect: bool = True  # False: named by a list that was fetched, so bound to the list's server


def expand(patterns: Sequence[str], allow_local_paths: bool = False) -> list[Entry]:
    """Return the paths and globs that `patterns` stand for, in order, without duplicates.

    A pattern may join several with `::`, hold brace ranges (`data-{00000..00099}.tar`), or name a list of shards
    (`@LIST`, or a path that ends in .txt or .list): one pattern per line, lines that begin with # are comments,
    relative paths are relative to the list. A local path that exists is taken literally, even if it contains pattern
    characters.

    A list that is fetched from a server or a bucket is not trusted: unless `allow_local_paths`, it may name only what
    is on that server or in that bucket.

    Raise UsageError for a pattern that would run a command, for unbalanced braces, for a list that cannot be read or
    names another origin than its own, and beyond MAX_PATHS.
    """
    entries = (entry for pattern in patterns for entry in _expand_pattern(pattern, allow_local_paths))
    unique: dict[Entry, None] = {}
    for entry in entries:
        unique[entry] = None
        if len(unique) > MAX_PATHS:
            raise UsageError(f"`input` stands for more than {MAX_PATHS:,} paths; use globs or folders")
    return list(unique)


def _expand_pattern(pattern: str, allow_local_paths: bool) -> Iterator[Entry]:
    for entry in _expand_braces(pattern):
        if not _is_list(entry):
            yield Entry(entry)
            continue
        url = entry.removeprefix("@")
        trusted = allow_local_paths or is_local(url)
        for number, line in _read_lines(url):
            for listed in _expand_braces(line, folder=without_query(url).rpartition("/")[0]):
                if _is_list(listed):
                    raise UsageError(
                        f"{public_path(url)}: "
                        f"a list cannot contain another list ({public_path(listed)}); pass both as `input`"
                    )
                if not trusted and origin(listed) != origin(url):
                    what = "a local path" if is_local(listed) else printable(public_path(listed))
                    raise UsageError(
                        f"{public_path(url)}, line {number}: expected a shard on the list's own server or "
                        f"bucket ({'://'.join(origin(url))}), found {what}; check the list, then name its shards with "
                        "`input` or use `allow_local_paths`"
                    )
                yield Entry(listed, may_redirect=trusted)


def _expand_braces(pattern: str, folder: str = "") -> Iterator[str]:
    """Yield the paths and globs in `pattern`; relative ones are relative to `folder`."""

    def located(path: str) -> str:
        absolute = not folder or "://" in path or path.startswith(("/", "~", "@"))
        return path if absolute else f"{folder}/{path.removeprefix('./')}"

    parts = [pattern] if exists_literally(located(pattern)) else pattern.split("::")
    for part in filter(None, parts):
        if exists_literally(located(part)):
            yield located(part)
            continue
        plain = part.strip()
        if plain.startswith(("pipe:", "|")) or plain.endswith("|"):
            raise UsageError("`input`: a pattern that runs a command (pipe:) is refused; name paths or URLs of shards")
        ranges = (range(int(low), int(high)) for low, high in _NUMBERS.findall(plain))
        if prod(abs(span.stop - span.start) + 1 for span in ranges) > MAX_PATHS:
            raise UsageError(f"{printable(public_path(plain))}: stands for more than {MAX_PATHS:,} paths; use a glob")
        try:
            yield from map(located, filter(None, braceexpand(plain)))
        except (ValueError, RecursionError):
            raise UsageError(f"{public_path(plain)}: unbalanced braces; write \\{{ for a brace in a name") from None


def _is_list(entry: str) -> bool:
    if entry.startswith("@") and not exists_literally(entry):
        return True
    is_glob = re.search("[*?[]", without_query(entry)) is not None and not exists_literally(entry)
    return without_query(entry).lower().endswith(LIST_SUFFIXES) and not is_glob


def _read_lines(url: str) -> list[tuple[int, str]]:
    """Return the lines of a list that are not empty or comments, with their numbers. An error quotes none of them."""
    name = public_path(url)
    try:
        fs, path = file_system(url)

        def read() -> bytes:
            with fs.open(path, "rb") as file:
                return bytes(file.read(MAX_LIST_BYTES + 1))

        content = retry(read, name, "cannot be read as a list of shards")
        text = content.decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, ValueError, ImportError) as error:
        reason = type(error).__name__
        raise UsageError(f"{name}: cannot be read as a list of shards ({reason})") from None
    if len(content) > MAX_LIST_BYTES:
        raise UsageError(f"{name}: a list of shards of more than {MAX_LIST_BYTES // MIB} MiB; use globs or folders")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text) or any(line.startswith("<") for _, line in lines[:1]):
        raise UsageError(f"{name}: expected a list of shards, one per line; found HTML or binary data")
    longest = max(lines, key=lambda line: len(line[1]), default=(0, ""))
    if len(longest[1]) > MAX_LINE_CHARS:
        raise UsageError(f"{name}, line {longest[0]}: expected one shard, found {len(longest[1]):,} characters")
    return lines


def exists_literally(path: str) -> bool:
    """Return whether `path` contains pattern characters and is a local file of exactly this name.

    A broken link counts.
    """
    if not is_local(path) or not _PATTERN_CHARACTERS.search(path):
        return False
    return os.path.lexists(local_path(path))


@dataclass(frozen=True)
class _ListedPath:
    """A path or glob: its file system, its path there, and the prefix that turns such a path into a URL."""

    url: str
    fs: Any
    path: str
    prefix: str
    is_glob: bool
    may_redirect: bool

    @property
    def is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def ask(self, action: Callable[[], T]) -> T:
        """Return `action()`, a request to the store, repeated after faults. Raise PermissionError, ConnectionError."""
        return action() if isinstance(self.fs, LocalFileSystem) else retry(action, public_path(self.url), _UNLISTED)

    def shard_at(self, url: str, info: Info) -> Shard:
        path = public_path(url)
        try:
            path.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            if encoding != "utf-8":
                raise UsageError(
                    f"{path!a}: expected a locale with UTF-8, found {encoding}; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
                ) from None
            raise UsageError(f"{path!r}: the name is not UTF-8; rename the shard") from None
        cuttable = info.get("partial", True)
        address = plain_url(url)
        return Shard(
            path=path,
            url=path if address == path else address,  # one string for both, of up to a million shards
            size=info.get("size"),
            etag=etag_of(info),
            cuttable=cuttable,
            may_redirect=self.may_redirect,
        )


def _listed_path(entry: Entry) -> _ListedPath:
    url = entry.url
    try:
        fs, path = file_system(url, may_redirect=entry.may_redirect)
    except ImportError as error:
        raise UsageError(f"{public_path(url)}: needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UsageError(f"{public_path(url)}: {redact(str(error))}") from None
    plain = url.rstrip("/")
    remote = not isinstance(fs, LocalFileSystem) and plain.endswith(path.rstrip("/"))
    magic = "[*[]" if url.startswith(("http://", "https://")) else "[*?[]"
    return _ListedPath(
        url=url,
        fs=fs,
        path=path,
        prefix=plain[: len(plain) - len(path.rstrip("/"))] if remote else "",
        is_glob=re.search(magic, path) is not None and not exists_literally(url) and not _is_object(url, fs, path),
        may_redirect=entry.may_redirect,
    )


def _is_object(url: str, fs: Any, path: str) -> bool:
    """Return whether the store has an object of exactly this name; False for HTTP, without a request."""
    return "://" in url and not url.startswith(("http://", "https://", "file://")) and bool(fs.isfile(path))


def list_shards(
    patterns: Sequence[str | Entry],
    strict: bool = False,
    allow_local_paths: bool = False,
    fields: FieldMap | None = None,
    any_file: bool = False,
) -> list[Shard]:
    """Return the shards that `patterns` name (see `expand`), with the sizes and etags that listings report.

    The matches of a glob and the shards of a folder are sorted by path. A folder without shards, a glob that matches
    media files, and media files named by their paths are each one shard with `samples`: the files below the folder,
    at any depth. `fields` states what is a media file. Files that are not inputs are left out, and a warning counts
    them; if `any_file`, the matches of a glob are returned whatever they are.

    A path that does not exist is returned as a shard: its unit fails later, and the others are processed. A pattern
    without a match is a warning; if `strict`, both are errors. Raise NoShardsError if nothing exists at all, UsageError
    for an invalid pattern and for a folder of both shards and media files, and the store's own error if it denies
    access. An Entry of `expand` is not expanded again.
    """
    fields = fields or FieldMap()
    expanded = [
        entry
        for pattern in patterns
        for entry in ([pattern] if isinstance(pattern, Entry) else expand([pattern], allow_local_paths))
    ]
    places = [_listed_path(entry) for entry in dict.fromkeys(expanded)]
    infos = _info_of_all([place for place in places if not place.is_glob])
    shards: dict[str, Shard] = {}
    folders: dict[str, dict[str, SourceFile]] = {}  # media files by their name below the folder, by its path
    missing: list[str] = []
    unmatched: list[str] = []
    left_out: list[str] = []
    for place in places:
        info = infos.get(place.url, {})
        is_folder = info is not None and (info.get("type") == "directory" or place.url.endswith("/"))
        matches: list[Shard] = []
        media: dict[str, SourceFile] = {}
        root = place.url.rstrip("/") or "/"
        if place.is_glob or is_folder:
            matches, media, others = _classify_entries(place, is_folder, fields, any_file)
            if not any_file:
                matches = [replace(s, may_redirect=allow_local_paths) if is_table(s.path) else s for s in matches]
            if place.is_glob:
                root = place.prefix + re.split("[*?[]", place.path)[0].rpartition("/")[0]
            if matches or media:
                left_out += others
            else:
                unmatched.append(f"{public_path(place.url)}: {_describe_empty(place, is_folder, others)}")
        elif info and not any_file and _is_media(place.path, fields):
            root, name = _split_url(place)
            media = {name: _source_file(name, info)}
        elif info and not any_file and is_table(place.path):
            matches = [replace(place.shard_at(place.url, info), may_redirect=allow_local_paths)]
        elif info and not any_file and _extension(place.path) in NOT_INPUTS:
            unmatched.append(f"{public_path(place.url)}: is not an input. {EXPECTED}")
        else:
            matches = [place.shard_at(place.url, info or {})]
            if info is None:
                denied = ", or access is denied" if place.is_http else ""
                missing.append(f"{public_path(place.url)}: does not exist{denied}")
        if media:
            matches = [Shard(path=public_path(root), url=plain_url(root), may_redirect=place.may_redirect)]
            folders.setdefault(matches[0].path, {}).update(media)
        for shard in matches:
            known = shards.setdefault(shard.path, shard)
            if known.url != shard.url:
                raise UsageError(
                    f"{shard.path}: named twice, with different credentials or query strings; name it once"
                )
    for path, files in folders.items():
        samples, tables, others = _group(files.values(), fields)
        shards[path] = replace(shards[path], tables=tables).with_samples(samples)
        left_out += others
    for fs in {id(place.fs): place.fs for place in places}.values():
        fs.invalidate_cache()  # a listing of 100,000 shards would stay in memory for the whole job
    empty = [*missing, *unmatched]
    if len(empty) == len(places):
        shown = "\n  ".join([*empty[:PLACES_SHOWN], *["..."] * (len(empty) > PLACES_SHOWN)])
        raise NoShardsError(f"no shard matches `input` ({len(places)} patterns):\n  {shown or 'no pattern was given'}")
    if strict and empty:
        shown = "\n  ".join([*empty[:PLACES_SHOWN], *["..."] * (len(empty) > PLACES_SHOWN)])
        raise NoShardsError(f"`input`: {len(empty)} of {len(places)} patterns match nothing:\n  {shown}")
    for line in unmatched:
        log.warning("`input` %s", line)
    if left_out:
        log.warning("`input`: left out %d files that are not inputs: %s", len(left_out), _summarize_names(left_out))
    return list(shards.values())


def _classify_entries(
    place: _ListedPath, is_folder: bool, fields: FieldMap, any_file: bool
) -> tuple[list[Shard], dict[str, SourceFile], list[str]]:
    """Return the shards of a folder or a glob, its media files by their name below it, and the names of other files.

    Only one of the first two is not empty. The media files include all that may belong to their samples. Raises
    UsageError for shards beside images or audio.
    """
    listed = _entries(place, is_folder, any_file)
    entries = sorted(((name, path, _reduced(info)) for name, path, info in listed), key=lambda entry: entry[:2])
    if any_file:
        return [place.shard_at(place.prefix + name, info) for _, name, info in entries], {}, []
    shards = [entry for entry in entries if without_query(entry[1]).lower().endswith(SHARD_SUFFIXES)]
    visible = [entry for entry in entries if not is_hidden(entry[0])]
    media = [name for name, _, _ in visible if _is_media(name, fields)]
    if shards and media:
        path = public_path(place.url)
        folder = path if is_folder else public_path(place.prefix + re.split("[*?[]", place.path)[0].rpartition("/")[0])
        raise UsageError(
            f"{path}: expected either shards or media files, found {len(shards):,} shards ({shards[0][0]}, ...) and "
            f"{len(media):,} media files ({media[0]}, ...); name one kind with a pattern, for example "
            f"'{folder}/**/*{_suffix(shards[0][0])}' or '{folder}/**/*{_suffix(media[0])}'"
        )
    if not shards and (media or any(_kind(name, fields) == "text" for name, _, _ in visible)):
        hidden = [name for name, _, _ in entries if is_hidden(name)]
        return [], {name: _source_file(name, info) for name, _, info in visible}, hidden
    if not shards and not is_folder:  # a tar may have any name
        shards = [entry for entry in visible if _extension(entry[0]) not in NOT_INPUTS and not _kind(entry[0], fields)]
        if is_table(place.path):  # asked for by its suffix
            shards += [entry for entry in visible if is_table(entry[0])]
    elif not shards:  # a folder of tables only
        shards = [entry for entry in visible if is_table(entry[0]) and "/_" not in f"/{entry[0]}"]
    taken = {name for name, _, _ in shards}
    others = [name for name, _, _ in entries if name not in taken and name not in (PACK_INDEX, PACK_FAILURES)]
    return [place.shard_at(place.prefix + path, info) for _, path, info in shards], {}, others


def _reduced(info: Info) -> Info:
    """Return the facts of a listing's entry that are used, without the kilobytes that a store adds."""
    facts = {key: info[key] for key in ("size", "type", "partial") if key in info}
    etag = etag_of(info)
    return facts if etag is None else {**facts, "etag": etag}


def _entries(place: _ListedPath, is_folder: bool, any_file: bool) -> Iterator[tuple[str, str, Info]]:
    """Yield the files of a glob or a folder: name below the folder, path in the store, and the listing's entry.

    If a folder has shards directly in it, only the files beside them are listed; otherwise those at any depth. A
    hidden folder counts as one file. Links to folders are not followed.
    """
    if not is_folder:
        root = re.split("[*?[]", place.path)[0].rpartition("/")[0]
        for path, info in place.ask(lambda: place.fs.glob(place.path, detail=True)).items():
            target = _of_target(place.fs, info)
            if target.get("type") != "directory":
                yield path.removeprefix(root).lstrip("/"), path, target
        return
    if isinstance(place.fs, LocalFileSystem):
        yield from _local_entries(place.path, any_file)
        return
    root = place.url if place.is_http else place.path
    listed = place.ask(lambda: place.fs.ls(root, detail=True))
    has_shards = any(without_query(entry["name"]).lower().endswith(SHARD_SUFFIXES) for entry in listed)
    if has_shards or any_file or place.is_http:
        for entry in listed:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if not any_file or without_query(name).lower().endswith(SHARD_SUFFIXES):
                info = _of_target(place.fs, entry)
                if info.get("type") != "directory":
                    yield name, entry["name"], info
        return
    for path, info in place.ask(lambda: place.fs.find(root, detail=True)).items():
        name = path.removeprefix(root.rstrip("/")).lstrip("/")
        if name and not name.endswith("/"):
            yield name, path, info


def _local_entries(root: str, any_file: bool) -> Iterator[tuple[str, str, Info]]:
    """Yield the files of a local folder as `_entries` does. fsspec would hold a kilobyte per file."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries]
    shards = [name for name in names if name.lower().endswith(SHARD_SUFFIXES)]
    if shards or any_file:
        for name in shards if any_file else names:
            path = f"{root.rstrip('/')}/{name}"
            info = _status(path)
            if info.get("type") != "directory":
                yield name, path, info
        return

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, onerror=fail):
        for name in [*files, *(name for name in subfolders if name.startswith("."))]:
            path = f"{folder.rstrip('/')}/{name}"
            info = _status(path)
            if info.get("type") in (None, "file") or name.startswith("."):
                yield path.removeprefix(root).lstrip("/"), path, info
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]


def _status(path: str) -> Info:
    """Return the entry of a local path, of the target if it is a link; {} for a broken link, whose unit fails."""
    try:
        status = os.stat(path)  # noqa: PTH116 (up to a million paths)
    except OSError:
        return {}
    mode = status.st_mode
    kind = "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "other"
    return {"size": status.st_size, "mtime": status.st_mtime, "ino": status.st_ino, "type": kind}


def _group(
    files: Iterable[SourceFile], fields: FieldMap
) -> tuple[list[FolderSample], tuple[SourceFile, ...], list[str]]:
    """Return the samples of a folder's files, sorted by key, its tables of metadata, and the names of the other files.

    A field that repeats within a key (`a.jpg`, `a.JPG`) begins another sample. A key without a modality is not a
    sample.
    """
    groups: dict[str, list[dict[str, SourceFile]]] = defaultdict(lambda: [{}])
    tables = []
    others: list[str] = []
    for file in sorted(files, key=lambda file: file.name):
        names = split_name(utf8_name(file.name))
        if file.name.rpartition("/")[2].lower() in TABLE_NAMES:
            tables.append(file)
        elif names is None:
            others.append(file.name)
        else:
            variants = groups[names[0]]
            if names[1] in variants[-1]:
                variants.append({})
            variants[-1][names[1]] = file
    samples = []
    for key in sorted(groups):
        for members in groups[key]:
            if any(fields.kind(name) in MODALITIES for name in members):
                samples.append(FolderSample(key, tuple(members.values())))
            else:
                others += [file.name for file in members.values()]
    return samples, tuple(tables), others


def _source_file(name: str, info: Info) -> SourceFile:
    return SourceFile(name, info.get("size"), etag_of(info))


def _split_url(place: _ListedPath) -> tuple[str, str]:
    """Return the URL of the folder of a file, and the file's name."""
    url = plain_url(place.url)
    if is_local(url):
        url = local_path(url)
    root, _, name = url.rpartition("/")
    return root or "/", name


def _kind(name: str, fields: FieldMap) -> str | None:
    names = split_name(without_query(name))
    return None if names is None else fields.kind(names[1])


def _is_media(name: str, fields: FieldMap) -> bool:
    return _kind(name, fields) in ("image", "audio", "video")


def _extension(name: str) -> str:
    return without_query(name).lower().rpartition("/")[2].rpartition(".")[2]


def _suffix(name: str) -> str:
    return next((end for end in SHARD_SUFFIXES if name.lower().endswith(end)), "." + name.rpartition(".")[2])


def _extension_label(name: str) -> str:
    """Return the kind of a file that is not an input, for counting: its extension."""
    last = name.rpartition("/")[2]
    if is_hidden(name):
        return "hidden"
    return printable("." + _extension(name)) if "." in last else "without an extension"


def _summarize_names(names: Sequence[str]) -> str:
    """Return the number of `names` of each kind, with an example of each."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[_extension_label(name)].append(name)
    largest = sorted(kinds, key=lambda kind: -len(kinds[kind]))
    shown = [
        f"{len(kinds[kind]):,} {kind} ({printable(kinds[kind][0])}{', ...' if len(kinds[kind]) > 1 else ''})"
        for kind in largest[:LEFT_OUT_SHOWN]
    ]
    return ", ".join([*shown, *["..."] * (len(kinds) > LEFT_OUT_SHOWN)])


def _of_target(fs: Any, entry: Info) -> Info:
    """Return `entry`, or the target's if it is a symbolic link: a local listing gives the date of the link itself."""
    if not entry.get("islink"):
        return entry
    target = os.path.realpath(entry["name"])
    if not os.path.exists(target):  # noqa: PTH110 (a broken link or a loop: its unit fails, as that of a missing shard)
        return {}
    info: Info = fs.info(target)
    return info


def _describe_empty(place: _ListedPath, is_folder: bool, others: Sequence[str]) -> str:
    if others or is_folder:
        held = f"it holds {_summarize_names(others)}" if others else "it holds no files"
        return f"holds no {', '.join('*' + suffix for suffix in SHARD_SUFFIXES)} and no media files; {held}. {EXPECTED}"
    folder = re.split("[*?[]", place.path)[0].rpartition("/")[0]
    state = "exists" if place.ask(lambda: place.fs.exists(folder)) else "does not exist"
    return f"no match in {public_path(place.prefix + folder)}, which {state}"


def _info_of_all(places: Sequence[_ListedPath]) -> dict[str, Info | None]:
    """Return the entry of each place by its URL: None if it does not exist, {} beyond HTTP_PROBES."""
    folders: dict[tuple[int, str], list[_ListedPath]] = defaultdict(list)
    for place in places:
        folders[id(place.fs), place.path.rstrip("/").rpartition("/")[0]].append(place)
    infos: dict[str, Info | None] = {}
    singles: list[_ListedPath] = []
    for (_, folder), siblings in folders.items():
        entries: Mapping[str, Info] | None = None
        if len(siblings) > LIST_FOLDER_ABOVE and not siblings[0].is_http:
            try:
                fs = siblings[0].fs
                listed = siblings[0].ask(partial(fs.ls, folder, detail=True))
                entries = {entry["name"].rstrip("/"): _of_target(fs, entry) for entry in listed}
            except (FileNotFoundError, NotADirectoryError):
                entries = {}
            except (PermissionError, NotImplementedError):  # a store may allow reading without listing
                entries = None
        if entries is None:
            singles += siblings
        else:
            infos.update((place.url, entries.get(place.path.rstrip("/"))) for place in siblings)
    unknown = {place.url for place in [place for place in singles if place.is_http][HTTP_PROBES:]}
    probed = [place for place in singles if place.url not in unknown]
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        infos.update(zip((place.url for place in probed), pool.map(_info, probed), strict=True))
    return infos | {url: {} for url in unknown}


def _ask_info(place: _ListedPath) -> Info:
    try:
        info: Info = place.fs.info(place.path)
    except FileNotFoundError as error:  # fsspec raises it for any failed request to a web server
        if isinstance(error.__cause__, ShardError):  # a redirect that is refused: the unit of the shard fails
            return {"type": "file"}
        status = http_status(error)
        if place.is_http and (status is None or 400 <= status < 500) and status not in (408, 429):
            raise FileNotFoundError(place.url) from None
        raise
    return info


def _info(place: _ListedPath) -> Info | None:
    if place.is_http and place.url.endswith("/"):
        return {"type": "directory"}
    try:
        info = _of_target(place.fs, place.ask(lambda: _ask_info(place)))
        if place.is_http and (info.get("size") or 0) > CUTTABLE_BYTES:
            return {**info, "partial": supports_ranges(place.fs, place.path, info["size"])}
        return info or None
    except (FileNotFoundError, NotADirectoryError):  # some web servers answer denied requests like this
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a symbolic link to itself
            return None
        raise
