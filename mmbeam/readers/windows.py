"""Samples of a work unit as windows, read and decoded ahead of the consumer.

A thread per unit reads the tar in order and hands samples to the process's decode pool (the codecs release the GIL),
unless decoding is paused. A bounded queue keeps it a fixed number of windows ahead. Where a window closes depends on
the data alone, so that a retry and another runner see the same windows.
"""

import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, starmap
from typing import Generic, TypeVar

from mmbeam.clean.where import compile_where, rejecting_expression, where_needs
from mmbeam.config import MIB, Reading, Windows
from mmbeam.decode import decode_sample, wanted_fields
from mmbeam.errors import ShardError, printable
from mmbeam.names import MODALITIES
from mmbeam.process import cores, decode_pool, may_decode
from mmbeam.readers.stream import ShardStream, open_shard
from mmbeam.readers.tar import TarReader, part_origin
from mmbeam.types import Batch, Failure, Input, InputRead, Needs, RawSample, Sample, Tally, WorkUnit

InT = TypeVar("InT")
OutT = TypeVar("OutT")

_PAUSED_READ_BYTES = 8 * MIB  # of a remote shard's samples, read ahead while decoding is paused; 0 for local shards


def read_batches(
    unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows, wanted: Callable[[str], bool] | None = None
) -> Generator[Batch]:
    """Yield the unit's windows in order; the last one has `last`, and `unit_error` if an input could not be read.

    Samples whose key is not `wanted` are skipped before they are decoded, and are not counted. One window is filled
    while the consumer has another, so two are in memory. Each tally has the seconds of "read" and "decode" (summed over
    threads) and of "read_wait", for which the consumer waited. Closing the generator ends the thread.
    """
    return prefetch(partial(_windows, unit, reading, needs, windows, wanted), f"mmbeam-read-{unit.id}")


def prefetch(make: Callable[[], Generator[Batch]], name: str) -> Generator[Batch]:
    """Yield the windows of `make()` up to the last one, each made while the consumer has the one before.

    So two are in memory. What `make` raises is raised here. Each tally gains the seconds of "read_wait", for which the
    consumer waited. Closing the generator ends the thread, which is called `name`.
    """
    ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
    room = threading.Semaphore(1)  # held from the start of a window until the consumer takes it
    stopped = threading.Event()

    def fill() -> None:
        try:
            with closing(make()) as batches:
                while room.acquire() and not stopped.is_set() and (batch := next(batches, None)) is not None:
                    ready.put(batch)
                    del batch  # a window is large: do not hold it while the next one is made
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=fill, name=name, daemon=True)
    thread.start()
    try:
        last = False
        while not last:
            begin = time.perf_counter()
            item = ready.get()
            room.release()
            waited = Tally(seconds={"read_wait": time.perf_counter() - begin})
            if isinstance(item, BaseException):
                raise item
            last = item.last
            yield replace(item, tally=item.tally + waited)
            del item
    finally:
        stopped.set()
        room.release()
        thread.join(timeout=1)  # it may be waiting for a store; as a daemon it does not delay the exit


@dataclass(frozen=True)
class Lookahead(Generic[InT, OutT]):
    """How far `ordered_map` works ahead: `depth` items, or fewer if items or results are large."""

    depth: int
    max_bytes: int = sys.maxsize
    item_bytes: Callable[[InT], int] = lambda item: 0
    result_bytes: Callable[[OutT], int] = lambda result: 0


