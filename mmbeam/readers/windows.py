"""Samples of a work unit as windows, read and decoded ahead of whoever consumes them.

A thread per unit reads the tar in order and hands samples to the process's decode pool (the codecs
release the GIL), unless decoding is paused; a bounded queue keeps it a stated number of windows ahead.
Where a window closes depends on the data alone, so that a retry and another runner see the same windows.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, starmap
from typing import Generic, TypeVar

from mmbeam.clean.where import compile_where, rejecting_expression, where_needs
from mmbeam.config import MIB, Reading, Windows
from mmbeam.decode import decode_sample, wanted_fields
from mmbeam.errors import ShardError
from mmbeam.names import MODALITIES
from mmbeam.process import cores, decode_pool, may_decode
from mmbeam.readers.ahead import one_ahead
from mmbeam.readers.parts import Part
from mmbeam.readers.stream import ShardStream, open_shard
from mmbeam.readers.tar import TarReader
from mmbeam.types import Batch, Failure, Input, InputRead, Needs, RawSample, Sample, Tally, WorkUnit

InT = TypeVar("InT")
OutT = TypeVar("OutT")

_READ_ON_BYTES = 8 * MIB  # of a store's samples that a unit reads on while decoding is paused; a disk needs none


def _unless_paused(raws: Iterator[RawSample], read_on_bytes: int) -> Iterator[RawSample]:
    """Each as it is read; while decoding is paused they are kept, and read on up to so many bytes."""
    held: deque[RawSample] = deque()
    held_bytes = 0
    for raw in raws:
        held.append(raw)
        held_bytes += _raw_bytes(raw)
        del raw  # it may be large
        while held and (may_decode.is_set() or held_bytes >= read_on_bytes):
            may_decode.wait()
            held_bytes -= _raw_bytes(held[0])
            yield held.popleft()
    while held:
        may_decode.wait()
        yield held.popleft()


def read_batches(
    unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows, wanted: Callable[[str], bool] | None = None
) -> Generator[Batch]:
    """The unit's windows in order; the last one has `last`, and carries `broken` if an input failed.

    Samples whose key is not `wanted` are passed over before they are decoded, and counted nowhere.

    One window is filled while the consumer has another, so two are in memory. The tally of each says
    what it cost: seconds of "read" and "decode" (of all threads), and "read_wait", for which the
    consumer stood still. Closing the generator ends the thread.
    """
    make = partial(_windows, unit, reading, needs, windows, wanted)
    return one_ahead(make, f"mmbeam-read-{unit.id}")


@dataclass
class _Decoded:
    """One sample on its way into a window, unless `skip` names why it does not go there."""

    sample: Sample
    failures: tuple[Failure, ...]
    skip: str | None
    repeated: bool
    seconds: float


@dataclass
class _Window:
    """What has been gathered of the window that is being filled."""

    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    found: int = 0
    repeated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    decoded_bytes: int = 0
    seconds: float = 0.0

    def add(self, decoded: _Decoded) -> None:
        self.found += 1
        self.repeated += decoded.repeated
        self.present.update(m for m in MODALITIES if m in decoded.sample.present)
        self.seconds += decoded.seconds
        if decoded.skip is not None:
            self.skipped[decoded.skip] += 1
            return
        self.samples.append(decoded.sample)
        self.failures += decoded.failures
        self.decoded_bytes += decoded.sample.nbytes

    def full(self, windows: Windows) -> bool:
        return self.decoded_bytes >= windows.decoded_bytes or len(self.samples) >= windows.samples

    def close(self, unit: WorkUnit, index: int, source: "_Source", last: bool, broken: str | None = None) -> Batch:
        tally = Tally(
            samples=self.found,
            repeated_keys=self.repeated,
            skipped=dict(self.skipped),
            present=dict(self.present),
            seconds={"decode": self.seconds},
        )
        return Batch(
            unit=unit,
            index=index,
            last=last,
            samples=tuple(self.samples),
            failures=tuple(self.failures),
            tally=tally + source.take(),
            unit_error=broken,
            inputs_read=tuple(source.found) if last else (),
        )


def _windows(
    unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows, wanted: Callable[[str], bool] | None
) -> Generator[Batch]:
    wheres = [(text, compile_where(text)) for text in reading.cleaning.where]

    def decode(raw: RawSample) -> _Decoded:
        begin = time.perf_counter()
        sample, failures = decode_sample(raw, reading, needs)
        skip = rejecting_expression(sample, wheres)
        if skip is not None and (undecided := _undecided(skip, failures)):
            sample, failures, skip = replace(sample, image=None, audio=None), (*failures, undecided), None
        return _Decoded(sample, failures, skip, raw.repeated, time.perf_counter() - begin)

    ahead: Ahead[RawSample, _Decoded] = Ahead(
        2 * cores() + 2, windows.decoded_bytes, _raw_bytes, lambda one: one.sample.nbytes
    )
    source = _Source(unit, reading, needs)
    remote = any("://" in each.shard.path for each in unit.inputs)
    chosen = filter(lambda raw: wanted is None or wanted(raw.key), source.samples())
    raws = _unless_paused(chosen, _READ_ON_BYTES if remote else 0)
    index, window, broken = 0, _Window(), None
    try:
        with closing(ordered_map(decode, raws, decode_pool(), ahead)) as decoded:
            for one in decoded:
                window.add(one)
                if window.full(windows):
                    yield window.close(unit, index, source, last=False)
                    index, window = index + 1, _Window()
    except ShardError as error:
        broken = str(error)
    yield window.close(unit, index, source, last=True, broken=broken)


def _undecided(where: str, failures: Sequence[Failure]) -> Failure | None:
    """The failure of a sample that could not be selected because what `where` looks at could not be decoded."""
    looked_at = where_needs(where)
    cause = next((failure for failure in failures if not failure.modality or failure.modality in looked_at), None)
    return None if cause is None else replace(cause, modality="", message=f"{where}: {cause.message}"[:300])


def _raw_bytes(raw: RawSample) -> int:
    return sum(map(len, raw.members.values()))


@dataclass(frozen=True)
class Ahead(Generic[InT, OutT]):
    """How far `ordered_map` may go ahead: so many items, or fewer where items or results are large."""

    depth: int
    most_bytes: int = sys.maxsize
    item_bytes: Callable[[InT], int] = lambda item: 0
    result_bytes: Callable[[OutT], int] = lambda result: 0

    def room(self, result: OutT) -> int:
        """How many results like this one may wait."""
        return min(self.depth, max(1, self.most_bytes // max(1, self.result_bytes(result))))


def ordered_map(
    call: Callable[[InT], OutT], items: Iterator[InT], pool: ThreadPoolExecutor, ahead: Ahead[InT, OutT]
) -> Generator[OutT]:
    """`map(call, items)` in order, run by `pool` ahead of whoever takes the results."""
    pending: deque[tuple[Future[OutT], int]] = deque()
    room, held = min(ahead.depth, 2), 0  # until a result shows how large they are
    try:
        for item in items:
            size = ahead.item_bytes(item)
            pending.append((pool.submit(call, item), size))
            held += size
            del item  # it may be large
            while len(pending) >= room or (held > ahead.most_bytes and pending):
                future, size = pending.popleft()
                result = future.result()
                held, room = held - size, ahead.room(result)
                yield result
                del result, future
        while pending:
            yield pending.popleft()[0].result()
    finally:
        for future, _ in pending:
            future.cancel()


class _Source:
    """The raw samples of a unit's inputs, and what reading them has cost since it was last asked."""

    def __init__(self, unit: WorkUnit, reading: Reading, needs: Needs) -> None:
        self._unit = unit
        self._reading = reading
        self._want = wanted_fields(reading, needs)
        self._seconds = 0.0
        self._bytes = 0
        self._oddities: Counter[str] = Counter()
        self.found = [InputRead()] * len(unit.inputs)

    def take(self) -> Tally:
        tally = Tally(seconds={"read": self._seconds}, bytes_read=self._bytes, warnings=dict(self._oddities))
        self._seconds, self._bytes = 0.0, 0
        self._oddities.clear()
        return tally

    def samples(self) -> Iterator[RawSample]:
        packed = len(self._unit.inputs) > 1 and self._unit.limit is None  # which samples are the first is no matter
        read = self._packed if packed else self._input
        return islice(chain.from_iterable(starmap(read, enumerate(self._unit.inputs))), self._unit.limit)

    def _packed(self, number: int, source: Input) -> Iterator[RawSample]:
        """An input of which nothing can be read is noted, and costs its neighbours nothing.

        One that breaks off has given samples already, so the unit fails; its note has the next launch read the
        others without it (runs/amend.py).
        """
        any_read = False
        try:
            for raw in self._input(number, source):
                any_read = True
                yield raw
                del raw  # it may be large
        except ShardError as error:
            self.found[number] = InputRead(error=str(error))
            if any_read:
                raise

    def _input(self, number: int, source: Input) -> Iterator[RawSample]:
        part = Part(source) if source.is_part else None
        if part is None or not part.is_empty:
            with open_shard(source.shard, 0 if part is None else part.origin) as stream:
                reader = TarReader(stream, source.shard.path, self._want, self._reading.limits, part)
                yield from self._timed(iter(reader), stream)
                if part is None or part.holds_the_last:
                    self._oddities.update(_oddities(reader))
        if part is not None:
            self.found[number] = part.found

    def _timed(self, samples: Iterator[RawSample], stream: ShardStream) -> Iterator[RawSample]:
        """Each sample, with the seconds spent and the stored bytes read put on the tally."""
        before = 0
        while True:
            begin = time.perf_counter()
            raw = next(samples, None)
            now = stream.bytes_read
            self._seconds += time.perf_counter() - begin
            self._bytes += now - before
            before = now
            if raw is None:
                return
            yield raw


def _oddities(reader: TarReader) -> dict[str, int]:
    oddities = {
        "shards without an end-of-archive mark": reader.unterminated,
        "shards with data behind their end-of-archive mark": reader.trailing_data,
    }
    return {name: 1 for name, seen in oddities.items() if seen}
