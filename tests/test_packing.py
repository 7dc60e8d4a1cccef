"""Packing a window into batches, halving batches that do not fit, and isolating items that fail."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmbeam.errors import DeviceError
from mmbeam.models.generators.base import Generator
from mmbeam.models.placement import classify
from mmbeam.prompts.ask import Decoding, GeneratorSpec, Request
from mmbeam.stages.generate import padded_weights, plan_batches
from mmbeam.stages.packing import MemoryLimit, Pack, PackResults, launch_pack, pack

weights = st.lists(st.integers(1, 500), max_size=80)


def run_batches(
    items: Sequence[Any],
    batches: Sequence[list[int]],
    call: Callable[[Any], Any],
    known_good: Callable[[], Any],
    weights: Sequence[int] | None = None,
    limit: MemoryLimit | None = None,
) -> PackResults[Any]:
    """Run the packs of a window, prepared one by one before they are launched."""
    results: PackResults[Any] = PackResults("")
    limit = limit or MemoryLimit()
    for batch in batches:
        batch_weights = [1 if weights is None else weights[position] for position in batch]
        whole = Pack(group="", positions=batch, items=[items[position] for position in batch], weights=batch_weights)
        for part in limit.split(whole):
            part.inputs = list(part.items)
            result = launch_pack(part, list, call, known_good, limit)
            results.done += result.done
            results.failed |= result.failed
            results.splits += result.splits
    return results


limits = st.one_of(st.none(), st.integers(1, 2000))


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), max_size=80), st.integers(1, 20), limits, limits)
def test_every_item_is_in_exactly_one_batch_within_the_limits(
    items: list[tuple[int, int]], batch_size: int, max_weight: int | None, max_size: int | None
) -> None:
    weights, sizes = [weight for weight, _ in items], [size for _, size in items]
    batches = pack(weights, batch_size, max_weight, sizes, max_size)
    assert sorted(position for batch in batches for position in batch) == list(range(len(weights)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        heaviest = max(weights[position] for position in batch)
        assert max_weight is None or len(batch) == 1 or len(batch) * heaviest <= max_weight
        assert max_size is None or len(batch) == 1 or sum(sizes[position] for position in batch) <= max_size


class WordCounter(Generator):
    """Weighs a request by its words."""

    def __init__(self, has_scheduler: bool = False) -> None:
        super().__init__(
            GeneratorSpec(family="", directory="", modalities=("text",)), torch.device("cpu"), torch.float32
        )
        self.has_scheduler = has_scheduler  # type: ignore[misc]

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len((request.text or "").split()) for request in requests]


def sizes_of(count: int, words: int = 10, side: int = 32, **decoding: int) -> list[int]:
    """The sizes of batches of `count` equal requests, at most 4 each."""
    image = np.zeros((side, side, 3), np.uint8)
    requests = [Request(image=image, text="word " * words)] * count
    weights = padded_weights(WordCounter(), requests, Decoding(**decoding))
    return [len(batch) for batch in plan_batches(WordCounter(), requests, weights, 4)]


def test_a_batch_has_room_for_prompts_and_new_tokens_of_all_beams() -> None:
    """At most 4 times 512 tokens."""
    assert sizes_of(8) == [4, 4]
    assert sizes_of(8, words=512 - 64) == [4, 4]
    assert sizes_of(8, words=512 - 63) == [3, 3, 2]
    assert sizes_of(8, max_new_tokens=1014) == [2, 2, 2, 2]
    assert sizes_of(4, num_beams=7) == [2, 2]
    assert sizes_of(2, max_new_tokens=10_000) == [1, 1]


def test_a_batch_limits_its_pixels() -> None:
    """At most 4 times a million: 2 images of 1,300 x 1,300."""
    assert sizes_of(4, side=1024) == [4]
    assert sizes_of(4, side=1300) == [2, 2]


def test_a_generator_with_a_scheduler_gets_the_whole_window() -> None:
    requests = [Request(text="word")] * 9
    assert plan_batches(WordCounter(has_scheduler=True), requests, [1] * 9, 4) == [list(range(9))]
    assert plan_batches(WordCounter(has_scheduler=True), [], [], 4) == []


def test_items_of_equal_weight_are_ordered_by_size() -> None:
    assert pack([7] * 6, 2, sizes=[1, 9, 4, 9, 1, 4]) == [[1, 3], [2, 5], [0, 4]]


@given(weights, st.integers(1, 20))
def test_batches_are_ordered_by_weight_and_even(weights: list[int], size: int) -> None:
    """A weight limit that is never reached changes nothing."""
    batches = pack(weights, size)
    assert pack(weights, size, 500 * size) == batches
    flat = [weights[position] for batch in batches for position in batch]
    assert flat == sorted(flat, reverse=True)
    sizes = [len(batch) for batch in batches]
    assert not sizes or max(sizes) - sizes[-1] <= len(sizes)
    assert len(batches) == -(-len(weights) // size)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 16), st.integers(1, 16))
def test_bad_items_fail_alone(bad: list[bool], size: int, memory: int) -> None:
    """For any failures and any amount of memory, every item is either done or failed."""

    def call(items: list[tuple[int, bool]]) -> list[int]:
        if len(items) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if any(is_bad for _, is_bad in items):
            raise ValueError("unusable")
        return [number for number, _ in items]

    items = list(enumerate(bad))
    results = run_batches(items, pack([1] * len(items), size), call, known_good=lambda: (-1, False))
    done = {number for positions, result in results.done for number in result}
    for positions, result in results.done:
        assert positions == result
    assert done == {number for number, is_bad in items if not is_bad}
    assert set(results.failed) == {number for number, is_bad in items if is_bad}
    assert (results.splits["memory"] > 0) == any(len(batch) > memory for batch in pack([1] * len(items), size))


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 8, 16])
def test_what_did_not_fit_is_not_tried_again(memory: int) -> None:
    """Windows of other lengths, too: within a factor of 2 in weight, none fails after the first."""
    sizes: list[int] = []

    def call(items: list[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > memory:
            raise RuntimeError("CUDA error: out of memory")
        return items

    limit = MemoryLimit()
    for window, first_weight in enumerate((100, 70, 130, 100)):
        sizes.clear()
        items = list(range(16))
        weights = [first_weight + item for item in items]
        results = run_batches(items, pack(weights, 16), call, lambda: -1, weights, limit)
        assert sorted(item for _, done in results.done for item in done) == items
        assert (results.splits["memory"] > 0) == (window == 0 and memory < 16)
        assert window == 0 or max(sizes) <= memory
    sizes.clear()
    run_batches(list(range(16)), [list(range(16))], call, lambda: -1, [1] * 16, limit)  # far smaller: tried
    assert sizes[0] == 16


def test_a_sample_too_large_for_any_batch_is_one_failure() -> None:
    def call(items: list[int]) -> list[int]:
        if 7 in items:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items

    limit = MemoryLimit()
    results = run_batches(list(range(16)), [list(range(16))], call, lambda: -1, limit=limit)
    assert list(results.failed) == [7]
    assert sorted(item for _, done in results.done for item in done) == [*range(7), *range(8, 16)]


def test_errors_keep_no_tensors_alive_while_a_batch_is_halved() -> None:
    """Frames of the error, of its cause and of its context."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def allocate(depth: int) -> None:
        tensor = torch.zeros(1)
        alive.append(weakref.ref(tensor))
        try:
            if depth:
                allocate(depth - 1)
            raise ValueError("inner")
        except ValueError as error:
            if depth % 2:
                raise RuntimeError("CUDA error: out of memory") from error
            raise RuntimeError("CUDA error: out of memory")  # noqa: B904, the context is what is tested

    def call(items: list[int]) -> list[int]:
        assert not any(reference() is not None for reference in alive)
        if len(items) > 1:
            allocate(3)
        return items

    assert len(run_batches([1, 2, 3, 4], [[0, 1, 2, 3]], call, lambda: 0).done) == 4
    assert len(alive) > 4


def test_a_device_error_is_raised() -> None:
    def call(items: list[int]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_batches([1, 2], [[0, 1]], call, known_good=lambda: 0)


def test_a_model_that_fails_on_a_good_input_is_a_device_error() -> None:
    def call(items: list[int]) -> None:
        raise ValueError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(DeviceError, match="known to be good"):
        run_batches([1, 2], [[0, 1]], call, known_good=lambda: 0)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "memory"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "device"),
        (OSError("disk full"), "environment"),
        (MemoryError(), "environment"),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "sample"),
        (ValueError("odd"), "sample"),
    ],
)
def test_classification_of_errors(error: Exception, fault: str) -> None:
    assert classify(error) == fault
