"""Windows read ahead: their limits, what they hold in memory, and what becomes of the thread."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shards

from mmbeam.config import GPU_WINDOWS, Cleaning, Limits, Reading, Windows
from mmbeam.process import MemoryBudget, cores, decoding_paused, reset, use_cores
from mmbeam.readers import windows as module
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import limited_unit, plan_units
from mmbeam.readers.windows import HeldBytes, Lookahead, ordered_map, prefetch, read_batches
from mmbeam.types import Batch, Needs, RawSample, WorkUnit

IMAGES = Needs(modalities=frozenset({"image"}))


def unit_of(directory: Path, samples: int = 12, limit: int | None = None) -> WorkUnit:
    shards.make_webdataset(directory, shards.make_truths(samples), shards=1)
    listed = list_shards([str(directory)])
    return plan_units(listed, [])[0] if limit is None else limited_unit(listed, limit)


def read(unit: WorkUnit, reading: Reading | None = None, windows: Windows | None = None) -> list[Batch]:
    batches = read_batches(unit, reading or Reading(), IMAGES, windows or Windows(samples=5))
    return list(prefetch(batches, "mmbeam-read-it"))


def test_windows_close_by_count_or_by_decoded_bytes_and_the_last_one_ends_the_unit(tmp_path: Path) -> None:
    unit = unit_of(tmp_path)
    assert [len(batch.samples) for batch in read(unit)] == [5, 5, 2]
    assert [batch.index for batch in read(unit)] == [0, 1, 2]
    assert [batch.last for batch in read(unit)] == [False, False, True]
    by_bytes = read(unit, windows=Windows(decoded_bytes=1))
    assert [len(batch.samples) for batch in by_bytes] == [1] * 12 + [0]


@pytest.mark.parametrize("limit", [3, 12, 15])
def test_reading_stops_at_the_limit(tmp_path: Path, limit: int) -> None:
    """Not even the next shard is opened: not a tar here."""
    shards.make_webdataset(tmp_path, shards.make_truths(15), shards=1)
    (tmp_path / "shard-x.tar").write_bytes(b"not a tar" * 200)
    batches = read(limited_unit(list_shards([str(tmp_path)]), limit))
    assert sum(batch.tally.samples for batch in batches) == limit
    assert batches[-1].unit_error is None


def test_an_undecidable_condition_is_a_failure_and_a_false_condition_a_skip(tmp_path: Path) -> None:
    """A broken image has no width. A bad text does not turn the skip of a small image into a failure."""
    good = shards.make_truths(4)
    broken = replace(good[0], key="broken", members={"jpg": b"\xff\xd8 not an image"})
    small = replace(good[1], key="small", members={**good[1].members, "txt": b"\xff\xfe\xfd"})
    shards.make_webdataset(tmp_path, [broken, small, *good[2:]], shards=1)
    unit = plan_units(list_shards([str(tmp_path)]), [])[0]
    batch = read(unit, Reading(cleaning=Cleaning(where=("image_width >= 80",))))[0]
    assert [sample.key for sample in batch.samples] == ["broken", "000002", "000003"]
    assert [(failure.key, failure.modality) for failure in batch.failures] == [("broken", "image"), ("broken", "")]
    assert batch.tally.skipped == {"image_width >= 80": 1}


def test_a_shard_that_cannot_be_read_ends_its_unit_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    [batch] = read(plan_units(list_shards([str(tmp_path)]), [])[0])
    assert batch.last
    assert batch.unit_error is not None
    assert "a.tar" in batch.unit_error


def test_closing_ends_the_thread_and_decoder_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = unit_of(tmp_path, samples=40)
    batches = prefetch(read_batches(unit, Reading(), IMAGES, Windows(samples=2)), "mmbeam-read-it")
    next(batches)
    batches.close()
    assert not readers()

    def no_memory(data: bytes, *_: object) -> None:
        raise MemoryError("no room for a picture")

    monkeypatch.setattr("mmbeam.decode.decode_image", no_memory)
    with pytest.raises(MemoryError, match="no room"):
        read(unit)
    assert not readers()


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mmbeam-read-")]


def test_at_most_one_window_is_made_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, made = unit_of(tmp_path, samples=40), [0]
    decode = module.decode_sample

    def counted(*args: object) -> object:
        made[0] += 1
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "decode_sample", counted)
    batches = prefetch(read_batches(unit, Reading(), IMAGES, Windows(samples=2)), "mmbeam-read-it")
    next(batches)
    time.sleep(0.2)
    depth = 2 * cores() + 2
    assert made[0] <= 2 + 2 + depth  # the window taken, the window made ahead, and the decoder's queue
    batches.close()


def test_few_large_results_wait() -> None:
    """The size is known from the first result on; then at most one may wait."""
    running, most = [0], [0]
    lock = threading.Lock()

    def call(number: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        return number

    def consume(results: Iterator[int]) -> list[int]:
        taken = []
        for result in results:
            taken.append(result)
            with lock:
                running[0] -= 1
            if len(taken) == 10:
                most[0] = 0
            time.sleep(0.002)
        return taken

    with ThreadPoolExecutor(4) as pool:
        assert consume(
            ordered_map(call, iter(range(50)), pool, Lookahead(16, 100, result_bytes=lambda _: 100))
        ) == list(range(50))
    assert most[0] <= 2


def test_a_member_over_the_limit_is_a_failure_of_its_sample(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, samples=3)
    batch = read(unit, Reading(limits=Limits(member_bytes=500)))[0]
    assert {failure.error for failure in batch.failures} == {"LimitError"}
    assert len(batch.samples) == 3


@pytest.mark.parametrize(("count", "kept"), [(2, 2), (6, 3)])
def test_a_paused_unit_reads_ahead_up_to_a_limit(count: int, kept: int) -> None:
    """The samples are 3 MiB and the limit is 8 MiB: a shard of two is read to its end, one of six up to the third."""
    stored_count, taken, enough = [0], [0], threading.Event()

    def stored() -> Iterator[RawSample]:
        for number in range(count):
            stored_count[0] += 1
            if stored_count[0] == kept:
                enough.set()
            members = {"bin": bytes(3 << 20)}
            yield RawSample(key=str(number), shard="a.tar", offset=number, members=members, fields=("bin",))

    def take() -> list[str]:
        def key_of(raw: RawSample) -> str:
            taken[0] += 1
            return raw.key

        ahead: Lookahead[RawSample, str] = Lookahead(
            4, paused_bytes=8 << 20, item_bytes=lambda raw: len(raw.members["bin"])
        )
        return list(ordered_map(key_of, stored(), pool, ahead))

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as thread:
        with decoding_paused():
            with decoding_paused():
                keys = thread.submit(take)
                assert enough.wait(10)
            time.sleep(0.1)  # one of two pauses is over
            assert (stored_count[0], taken[0]) == (kept, 0)
        assert keys.result(timeout=10) == [str(number) for number in range(count)]


def test_a_unit_waits_while_decoding_is_paused(tmp_path: Path) -> None:
    unit = unit_of(tmp_path)
    with ThreadPoolExecutor(1) as thread:
        with decoding_paused():
            batches = thread.submit(read, unit)
            time.sleep(0.2)
            assert not batches.done()
        assert [len(batch.samples) for batch in batches.result(timeout=10)] == [5, 5, 2]


def test_every_core_decodes_however_large_the_samples_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores and pictures of 12 megapixels, of which 32 MiB hold none: eight decoders meet."""
    reset()
    use_cores(8)
    decode, meeting = module.decode_sample, threading.Barrier(8)

    def large(*args: object) -> object:
        meeting.wait(10)
        sample, failures = decode(*args)  # type: ignore[arg-type]
        return replace(sample, image=np.empty((3000, 4000, 3), np.uint8)), failures  # memory that is never touched

    monkeypatch.setattr(module, "decode_sample", large)
    assert [len(batch.samples) for batch in read(unit_of(tmp_path, 16), windows=GPU_WINDOWS)] == [8, 8, 0]
    reset()


