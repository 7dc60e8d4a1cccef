"""A tar's bytes to samples by WebDataset's rules: streaming, forward only, no byte read twice.

A tar may be anybody's: whatever its bytes are, nothing is raised but ShardError, and what is held is
bounded by `Limits`. Not here: where the bytes come from (stream.py), headers (tarheaders.py), what a
member's bytes mean (decode.py).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mmbeam.config import MIB, Limits
from mmbeam.errors import ShardError
from mmbeam.readers.decompress import Decompressed, is_compressed
from mmbeam.readers.parts import Part
from mmbeam.readers.tarheaders import BLOCK, Break, ByteReader, Member, Members, find_header, is_header
from mmbeam.types import Damage, RawSample

SAMPLE_MEMBERS = 4  # a sample may hold so many times Limits.member_bytes: a picture, a sound, a text, metadata
FIELD_COST = 128  # bytes that a field costs beyond its name, so that members without bytes are bounded too
DAMAGES_KEPT = 100  # of one sample
META_NAME = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field (lower case) of a member's path; None if it is no part of a sample.

    As webdataset's `base_plus_ext`, but for hidden files in folders (`a/.b.jpg`, macOS's `a/._b.jpg`):
    they are ignored at any depth, where webdataset makes them fields of a key `a/`.
    """
    folder, slash, last = name.rpartition("/")
    base, dot, extension = last.partition(".")
    if not base or not dot or META_NAME.match(name):
        return None
    return f"{folder}{slash}{base}", extension.lower()


@dataclass(slots=True)
class _Group:
    """The sample being read."""

    key: str
    offset: int
    damages: list[Damage]
    members: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, None] = field(default_factory=dict)
    held: int = 0  # bytes
    closed: bool = False  # by damage: the next member begins another sample
    truncated: bool = False

    def takes(self, key: str, name: str) -> bool:
        return not self.closed and key == self.key and name not in self.fields


