"""Samples of a work unit as windows, read and decoded ahead of the consumer.

A thread per unit reads the tar in order and hands samples to the process's decode pool (the codecs release the GIL),
unless decoding is paused. It is one window ahead of the consumer. Where a window closes depends on
the data alone, so that a retry and another runner see the same windows.
"""

import math
import queue
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from mmbeam.clean.where import compile_where, rejecting_expression, where_needs
from mmbeam.config import MIB, Limits, Reading, Windows
from mmbeam.decode import decode_apart, decode_sample, wanted_fields
from mmbeam.decode.common import LargeValueError
from mmbeam.errors import ShardError, printable
from mmbeam.names import KIND_OF_EXTENSION, MODALITIES
from mmbeam.process import MemoryBudget, cores, decode_pool, may_decode, steps
from mmbeam.readers.samples import open_samples
from mmbeam.readers.tar import KINDS_COUNTED
from mmbeam.types import Batch, Failure, InputRead, Needs, RawSample, Sample, Tally, WorkUnit

InT = TypeVar("InT")
OutT = TypeVar("OutT")

_LARGE_BYTES = 32 * MIB  # a sample that takes more, or more than a quarter of a window, is decoded alone, within _large
_large = MemoryBudget(Limits.decode_bytes)
_SHARE = Limits.decode_bytes // 2  # of _large, at most, for a window of several large samples
_AHEAD_BYTES = 32 * MIB  # of a unit's samples, decoded ahead of the window; at least a sample per core
_PAUSED_READ_BYTES = 8 * MIB  # of a remote shard's samples, read ahead while decoding is paused; 0 for local shards


