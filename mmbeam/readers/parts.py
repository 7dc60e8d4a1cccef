"""The parts of an uncompressed tar: which of its samples each reads, found from the place of the cut alone.

A cut is any byte. The first member of a sample whose first header (a pax or GNU prefix included) begins at
or after it, and all that follow it under the same key, still belong to the part before the cut; the part
behind begins at the next key. This place is the cut's seam. The part before comes to it reading on past
its end; the part behind comes to it by passing over members from the first header that it finds. Neither
needs to know what the other has seen: whether the first member after the cut begins a sample or goes on
with one makes no difference, nor whether a key that comes twice in a row makes one sample or two.

The part behind looks for its first header by the magic and the checksum of a block. A member that is
itself a tar holds such blocks, and so may fool it. Therefore each part says at which seams it began and
ended, and `misplaced` compares them: where one began elsewhere than the one before it ended, what it read
is not of this tar. Of a part that begins where the one before ended everything is true again, so the
comparison leaves nothing to chance: by induction from the beginning of the shard.

Not here: headers (tarheaders.py), samples (tar.py), what becomes of a misplaced part (runs/amend.py).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mmbeam.readers.tarheaders import BLOCK
from mmbeam.types import Input, InputRead, Seam

LOOK_BACK = 4096  # bytes before a cut: the extended header of a member behind it is found there, if it is not longer


class _Cut:
    """Follows the members up to the seam of the cut at byte `at`."""

    def __init__(self, at: int | None) -> None:  # None: there is none, and so nothing is behind it
        self._at = sys.maxsize if at is None else at
        self._key: str | None = None
        self.header: int | None = None

    def passed(self, offset: int, key: str) -> bool:
        """Whether the member is behind the seam."""
        if self._key is None and offset < self._at:
            return False
        if self._key in (None, key):
            self._key, self.header = key, offset
            return False
        return True


class Part:
    """One reading of a part: takes its members one by one, and finds its seams."""

    def __init__(self, source: Input) -> None:
        self.begin = source.seam
        self.begun = source.begin == 0 or source.seam is not None
        self.stop = source.end
        self.end = source.seam if self.is_empty else None
        self._first = _Cut(source.begin)
        self._last = _Cut(source.end)
        self.origin = _origin(source)  # where reading begins

    def take_all(self) -> None:
        """The tar is compressed: a cut in it means nothing, and the first part has all of it."""
        self.stop = None
        self._last = _Cut(None)

    @property
    def is_empty(self) -> bool:
        """Whether it is known to hold nothing before it is read."""
        return self.begin is not None and _holds_nothing(self.begin, self.stop)

    def ends(self, offset: int, key: str) -> bool:
        """Take the next member of a sample; whether it is behind the part. Until `begun` it is before it."""
        over = self._last.passed(offset, key)
        if not self.begun and self._first.passed(offset, key):
            self.begun, self.begin = True, Seam(offset, self._first.header)
        if over:
            self.end = Seam(offset, self._last.header)
        return over

    def finish(self) -> None:
        """There is no further member in the shard."""
        if not self.begun:
            self.begin = Seam(None, self._first.header)
        self.end = Seam(None, self._last.header)

    @property
    def holds_the_last(self) -> bool:
        """Whether the shard's last sample is in it, or the shard has none."""
        return self.begun and self.end is not None and self.end.sample is None and not self.is_empty

    @property
    def found(self) -> InputRead:
        return InputRead(begin=self.begin, end=self.end)


def _origin(source: Input) -> int:
    if source.seam is not None:
        return source.seam.sample or 0  # without a sample it is not read
    return max(0, source.begin - LOOK_BACK) // BLOCK * BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRead:
    """What became of a part: its cuts, and the seams that reading it has found if it is committed."""

    unit: str
    shard: str  # Shard.path
    begin: int
    end: int | None
    committed: bool
    found: InputRead

    @property
    def is_empty(self) -> bool:
        """Whether it is committed and holds no sample."""
        begin, end = self.found.begin, self.found.end
        return self.committed and (begin is None or (end is not None and begin.sample == end.sample))


Trace = Callable[[PartRead, Seam], Seam | None]


def misplaced(parts: Sequence[PartRead], trace: Trace = lambda part, seam: None) -> Iterator[tuple[PartRead, Seam]]:
    """Of a shard's parts, in order, each that is not committed as read from its true beginning, and this.

    It goes as far as is known: behind a part that it gives, the true end of which nobody has found, only if
    `trace(part, its beginning)` finds it. A part that truly holds nothing has no such end to find.
    """
    seam: Seam | None = None
    reached: int | None = 0
    for part in parts:
        if part.begin != reached:
            return
        reached = part.end
        if part.begin == 0:
            seam = part.found.end
        elif seam is None:
            return
        elif _holds_nothing(seam, part.end):
            if not part.is_empty:
                yield part, seam
        elif part.committed and part.found.begin == seam:
            seam = part.found.end
        else:
            yield part, seam
            seam = trace(part, seam)


def _holds_nothing(seam: Seam, end: int | None) -> bool:
    """Whether a part that begins at `seam` and is cut at `end` ends there too: the seam is that of both cuts."""
    return seam.sample is None or (end is not None and seam.header is not None and seam.header >= end)
