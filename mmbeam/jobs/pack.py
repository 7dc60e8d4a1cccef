"""The pack job: the samples of any input as WebDataset shards, with an index of checksums. No Beam.

Members of a sample are adjacent and byte for byte those of the input. Headers hold nothing but names and sizes, so the
same input and options give the same shards, byte for byte.

Memory holds one sample. The keys seen, and the order of a shuffle, are in a temporary database of sqlite, which spills
to the disk. A shuffle is complete: the samples are written to a temporary file, which takes as much disk as the input,
and are read from it in random order.
"""

import hashlib
import json
import re
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mmbeam.config import Reading
from mmbeam.errors import JobError, ShardError, UsageError
from mmbeam.jobs.inputs import look_up
from mmbeam.names import MODALITIES, PACK_FAILURES, PACK_INDEX
from mmbeam.process import progress
from mmbeam.readers.paths import is_local, local_path
from mmbeam.readers.samples import open_samples
from mmbeam.readers.tar import safe_key, tar_bytes
from mmbeam.runs.store import Store
from mmbeam.types import Input, RawSample, Shard, Tally, UnitReport

SHARD_BYTES = 500_000_000
SHARD_SAMPLES = 10_000
_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What to pack, and how."""

    input: tuple[str, ...]
    output: str  # a directory, local or any URL that fsspec can write to
    reading: Reading = field(default_factory=Reading)
    strict_input: bool = False
    allow_local_paths: bool = False
    shard_bytes: int = SHARD_BYTES  # of a shard, unless a single sample is larger
    shard_samples: int = SHARD_SAMPLES
    shuffle: int | None = None  # the seed; None: the order of the input
    overwrite: bool = False


@dataclass(kw_only=True)
class Packed:
    """What was written."""

    output: str
    shards: list[dict[str, Any]] = field(default_factory=list)  # as in the index
    samples: int = 0
    left_out: int = 0  # samples without a row in any shard
    renamed: list[tuple[str, str]] = field(default_factory=list)  # the first keys that were changed: before, after
    renames: int = 0
    failures: int = 0  # records
    failed: dict[str, str] = field(default_factory=dict)  # inputs that cannot be read, or not to their end: reason
    members: Counter[str] = field(default_factory=Counter)  # that belong to no sample, by kind

    @property
    def bytes(self) -> int:
        """The size of all shards."""
        return sum(shard["filesize"] for shard in self.shards)


class _Entry(NamedTuple):
    """A sample as part of a tar: its headers, members and padding."""

    key: str
    data: bytes


def pack(options: PackOptions) -> Packed:
    """Write the samples of the input as shards of `output`, with `index.json`, and `failures.jsonl` if any failed.

    index.json has the form of webdataset's `wids`, with the SHA-256 of each shard; it is written last. A member that
    cannot be read is a record, and so is a sample that is cut off or that loses its last image, sound and text: these
    two are left out. Keys are made safe (percent-encoded where they are not plain relative paths) and unique: a key
    that repeats, in any shard, gets the suffix -2, -3, ...

    Raises UsageError for an output that is not empty, unless `overwrite`; NoShardsError, ShardError and JobError.
    """
    if options.shard_bytes < len(_END) + tarfile.BLOCKSIZE or options.shard_samples < 1:
        raise UsageError("`shard_bytes` and `shard_samples`: expected at least 2 kB and 1 sample")
    inputs = look_up(
        options.input,
        options.reading,
        strict=options.strict_input,
        allow_local_paths=options.allow_local_paths,
    )
    store = Store(options.output)
    before = _files_in(store)
    if before and not options.overwrite:
        state = "a finished pack" if PACK_INDEX in before else f"{len(before):,} files and no {PACK_INDEX}"
        raise UsageError(
            f"`output` {store}: expected an empty directory, found {state}; choose another, or `overwrite`"
        )
    strange = [name for name in before if not _is_packed(name)]
    if strange:
        raise UsageError(f"`output` {store}: `overwrite` deletes only shards of a pack, found {', '.join(strange[:3])}")
    for name in sorted(before, key=lambda name: name != PACK_INDEX):  # the index first
        store.remove(name)

    packed = Packed(output=str(store))
    progress.start(len(inputs.files))
    records = store.scratch_file(".jsonl")
    try:
        with closing(sqlite3.connect("")) as database, records.open("wb") as log:
            entries = _entries(inputs.files, options.reading, database, log, packed)
            if options.shuffle is not None:
                entries = _shuffled(entries, options.shuffle, database, store)
            with closing(entries):
                _write_shards(entries, store, options, packed)
        if packed.failures:
            store.replace(PACK_FAILURES, records)
        if not packed.samples:
            reasons = "; ".join(list(packed.failed.values())[:3]) or f"see {PACK_FAILURES}"
            raise JobError(f"{store}: no sample could be packed ({reasons})")
        index = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "shardlist": packed.shards,
            "nsamples": packed.samples,
            "filesize": packed.bytes,
            "shuffle": options.shuffle,
        }
        store.replace(PACK_INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
    finally:
        records.unlink(missing_ok=True)
        if is_local(store.url):
            for folder in ("_mmbeam/tmp", "_mmbeam"):
                path = Path(local_path(store.url), folder)
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
    return packed


def _files_in(store: Store) -> list[str]:
    names = list(store.list("").keys())
    if is_local(store.url) and (path := Path(local_path(store.url))).is_dir():
        names += [entry.name for entry in path.iterdir() if entry.is_dir() and any(entry.iterdir())]
    return sorted(set(names) - {"_mmbeam"})


def _is_packed(name: str) -> bool:
    return name in (PACK_INDEX, PACK_FAILURES) or _SHARD_NAME.fullmatch(name) is not None


def _entries(
    shards: Sequence[Shard], reading: Reading, database: sqlite3.Connection, log: BinaryIO, packed: Packed
) -> Generator[_Entry, None, None]:
    """Yield the samples of the input in its order, under unique keys, and record what could not be read."""
    database.execute("CREATE TABLE keys (digest INTEGER PRIMARY KEY, count INTEGER)")

    def record(shard: str, error: str, message: str, key: str = "", offset: int | None = None, field: str = "") -> None:
        values = {"key": key, "shard": shard, "offset": offset, "field": field, "error": error, "message": message}
        log.write(json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        packed.failures += 1

    for shard in shards:
        report = UnitReport(unit=shard.path, status="written")
        try:
            with open_samples(Input(shard=shard), lambda name: True, reading) as (reader, _):
                for raw in reader:
                    for damage in raw.damages:
                        record(raw.shard, damage.error, damage.message, raw.key, raw.offset, damage.field)
                    reason = _why_left_out(raw, reading)
                    if reason is not None:
                        packed.left_out += 1
                        record(raw.shard, "LeftOut", reason, raw.key, raw.offset)
                    progress.add(Tally(samples=1, failed=int(reason is not None)))
                    if reason is None:
                        key = _unique(safe_key(raw.key), database)
                        if key != raw.key:
                            packed.renames += 1
                            packed.renamed += [(raw.key, key)] * (len(packed.renamed) < 3)
                        yield _Entry(key, tar_bytes(key, raw.members))
                    del raw  # it may be large
            packed.members += reader.members
            for damage in reader.failures:
                record(shard.path, damage.error, damage.message, offset=damage.offset, field=damage.field)
            if reader.broken is not None:
                record(shard.path, "ShardError", reader.broken)
                packed.failed[shard.path] = reader.broken
        except ShardError as error:
            record(shard.path, "ShardError", str(error))
            packed.failed[shard.path] = str(error)
            report = UnitReport(unit=shard.path, status="failed")
        progress.unit_done(report)


def _why_left_out(raw: RawSample, reading: Reading) -> str | None:
    """Return the reason to leave out a sample; None to pack it."""
    if raw.truncated:
        return "the shard ends, or becomes unreadable, inside this sample"
    if not raw.members:
        return "none of its members can be read" if raw.damages else "it has no members"
    lost = {reading.fields.kind(damage.field) for damage in raw.damages} & {*MODALITIES, None}
    if lost and not any(reading.fields.kind(name) in MODALITIES for name in raw.members):
        return "its image, sound and text cannot be read"
    return None


def _unique(key: str, database: sqlite3.Connection) -> str:
    """Return `key`, or with the suffix -2, -3, ... if it occurred before.

    Keys are remembered by 63 bits of a digest. A collision gives a suffix to a key that needs none.
    """
    count, name = 1, key
    while True:
        inserted = database.execute("INSERT OR IGNORE INTO keys VALUES (?, 1)", (_digest(name),)).rowcount
        if inserted:
            if count > 1:
                database.execute("UPDATE keys SET count = ? WHERE digest = ?", (count, _digest(key)))
            return name
        if count == 1:
            [(count,)] = database.execute("SELECT count FROM keys WHERE digest = ?", (_digest(key),))
        count += 1
        name = f"{key}-{count}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _shuffled(
    entries: Generator[_Entry, None, None], seed: int, database: sqlite3.Connection, store: Store
) -> Generator[_Entry, None, None]:
    """Yield the entries in an order that depends on their number and the seed alone."""
    spool = store.scratch_file(".spool")
    database.execute("CREATE TABLE places (rank INTEGER, number INTEGER, begin INTEGER, size INTEGER, key TEXT)")
    try:
        with spool.open("w+b") as file:
            for number, entry in enumerate(entries):
                place = (_digest(f"{seed} {number}"), number, file.tell(), len(entry.data), entry.key)
                database.execute("INSERT INTO places VALUES (?, ?, ?, ?, ?)", place)
                file.write(entry.data)
            query = "SELECT begin, size, key FROM places ORDER BY rank, number"
            for begin, size, key in database.execute(query):
                file.seek(begin)
                yield _Entry(key, file.read(size))
    finally:
        spool.unlink(missing_ok=True)


def _write_shards(entries: Iterator[_Entry], store: Store, options: PackOptions, packed: Packed) -> None:
    """Write the entries as shards, and describe each in `packed`."""
    entry = next(entries, None)
    while entry is not None:
        name = f"shard-{len(packed.shards):06d}.tar"
        path = store.scratch_file(".tar")
        size, samples, sha256, md5 = 0, 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        try:
            with path.open("wb") as file:
                while entry is not None and (
                    not samples
                    or (samples < options.shard_samples and size + len(entry.data) + len(_END) <= options.shard_bytes)
                ):
                    file.write(entry.data)
                    sha256.update(entry.data)
                    md5.update(entry.data)
                    size, samples = size + len(entry.data), samples + 1
                    del entry  # it may be large
                    entry = next(entries, None)
                file.write(_END)
                sha256.update(_END)
                md5.update(_END)
            store.create(name, path)
        finally:
            path.unlink(missing_ok=True)
        packed.samples += samples
        packed.shards.append(
            {
                "url": name,
                "nsamples": samples,
                "filesize": size + len(_END),
                "md5sum": md5.hexdigest(),
                "sha256": sha256.hexdigest(),
            }
        )
