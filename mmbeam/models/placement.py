"""Where models run: one thread per device, and which device each work unit uses.

A device's thread loads its models and launches their kernels. Work units prepare work on their own threads, submit it
and wait for the results. Two units per device keep it busy: one computes while the other opens, decodes or writes.
Models stay loaded for the life of the process.

A process that launches a job uses every GPU it sees. A unit leases the least busy device when it begins and keeps it
until it ends, so with twice as many concurrent units as GPUs, each GPU has one unit that computes and one that is being
prepared. A worker process that a runner starts claims one GPU, because the runner starts as many processes as there are
GPUs (Flink: --sdk_worker_parallelism). A claim is a lock on a file per GPU in the temporary directory; the operating
system drops it when the process ends, however it ends. If there are more processes than GPUs, the others share the GPU
with the fewest claims and log a warning. A container that was given a single GPU (CUDA_VISIBLE_DEVICES, Kubernetes) has
nothing to claim.
"""

import logging
import os
import re
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock, Timeout

from mmbeam.errors import DeviceError, UsageError
from mmbeam.process import cores, decoding_paused, on_reset
from mmbeam.types import Batch, Stage, Tally

log = logging.getLogger(__name__)
cuda: Any = torch.cuda  # partly untyped

Fault = Literal["memory", "device", "environment", "sample"]

QUEUE_DEPTH = 2  # items of work per unit that a GPU computes or has queued, while the next one is prepared

# Parts of a RuntimeError's message that mean a broken device. Such an error is sticky: later results are wrong too.
_DEVICE_WORDS = ("cuda error", "cudnn error", "cudnn_status", "cublas_status", "nccl error", "device-side assert")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")


def classify(error: BaseException) -> Fault:
    """Return the cause of a model's exception: the device's memory, the device, the environment, or the sample."""
    message = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and any(words in message for words in _MEMORY_WORDS):
        return "memory"
    accelerator_error = getattr(torch, "AcceleratorError", ())  # new in torch 2.8
    if isinstance(error, (DeviceError, accelerator_error)) or any(words in message for words in _DEVICE_WORDS):
        return "device"
    return "environment" if isinstance(error, MemoryError | OSError) else "sample"


def release_cached_memory() -> None:
    """Release the GPU memory that torch's allocator caches, which is fragmented after a failure."""
    if cuda.is_initialized():
        cuda.empty_cache()


def wait_for_device() -> None:
    """Wait for the kernels that this thread has launched. Raises their error."""
    if cuda.is_initialized():
        cuda.current_stream().synchronize()