class HeldBytes:
    """The part of the process's memory budget that the large samples of a unit's windows use. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: deque[tuple[int, int]] = deque()  # index of a window, bytes
        self._released: float = 0  # windows before this index are finished

    def add(self, index: int, nbytes: int) -> None:
        """Hold `nbytes`, which were acquired, until window `index` is finished."""
        with self._lock:
            self._held.append((index, nbytes))
        self.release_before(0)  # the consumer may have stopped reading in the meantime

    def release_before(self, index: float) -> None:
        """Release the bytes held by windows before `index`, including those added later."""
        with self._lock:
            self._released = max(self._released, index)
            while self._held and self._held[0][0] < self._released:
                _large.release(self._held.popleft()[1])


def prefetch(batches: Generator[Batch], name: str, held: HeldBytes | None = None) -> Generator[Batch]:
    """Yield the windows of a unit, up to the one with `last`.

    A thread makes the next window while the consumer processes the current one, so two are in memory. Exceptions of
    `batches` are re-raised here. Each tally gains the seconds of "read_wait", for which the consumer waited. Closing
    the generator ends the thread, which is called `name`.

    Samples that take more than 32 MiB to decode share 600 MB with those of the process's other units: such a sample is
    decoded once the consumer has asked for a later window and so released enough of the budget. Pass the same `held` to
    `read_batches`.
    """
    ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
    room = threading.Semaphore(1)  # held from the start of a window until the consumer takes it
    stopped = threading.Event()

    def fill() -> None:
        try:
            with closing(batches):
                while room.acquire() and not stopped.is_set() and (batch := next(batches, None)) is not None:
                    ready.put(batch)
                    del batch  # a window is large: do not hold it while the next one is made
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=fill, name=name, daemon=True)
    thread.start()
    try:
        last, index = False, 0
        while not last:
            if held is not None:
                held.release_before(index)
            begin = time.perf_counter()
            item = ready.get()
            room.release()
            waited = Tally(seconds={"read_wait": time.perf_counter() - begin})
            if isinstance(item, BaseException):
                raise item
            last, index = item.last, item.index + 1
            yield replace(item, tally=item.tally + waited)
            del item
    finally:
        stopped.set()
        room.release()
        if held is not None:
            held.release_before(math.inf)
        thread.join(timeout=1)  # it may be waiting for a store; as a daemon it does not delay the exit


@dataclass(frozen=True)
class Lookahead(Generic[InT, OutT]):
    """How far `ordered_map` works ahead: `depth` items, or fewer, at least `least`, if items or results are large."""

    depth: int
    max_bytes: int = sys.maxsize
    paused_bytes: int = 0  # of items, read while decoding is paused
    item_bytes: Callable[[InT], int] = lambda item: 0
    result_bytes: Callable[[OutT], int] = lambda result: 0
    least: int = 1


def ordered_map(
    call: Callable[[InT], OutT], items: Iterator[InT], pool: ThreadPoolExecutor, ahead: Lookahead[InT, OutT]
) -> Generator[OutT]:
    """Yield `map(call, items)` in order, computed by `pool` ahead of the consumer.

    No item is None. While decoding is paused (process.py), read items ahead up to `paused_bytes`, and submit none.
    """
    waiting: deque[tuple[InT, int]] = deque()  # items read and not submitted, with their bytes
    pending: deque[tuple[Future[OutT], int]] = deque()  # submitted
    waiting_bytes = pending_bytes = 0
    room = min(ahead.depth, max(2, ahead.least))  # until a result shows how large they are
    ended = False
    try:
        while not (ended and not waiting and not pending):
            is_full = len(pending) >= room or (len(pending) >= ahead.least and pending_bytes > ahead.max_bytes)
            if pending and (is_full or (ended and not waiting)):
                future, size = pending.popleft()
                pending_bytes -= size
                result = future.result()
                room = min(ahead.depth, max(ahead.least, ahead.max_bytes // max(1, ahead.result_bytes(result))))
                yield result
                del result, future
            elif not ended and (not waiting or (not may_decode.is_set() and waiting_bytes < ahead.paused_bytes)):
                new = next(items, None)
                if new is None:
                    ended = True
                else:
                    waiting.append((new, ahead.item_bytes(new)))
                    waiting_bytes += waiting[-1][1]
                del new  # it may be large
            else:
                may_decode.wait()
                item, size = waiting.popleft()
                pending.append((pool.submit(call, item), size))
                waiting_bytes, pending_bytes = waiting_bytes - size, pending_bytes + size
                del item
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
    large_bytes: int = 0  # that decoding its large samples took
    reserved_bytes: int = 0  # of the process's budget, for its large samples

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
            failures=(*self.failures, *source.failures) if last else tuple(self.failures),
            tally=tally + source.pop_tally(),
            unit_error=error,
            inputs_read=tuple(source.inputs_read) if last else (),
        )


def read_batches(
    unit: WorkUnit,
    reading: Reading,
    needs: Needs,
    windows: Windows,
    wanted: Callable[[str], bool] | None = None,
    held: HeldBytes | None = None,
    samples: Iterator[RawSample] | None = None,
) -> Generator[Batch]:
    """Yield the unit's windows in order; the last one has `last`, and `unit_error` if an input could not be read.

    The samples are those of the unit's inputs, unless they are passed as `samples`. Samples whose key is not `wanted`
    are skipped before they are decoded, and are not counted. Each tally has the seconds of "read" and "decode" (summed
    over threads). `prefetch` makes windows ahead of the consumer.
    """
    expressions = [(text, compile_where(text)) for text in reading.cleaning.where]
    isolation = unit.isolation
    probed = None if isolation is None else isolation.probed
    own, held = held is None, held or HeldBytes()

    alone_bytes = max(_LARGE_BYTES, windows.decoded_bytes // 4)

    def decode(raw: RawSample, max_bytes: int | None = alone_bytes) -> _DecodedSample | tuple[RawSample, int]:
        """Return the decoded sample, or the raw sample and the bytes needed if decoding takes more than `max_bytes`."""
        begin = time.perf_counter()
        steps.begin("decode", [raw])
        crash = None if isolation is None else isolation.crashes.get(raw.id)
        try:
            decode_it = decode_apart if reading.isolate_decoding else decode_sample
            sample, failures = decode_it(raw, reading, needs, crash, max_bytes)
        except LargeValueError as error:
            return raw, error.nbytes
        skip = rejecting_expression(sample, expressions)
        if skip is not None:
            # If a value that the expression needs could not be decoded, the sample fails; it is not skipped.
            needed = where_needs(skip)
            cause = next((failure for failure in failures if not failure.modality or failure.modality in needed), None)
            if cause is not None:
                failed = replace(cause, modality="", message=printable(f"{skip}: {cause.message}"))
                sample, failures, skip = replace(sample, image=None, audio=None), (*failures, failed), None
        steps.begin("read", ())
        return _DecodedSample(sample, failures, skip, raw.repeated, time.perf_counter() - begin)

    ahead: Lookahead[RawSample, _DecodedSample | tuple[RawSample, int]] = Lookahead(
        depth=2 * cores() + 2 if isolation is None else 1,
        least=cores() if isolation is None else 1,
        max_bytes=_AHEAD_BYTES,
        paused_bytes=_PAUSED_READ_BYTES if any("://" in source.shard.path for source in unit.inputs) else 0,
        item_bytes=lambda raw: sum(map(len, raw.members.values())),
        result_bytes=lambda decoded: decoded[1] if isinstance(decoded, tuple) else decoded.sample.nbytes,
    )
    source = _UnitSamples(unit, reading, needs)
    raws = (
        raw
        for raw in (source.samples() if samples is None else samples)
        if (wanted is None or wanted(raw.key)) and (probed is None or raw.id in probed)
    )
    index, window, error_text = 0, _OpenWindow(), None
    try:
        with closing(ordered_map(decode, raws, decode_pool(), ahead)) as decoded_samples:
            for decoded in decoded_samples:
                if isinstance(decoded, tuple):
                    # To avoid deadlock, a window reserves memory for its large samples once. A window that # holds
                    # memory never waits for more; it is yielded first. Only the next sample in order may wait.
                    raw, large_bytes = decoded
                    if window.reserved_bytes and window.large_bytes + large_bytes > window.reserved_bytes:
                        yield window.close(unit, index, source, last=False)
                        index, window = index + 1, _OpenWindow()
                        if own:
                            held.release_before(index)
                    if not window.reserved_bytes:
                        window.reserved_bytes = _large.acquire(max(large_bytes, min(windows.decoded_bytes, _SHARE)))
                        held.add(index, window.reserved_bytes)
                    window.large_bytes += large_bytes
                    decoded = decode(raw, None)
                    assert isinstance(decoded, _DecodedSample)
                    del raw
                window.add(decoded)
                del decoded
                is_full = window.large_bytes and window.large_bytes >= window.reserved_bytes
                if is_full or window.decoded_bytes >= windows.decoded_bytes or len(window.samples) >= windows.samples:
                    yield window.close(unit, index, source, last=False)
                    index, window = index + 1, _OpenWindow()
                    if own:
                        held.release_before(index)
    except ShardError as error:
        error_text = str(error)
    finally:
        if own:
            held.release_before(math.inf)
    yield window.close(unit, index, source, last=True, error=error_text)


class _UnitSamples:
    """The undecoded samples of a unit's inputs, and the cost of reading them since the last `pop_tally`."""

    def __init__(self, unit: WorkUnit, reading: Reading, needs: Needs) -> None:
        self._unit = unit
        self._reading = reading
        self._is_wanted = wanted_fields(reading, needs)
        self._seconds = 0.0
        self._bytes = 0
        self._warnings: Counter[str] = Counter()
        self._members: Counter[str] = Counter()
        self._extensions: set[str] = set()  # of members that no job reads
        self.failures: list[Failure] = []  # damage to shards that belongs to no sample
        self.inputs_read = [InputRead()] * len(unit.inputs)

    def pop_tally(self) -> Tally:
        tally = Tally(
            seconds={"read": self._seconds},
            bytes_read=self._bytes,
            members=dict(self._members),
            warnings=dict(self._warnings),
        )
        self._seconds, self._bytes = 0.0, 0
        self._members.clear()
        self._warnings.clear()
        return tally

    def samples(self) -> Iterator[RawSample]:
        """Yield the samples of all inputs in order, up to the unit's limit.

        If an input of a pack cannot be opened, the others are still read. If it fails after some of its samples, the
        unit fails. In both cases the recorded error makes the next launch plan the pack without it (runs/plan.py).
        With a limit, the inputs after a failed one are still read; the unit fails if none yields a sample.
        """
        is_limited = self._unit.limit is not None
        is_pack = len(self._unit.inputs) > 1 and not is_limited
        count = 0
        for number, source in enumerate(self._unit.inputs):
            count_before = count
            try:
                with open_samples(source, self._is_wanted, self._reading) as (reader, stream):
                    samples, stored_before = iter(reader), 0
                    while True:
                        begin = time.perf_counter()
                        raw = next(samples, None)
                        self._seconds += time.perf_counter() - begin
                        self._bytes += stream.bytes_read - stored_before
                        stored_before = stream.bytes_read
                        if raw is None:
                            break
                        count += 1
                        self._members.update(f".{ext}" for ext in map(self._unknown_extension, raw.fields) if ext)
                        yield raw
                        del raw  # it may be large
                        if count == self._unit.limit:
                            del self.inputs_read[number + 1 :]
                            return
            except ShardError as error:
                if is_pack:
                    self.inputs_read[number] = InputRead(error=str(error))
                elif is_limited:
                    self.inputs_read[number] = InputRead(broken=str(error))
                is_last = number == len(self._unit.inputs) - 1
                fails = is_last and not count if is_limited else not is_pack or count > count_before
                if fails:
                    raise
                continue
            self._members += reader.members
            self._warnings["shards without any member"] += reader.is_empty
            self._warnings["shards without an end-of-archive marker"] += reader.unterminated
            self._warnings["shards with data after their end-of-archive marker"] += reader.trailing_data
            self._warnings["shards of several tars, all of which were read"] += reader.concatenated
            self._warnings += Counter()  # drops zeros
            self.failures += [
                Failure.of_shard(source.shard.path, damage.offset or 0, "read", damage.error, damage.message)
                for damage in reader.failures
            ]
            self.inputs_read[number] = InputRead(
                first_sample=reader.first_sample if source.is_part else None,
                next_sample=reader.next_sample,
                broken=reader.broken,
            )

    def _unknown_extension(self, name: str) -> str | None:
        """Return the extension of a field that no job reads, "(other)" beyond KINDS_COUNTED; None for others."""
        extension = name.rpartition(".")[2]
        if self._reading.fields.kind(name) is not None or extension in KIND_OF_EXTENSION:
            return None
        if extension not in self._extensions and len(self._extensions) == KINDS_COUNTED:
            return "(other)"
        self._extensions.add(extension)
        return printable(extension)