def test_windows_are_larger_on_a_gpu_unless_set() -> None:
    assert [Windows().on(device) for device in ("cpu", "cuda", "cuda:1")] == [Windows(), GPU_WINDOWS, GPU_WINDOWS]
    assert Windows(samples=7).on("cuda:0") == Windows(samples=7)
    assert GPU_WINDOWS.decoded_bytes > Windows().decoded_bytes


# The budget of memory for large samples


def test_a_budget_is_granted_in_order() -> None:
    """A large request is not overtaken by smaller ones that would fit; one beyond the budget gets all of it."""
    budget, granted = MemoryBudget(100), []
    assert budget.acquire(60) == 60
    waiting = []
    for nbytes in (1000, 10, 30):
        waiting.append(threading.Thread(target=lambda n=nbytes: granted.append(budget.acquire(n))))
        waiting[-1].start()
        while len(budget._waiting) < len(waiting):
            time.sleep(0.001)
    assert granted == []
    budget.release(60)
    waiting[0].join(10)
    assert granted == [100]
    budget.release(100)
    for thread in waiting[1:]:
        thread.join(10)
    assert sorted(granted) == [10, 30, 100]
    assert budget._used == 40


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> MemoryBudget:
    """Every sample is large: two of them fit into the budget of the process."""
    budget = MemoryBudget(2 * 64 * 48 * 3)
    monkeypatch.setattr(module, "_large", budget)
    monkeypatch.setattr(module, "_LARGE_BYTES", 1)
    monkeypatch.setattr(module, "_SHARE", budget.nbytes // 2)
    return budget


def test_windows_decoded_in_child_processes_are_the_same(budget: MemoryBudget, tmp_path: Path) -> None:
    unit = unit_of(tmp_path)
    batches = read(unit, Reading(isolate_decoding=True), Windows(samples=5, decoded_bytes=8_000))
    for batch, expected in zip(batches, read(unit, windows=Windows(samples=5, decoded_bytes=8_000)), strict=True):
        assert [sample.id for sample in batch.samples] == [sample.id for sample in expected.samples]
        for sample, other in zip(batch.samples, expected.samples, strict=True):
            np.testing.assert_array_equal(sample.image, other.image)
    reset()
    assert budget._used == 0


def test_held_bytes_are_released_when_their_window_is_finished(budget: MemoryBudget) -> None:
    held = HeldBytes()
    for index in (0, 0, 1, 3):
        held.add(index, budget.acquire(10))
    for index, left in ((0, 40), (1, 20), (2, 10), (3, 10), (4, 0)):
        held.release_before(index)
        assert budget._used == left
    held.add(2, budget.acquire(10))  # the consumer has left it behind
    assert budget._used == 0


def test_large_samples_of_several_units_stay_within_the_budget(budget: MemoryBudget, tmp_path: Path) -> None:
    """Also if a consumer leaves early. Each of several units gets its samples in order."""
    unit, peaks = unit_of(tmp_path), []
    acquire = budget.acquire

    def recorded(nbytes: int) -> int:
        granted = acquire(nbytes)
        peaks.append(budget._used)
        return granted

    budget.acquire = recorded  # type: ignore[method-assign]

    def consume(_: int, most: int = 100) -> list[str]:
        keys: list[str] = []
        held = HeldBytes()
        batches = read_batches(unit, Reading(), IMAGES, Windows(samples=5, decoded_bytes=8_000), held=held)
        for batch in prefetch(batches, "mmbeam-read-it", held):
            keys += [sample.key for sample in batch.samples]
            if len(keys) >= most:
                break
        return keys

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(consume, range(3)))
    assert results == [[truth.key for truth in shards.make_truths(12)]] * 3
    assert len(consume(0, most=3)) >= 3
    assert 0 < max(peaks) <= budget.nbytes
    for _ in range(1000):  # the thread of the reader that was left
        if budget._used == 0:
            break
        time.sleep(0.005)
    assert budget._used == 0