class TarReader:
    """The samples of one tar, plain or compressed by gzip or zstd (its first bytes decide, not its name).

    `want(field)` says whether the bytes of a member are needed; others are passed over. With a `part` the
    stream stands at its origin, and only its samples are given; a tar that is compressed is the first part
    as a whole. Iterate once.
    Adjacent members of one key are a sample; a field that comes twice, and damage, begin another one.
    Damage ahead of the first sample is put to the first sample. Offsets are those in the uncompressed
    tar. Raises ShardError if the stream is no tar, or is damaged and holds no sample at all; what
    `stream` raises passes through.
    """

    def __init__(
        self, stream: BinaryIO, shard: str, want: Callable[[str], bool], limits: Limits, part: Part | None = None
    ) -> None:
        self._source = ByteReader(stream, position=0 if part is None else part.origin)
        self._part = part
        self._shard = shard
        self._want = want
        self._limits = limits
        self._headers: Members | None = None
        self._seen: set[int] = set()  # hashes of keys, smaller than keys

    @property
    def unterminated(self) -> bool:
        """Once iterated: whether the tar ended between two members, without its end mark."""
        return self._headers is not None and self._headers.unterminated

    @property
    def trailing_data(self) -> bool:
        """Once iterated: whether there is more behind the end mark, which is not read, as by tar and webdataset.

        Tars that were simply put one after the other are like this, and one whose middle was lost to zeros.
        """
        return self._headers is not None and self._headers.trailing_data

    def __iter__(self) -> Iterator[RawSample]:
        group: _Group | None = None
        early: list[Damage] = []  # ahead of the first sample
        for found, named in self._own_members():
            if isinstance(found, Break) or found.problem:
                _hurt(group, early, found)
                continue
            if named is None:
                continue
            if group is None or not group.takes(*named):
                if group is not None:
                    yield self._finish(group)
                group = _Group(named[0], found.offset, damages=[] if group else early)
            self._add(group, named[1], found)
        if group is not None:
            yield self._finish(group)
        elif early:
            raise ShardError(f"{self._shard}: holds no sample that can be read: {early[0].message}")

    def _own_members(self) -> Iterator[tuple[Member | Break, tuple[str, str] | None]]:
        """The members and breaks of the part, with key and field of those that are in a sample."""
        part = self._part
        first = self._first_block() if part is None or part.begun else find_header(self._source, part.stop)
        if len(first) < BLOCK:
            return  # no header begins in this part
        self._headers = Members(self._source, first)
        for found in self._headers:
            named = _key_and_field(found)
            # what a global header said before its beginning a part cannot know: so there are none behind one
            if part and named and not self._headers.global_pax and part.ends(found.offset, named[0]):
                return
            if part is None or part.begun:
                yield found, named
        if part is not None:
            part.finish()

    def _first_block(self) -> bytes:
        """The first header, which comes out of the decompressor if the tar is compressed."""
        head = self._source.read(BLOCK)
        if not head:
            raise ShardError(f"{self._shard}: is empty (0 bytes)")
        packed = not is_header(head) and is_compressed(head)
        block = self._unpack(head) if packed else head
        if not is_header(block):
            what = "is compressed, but no tar is inside" if packed else "is no tar"
            reason = f"; {self._source.fault[1]}" if self._source.fault else ""
            raise ShardError(f"{self._shard}: {what} (first 8 bytes {block[:8]!r}){reason}")
        return block

    def _unpack(self, head: bytes) -> bytes:
        if self._part is not None:
            self._part.take_all()
        stream = self._source.stream
        self._source = ByteReader(stream, Decompressed(stream, head, self._limits.expansion))
        return self._source.read(BLOCK)

    def _finish(self, group: _Group) -> RawSample:
        identity = hash(group.key)
        repeated = identity in self._seen
        self._seen.add(identity)
        return RawSample(
            key=group.key,
            shard=self._shard,
            offset=group.offset,
            members=group.members,
            fields=tuple(group.fields),
            damages=tuple(group.damages),
            truncated=group.truncated,
            repeated=repeated,
        )

    def _add(self, group: _Group, name: str, member: Member) -> None:
        """Put a member into its sample, with its bytes if they are wanted and allowed."""
        wanted = self._want(name)
        refusal = self._refuse(group, member) if wanted else None
        if refusal is not None and len(group.damages) < DAMAGES_KEPT:
            group.damages.append(_damage(member, *refusal))
        if group.held > SAMPLE_MEMBERS * self._limits.member_bytes + MIB:
            return  # a key of endless members: their names are not kept either
        group.fields[name] = None
        group.held += len(name) + FIELD_COST
        if wanted and refusal is None:
            data = self._source.read(member.size)
            if len(data) == member.size:  # else the next step finds where it was cut
                group.members[name] = data
                group.held += member.size

    def _refuse(self, group: _Group, member: Member) -> tuple[str, str] | None:
        """Why the member's bytes are not read: class of error, message."""
        allowed = self._limits.member_bytes
        if member.sparse:
            return "DecodeError", "is stored as a sparse file, which is not read; pack it as a plain one"
        if member.size > allowed:
            return "LimitError", f"has {member.size:,} bytes; {allowed:,} are allowed (Limits.member_bytes)"
        if group.held + member.size > SAMPLE_MEMBERS * allowed:
            whole = f"{group.held + member.size:,} bytes; {SAMPLE_MEMBERS} times {allowed:,} are allowed"
            return "LimitError", f"would bring its sample to {whole} (Limits.member_bytes)"
        return None


def _key_and_field(found: Member | Break) -> tuple[str, str] | None:
    if isinstance(found, Break) or found.problem or not found.regular:
        return None
    return split_name(found.name)


def _hurt(group: _Group | None, early: list[Damage], found: Break | Member) -> None:
    """Put damage to the sample being read and end it, or to the one to come if there is none."""
    if isinstance(found, Member):
        message = f"byte {found.offset:,}: a member whose name cannot be known: {found.problem}"
        damage = Damage(field="", offset=found.offset, error="DecodeError", message=message)
    elif found.member is not None:
        damage = _damage(found.member, found.error, found.message)
    else:
        damage = Damage(field="", offset=found.offset, error=found.error, message=found.message)
    damages = early if group is None else group.damages
    if group is not None:
        group.closed = True
        group.truncated = group.truncated or (isinstance(found, Break) and found.truncated)
    if len(damages) < DAMAGES_KEPT:
        damages.append(damage)


def _damage(member: Member, error: str, message: str) -> Damage:
    named = split_name(member.name) if member.regular else None
    where = f"member {member.name} at byte {member.offset:,}: {message}"
    return Damage(field=named[1] if named else "", offset=member.offset, error=error, message=where)