def resolve_device(name: str) -> str:
    """Return the device that `name` means on this machine: "auto" is the first GPU if there is one, else the CPU.

    Raises DeviceError for a GPU that is absent: there is no silent fallback to the CPU.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise UsageError(f"`device` {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"`device` {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} can use. Check nvidia-smi and the torch build, or run with `device` cpu"
        )
    return "cuda:0" if name == "cuda" else name


class Launched(NamedTuple):
    """Work whose kernels a GPU has not necessarily begun."""

    work: Any  # kept until the end, since the kernels read its memory
    result: Any
    begin: Any  # torch.cuda.Event
    end: Any  # torch.cuda.Event


class Device:
    """One device and the thread that owns it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"mmbeam-{name}")
        self._models: dict[str, Any] = {}  # by the stage's key
        self._failure: str | None = None  # the error that broke the device
        self._is_cuda = name.startswith("cuda")
        self._copies: Any = None  # torch.cuda.Stream of a GPU
        if self._is_cuda:
            torch.backends.cudnn.allow_tf32 = False  # torch's default rounds float32 convolutions to 10 bits

    def run(self, stage: Stage, batch: Batch) -> Batch:
        """Run `stage` on `batch`, and wait for the result. The stage's own device is ignored.

        On a GPU, the calling thread prepares work while the device computes what was prepared before. On a CPU,
        everything runs on the device's thread.

        The result's tally gains the seconds that the device computed ("compute"), that the calling thread prepared and
        collected ("prepare", on a GPU), loaded the model ("load_model") and waited for the device ("device_wait").
        Raises DeviceError when the device fails, and on every later call.
        """
        begin = time.perf_counter()
        if stage.device != self.name:
            stage = copy(stage)
            object.__setattr__(stage, "device", self.name)
        with self._failure_noted():
            model, loaded = self._thread.submit(self._load, stage).result()
            if self._is_cuda:
                result, seconds = self._run_overlapped(stage, model, batch)
            else:
                result, computed = self._thread.submit(self._run_in_series, stage, model, batch).result()
                seconds = {"compute": computed}
        waited = time.perf_counter() - begin - loaded - seconds["compute"] - seconds.get("prepare", 0.0)
        seconds |= {"load_model": loaded, "device_wait": max(0.0, waited)}
        return replace(result, tally=result.tally + Tally(seconds=seconds))

    @contextmanager
    def _failure_noted(self) -> Iterator[None]:
        """Raise DeviceError if the device has failed before; record its first failure and raise it as DeviceError."""
        self._raise_if_failed()
        try:
            yield
        except Exception as error:
            is_noted = self._failure is not None and isinstance(error, DeviceError)
            if is_noted or classify(error) != "device":
                raise
            self._failure = str(error).partition("\n")[0]  # CUDA's further lines are advice on debugging
            raise DeviceError(f"{self.name}: {type(error).__name__}: {self._failure}") from error

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise DeviceError(f"{self.name} failed before: {self._failure}")

    def _load(self, stage: Stage) -> tuple[Any, float]:
        """Return the stage's model, and the seconds spent loading it."""
        begin = time.perf_counter()
        with self._failure_noted(), cuda.device(self.name) if self._is_cuda else nullcontext():
            if self._is_cuda and self._copies is None:
                self._copies = cuda.Stream(self.name)
            if stage.key not in self._models:
                self._models[stage.key] = stage.load()
        return self._models[stage.key], time.perf_counter() - begin

    def _run_in_series(self, stage: Stage, model: Any, batch: Batch) -> tuple[Batch, float]:
        """Return the result, and the seconds it took."""
        begin = time.perf_counter()
        # Threads of a model on all cores of a CPU wait for each other, so concurrent decoding would slow them all.
        takes_all_cores = torch.get_num_threads() >= max(2, cores())
        paused = decoding_paused() if takes_all_cores else nullcontext()
        with self._failure_noted(), torch.inference_mode(), paused:
            result = stage.run(model, batch)
        return result, time.perf_counter() - begin

    def _run_overlapped(self, stage: Stage, model: Any, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """Return the result, and the seconds that the device computed and the calling thread prepared and collected."""
        flying: deque[Future[Launched]] = deque()
        results: list[Any] = []
        computed = waited = 0.0
        begin = time.perf_counter()
        with torch.inference_mode(), cuda.device(self.name):
            works = stage.prepare(model, batch)
            try:
                is_last = False
                while not is_last or flying:
                    if not is_last and len(flying) < QUEUE_DEPTH:
                        with cuda.stream(self._copies):
                            work = next(works, None)
                            is_last = work is None
                            if work is not None:
                                copied = self._copies.record_event()
                                flying.append(self._thread.submit(self._launch, stage, model, work, copied))
                        del work
                        continue
                    start = time.perf_counter()
                    launched = flying.popleft().result()
                    launched.end.synchronize()
                    waited += time.perf_counter() - start
                    computed += launched.begin.elapsed_time(launched.end) / 1000
                    results.append(launched.result)
                    del launched
            finally:
                for future in flying:  # after an error: the kernels still read the memory of their work
                    with suppress(Exception):
                        future.result().end.synchronize()
            result = stage.collect(model, batch, results)
        return result, {"compute": computed, "prepare": time.perf_counter() - begin - waited}

    def _launch(self, stage: Stage, model: Any, work: Any, copied: Any) -> Launched:
        with self._failure_noted(), torch.inference_mode(), cuda.device(self.name):
            cuda.current_stream().wait_event(copied)
            begin, end = (cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            begin.record()
            result = stage.launch(model, work)
            end.record()
        return Launched(work, result, begin, end)


_lock = threading.RLock()
_devices: dict[str, Device] = {}  # by name
_selected: list[str] = []  # the names of the devices that this process may use; empty: all that torch finds
_leases: dict[tuple[str, str], str] = {}  # the device of a unit, by the name that its stage gives and the unit's id
_claims: list[FileLock] = []  # held for the life of the process


@on_reset
def _reset() -> None:
    with _lock:
        for state in (_devices, _selected, _leases):
            state.clear()
        while _claims:
            _claims.pop().release()


def get_device(name: str) -> Device:
    """Return this process's only Device of that name."""
    with _lock:
        if name not in _devices:
            _devices[name] = Device(name)
        return _devices[name]


def use_devices(names: Sequence[str]) -> None:
    """Use these devices from now on and no others of their kind; empty: all that torch finds."""
    _selected[:] = names


def devices_of(name: str) -> tuple[str, ...]:
    """Return the devices that `name` means in this process: itself if it has a number, else all of that kind.

    "auto" is every GPU, or the CPU if there is no GPU. Raises DeviceError for a GPU that is absent.
    """
    kind = resolve_device(name).partition(":")[0]
    if ":" in name:
        return (name,)
    selected = tuple(device for device in _selected if torch.device(device).type == kind)
    return selected or (("cpu",) if kind == "cpu" else tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())))


def lease_device(name: str, unit: str) -> Device:
    """Return the device of the unit, one of the devices that `name` means. A new unit gets the least busy one."""
    with _lock:
        if (name, unit) not in _leases:
            units = Counter(_leases.values())
            _leases[name, unit] = min(devices_of(name), key=lambda device: units[device])
        return get_device(_leases[name, unit])


def release_device(name: str, unit: str) -> None:
    """End the unit's lease; no error if it has none."""
    with _lock:
        _leases.pop((name, unit), None)


def claim_one_device(name: str) -> None:
    """Use only one of the GPUs that `name` means, the one with the fewest claims: for a runner's worker process."""
    with _lock:
        devices = devices_of(name)
        if len(devices) > 1:
            use_devices([devices[claim_least_used([_identity(device) for device in devices])]])


def _identity(name: str) -> str:
    """Return what identifies a device for all processes: a GPU's number depends on CUDA_VISIBLE_DEVICES."""
    return str(torch.cuda.get_device_properties(name).uuid) if name.startswith("cuda") else name


def claim_least_used(ids: Sequence[str], directory: Path | None = None) -> int:
    """Claim the id that the fewest processes of this machine and user have claimed; return its index.

    Raises DeviceError if the directory of the locks belongs to another user.
    """
    directory = directory or Path(tempfile.gettempdir(), f"mmbeam-devices-{os.getuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.getuid():  # it could hold links to our files
        raise DeviceError(f"{directory}: expected a directory of this user; remove it, or set TMPDIR")
    # Lock N of a device is taken by its N-th process (from 0), so the first free N is the smallest number of claims.
    for others in count():
        for index, name in enumerate(ids):
            lock = FileLock(directory / f"{name}.{others}")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            if others:
                log.warning("%s has %d processes: more worker processes than devices", name, others + 1)
            _claims.append(lock)
            return index
    raise AssertionError("unreachable: some lock is always free")


def compute_on_one_thread() -> None:
    """Run torch's CPU kernels on one thread from now on: the kernels of a tiny model are too short to be divided."""
    torch.set_num_threads(1)
