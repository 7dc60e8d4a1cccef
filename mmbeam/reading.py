"""Samples of a work unit as windows, read and decoded ahead of whoever consumes them.

A thread per unit reads the tar in order and hands samples to the process's decode pool (the codecs
release the GIL); a bounded queue keeps it a stated number of windows ahead. Where a window closes
depends on the data alone, so that a retry and another runner see the same windows.
"""

import os
import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Generic, TypeVar

from mmbeam.clean import compile_where, select, where_needs
from mmbeam.config import Reading, Windows
from mmbeam.decode import decode_sample, wanted_fields
from mmbeam.errors import FlowError, ShardError
from mmbeam.io.stream import ShardStream, open_shard
from mmbeam.io.tar import TarReader
from mmbeam.types import MODALITIES, Batch, Failure, Needs, RawSample, Sample, Tally, WorkUnit

InT = TypeVar("InT")
OutT = TypeVar("OutT")


_pool_lock = threading.Lock()


def decode_pool() -> ThreadPoolExecutor:
    """The process's decoding threads, one per core this process may use."""
    with _pool_lock:  # two units that start at once must not make two
        return _make_pool()


@cache
def _make_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=_cores(), thread_name_prefix="mmbeam-decode")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_batches(unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows) -> Generator[Batch]:
    """The unit's windows in order; the last one has `last`, and carries `broken` if an input failed.

    One window is filled while the consumer has another, so two are in memory. The tally of each says
    what it cost: seconds of "read" and "decode" (of all threads), and "read_wait", for which the
    consumer stood still. Closing the generator ends the thread.
    """
    ahead = _Ahead()
    make = partial(_windows, unit, reading, needs, windows)
    thread = threading.Thread(target=ahead.fill, args=(make,), name=f"mmbeam-read-{unit.id}", daemon=True)
    thread.start()
    try:
        yield from ahead.drain()
    finally:
        ahead.stop()
        thread.join(timeout=1)  # it may be waiting for a store to answer; being a daemon it holds up no exit


class _Ahead:
    """One window on its way from the thread that fills it to the one that consumes it."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)  # held from the start of a window until it is taken
        self._stopped = False

    def fill(self, make: Callable[[], Generator[Batch]]) -> None:
        """Make windows, each once the one before is taken, until they end, fail, or nobody wants them."""
        try:
            with closing(make()) as batches:
                while self._may_go_on() and (batch := next(batches, None)) is not None:
                    self._ready.put(batch)
                    del batch  # a window is large: do not hold it while the next one is made
        except BaseException as error:
            self._ready.put(error)

    def drain(self) -> Generator[Batch]:
        last = False
        while not last:
            begin = time.perf_counter()
            item = self._ready.get()
            self._room.release()
            waited = Tally(seconds={"read_wait": time.perf_counter() - begin})
            if isinstance(item, BaseException):
                raise item
            last = item.last
            yield replace(item, tally=item.tally + waited)
            del item

    def stop(self) -> None:
        self._stopped = True
        self._room.release()

    def _may_go_on(self) -> bool:
        self._room.acquire()
        return not self._stopped


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
            broken=broken,
        )


def _windows(unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows) -> Generator[Batch]:
    wheres = [(text, compile_where(text)) for text in reading.cleaning.where]

    def decode(raw: RawSample) -> _Decoded:
        begin = time.perf_counter()
        sample, failures = decode_sample(raw, reading, needs)
        skip = select(sample, wheres)
        if skip is not None and (undecided := _undecided(skip, failures)):
            sample, failures, skip = replace(sample, image=None, audio=None), (*failures, undecided), None
        return _Decoded(sample, failures, skip, raw.repeated, time.perf_counter() - begin)

    ahead: Ahead[RawSample, _Decoded] = Ahead(
        2 * _cores() + 2, windows.decoded_bytes, _raw_bytes, lambda one: one.sample.nbytes
    )
    source = _Source(unit, reading, needs)
    index, window, broken = 0, _Window(), None
    try:
        with closing(ordered_map(decode, source.samples(), decode_pool(), ahead)) as decoded:
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

    def take(self) -> Tally:
        tally = Tally(seconds={"read": self._seconds}, bytes_read=self._bytes, warnings=dict(self._oddities))
        self._seconds, self._bytes = 0.0, 0
        self._oddities.clear()
        return tally

    def samples(self) -> Iterator[RawSample]:
        left = self._unit.limit
        for source in self._unit.inputs:
            if source.end is not None:
                raise FlowError(f"{source.shard.path}: byte ranges of a shard cannot be read yet")
            with open_shard(source.shard, source.begin) as stream:
                reader = TarReader(stream, source.shard.path, self._want, self._reading.limits)
                for raw in self._timed(iter(reader), stream):
                    yield raw
                    left = None if left is None else left - 1
                    if left == 0:
                        return
                self._oddities.update(_oddities(reader))

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