def ordered_map(
    call: Callable[[InT], OutT], items: Iterator[InT], pool: ThreadPoolExecutor, ahead: Lookahead[InT, OutT]
) -> Generator[OutT]:
    """Yield `map(call, items)` in order, computed by `pool` ahead of the consumer."""
    pending: deque[tuple[Future[OutT], int]] = deque()
    room, pending_bytes = min(ahead.depth, 2), 0  # until a result shows how large they are
    try:
        for item in items:
            size = ahead.item_bytes(item)
            pending.append((pool.submit(call, item), size))
            pending_bytes += size
            del item  # it may be large
            while len(pending) >= room or (pending_bytes > ahead.max_bytes and pending):
                future, size = pending.popleft()
                result = future.result()
                pending_bytes -= size
                room = min(ahead.depth, max(1, ahead.max_bytes // max(1, ahead.result_bytes(result))))
                yield result
                del result, future
        while pending:
            yield pending.popleft()[0].result()
    finally:
        for future, _ in pending:
            future.cancel()


@dataclass
class _DecodedSample:
    """One sample on its way into a window, unless `skip` names the reason to leave it out."""

    sample: Sample
    failures: tuple[Failure, ...]
    skip: str | None
    repeated: bool
    seconds: float


@dataclass
class _OpenWindow:
    """The window that is being filled."""

    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    count: int = 0  # of samples, skipped ones included
    repeated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    decoded_bytes: int = 0
    seconds: float = 0.0

    def add(self, decoded: _DecodedSample) -> None:
        self.count += 1
        self.repeated += decoded.repeated
        self.present.update(m for m in MODALITIES if m in decoded.sample.present)
        self.seconds += decoded.seconds
        if decoded.skip is not None:
            self.skipped[decoded.skip] += 1
            return
        self.samples.append(decoded.sample)
        self.failures += decoded.failures
        self.decoded_bytes += decoded.sample.nbytes

    def close(self, unit: WorkUnit, index: int, source: "_UnitSamples", last: bool, error: str | None = None) -> Batch:
        tally = Tally(
            samples=self.count,
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
            tally=tally + source.pop_tally(),
            unit_error=error,
            inputs_read=tuple(source.inputs_read) if last else (),
        )


def _windows(
    unit: WorkUnit, reading: Reading, needs: Needs, windows: Windows, wanted: Callable[[str], bool] | None
) -> Generator[Batch]:
    expressions = [(text, compile_where(text)) for text in reading.cleaning.where]

    def decode(raw: RawSample) -> _DecodedSample:
        begin = time.perf_counter()
        sample, failures = decode_sample(raw, reading, needs)
        skip = rejecting_expression(sample, expressions)
        if skip is not None:
            # A sample that lacks what the expression needs because it could not be decoded has failed.
            needed = where_needs(skip)
            cause = next((failure for failure in failures if not failure.modality or failure.modality in needed), None)
            if cause is not None:
                failed = replace(cause, modality="", message=printable(f"{skip}: {cause.message}"))
                sample, failures, skip = replace(sample, image=None, audio=None), (*failures, failed), None
        return _DecodedSample(sample, failures, skip, raw.repeated, time.perf_counter() - begin)

    ahead: Lookahead[RawSample, _DecodedSample] = Lookahead(
        2 * cores() + 2, windows.decoded_bytes, _raw_bytes, lambda decoded: decoded.sample.nbytes
    )
    source = _UnitSamples(unit, reading, needs)
    remote = any("://" in input_.shard.path for input_ in unit.inputs)
    raws = _hold_while_paused(
        (raw for raw in source.samples() if wanted is None or wanted(raw.key)), _PAUSED_READ_BYTES if remote else 0
    )
    index, window, error_text = 0, _OpenWindow(), None
    try:
        with closing(ordered_map(decode, raws, decode_pool(), ahead)) as samples:
            for decoded in samples:
                window.add(decoded)
                del decoded
                if window.decoded_bytes >= windows.decoded_bytes or len(window.samples) >= windows.samples:
                    yield window.close(unit, index, source, last=False)
                    index, window = index + 1, _OpenWindow()
    except ShardError as error:
        error_text = str(error)
    yield window.close(unit, index, source, last=True, error=error_text)


def _hold_while_paused(raws: Iterator[RawSample], max_bytes: int) -> Iterator[RawSample]:
    """Yield each sample as it is read. While decoding is paused, hold them, and read ahead up to `max_bytes`."""
    held: deque[RawSample] = deque()
    held_bytes = 0
    for raw in raws:
        held.append(raw)
        held_bytes += _raw_bytes(raw)
        del raw  # it may be large
        while held and (may_decode.is_set() or held_bytes >= max_bytes):
            may_decode.wait()
            held_bytes -= _raw_bytes(held[0])
            yield held.popleft()
    while held:
        may_decode.wait()
        yield held.popleft()


def _raw_bytes(raw: RawSample) -> int:
    return sum(map(len, raw.members.values()))


class _UnitSamples:
    """The undecoded samples of a unit's inputs, and the cost of reading them since the last `pop_tally`."""

    def __init__(self, unit: WorkUnit, reading: Reading, needs: Needs) -> None:
        self._unit = unit
        self._reading = reading
        self._is_wanted = wanted_fields(reading, needs)
        self._seconds = 0.0
        self._bytes = 0
        self._warnings: Counter[str] = Counter()
        self.inputs_read = [InputRead()] * len(unit.inputs)

    def pop_tally(self) -> Tally:
        tally = Tally(seconds={"read": self._seconds}, bytes_read=self._bytes, warnings=dict(self._warnings))
        self._seconds, self._bytes = 0.0, 0
        self._warnings.clear()
        return tally

    def samples(self) -> Iterator[RawSample]:
        is_pack = len(self._unit.inputs) > 1 and self._unit.limit is None
        read = self._packed if is_pack else self._input
        return islice(chain.from_iterable(starmap(read, enumerate(self._unit.inputs))), self._unit.limit)

    def _packed(self, number: int, source: Input) -> Iterator[RawSample]:
        """Yield the samples of one input of a pack. One that cannot be read costs the other inputs nothing.

        One that breaks off has yielded samples already, so the unit fails. What is recorded of it makes the next launch
        read the pack without it (runs/plan.py).
        """
        any_read = False
        try:
            for raw in self._input(number, source):
                any_read = True
                yield raw
                del raw  # it may be large
        except ShardError as error:
            self.inputs_read[number] = InputRead(error=str(error))
            if any_read:
                raise

    def _input(self, number: int, source: Input) -> Iterator[RawSample]:
        with open_shard(source.shard, part_origin(source.begin)) as stream:
            limits = self._reading.limits
            reader = TarReader(stream, source.shard.path, self._is_wanted, limits, source.begin, source.end)
            yield from self._timed(iter(reader), stream)
        self._warnings["shards without an end-of-archive marker"] += reader.unterminated
        self._warnings["shards with data after their end-of-archive marker"] += reader.trailing_data
        self._warnings += Counter()  # drops zeros
        if source.is_part:
            self.inputs_read[number] = InputRead(first_sample=reader.first_sample, next_sample=reader.next_sample)

    def _timed(self, samples: Iterator[RawSample], stream: ShardStream) -> Iterator[RawSample]:
        """Yield each sample, and add the seconds spent and the stored bytes read to the tally."""
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
            del raw
