"""Where models live: one thread per device, which loads them, runs them and alone touches the device.

Units submit windows and wait for the result; two units at once keep a device busy, since one computes
while the other opens, decodes or writes. Models are held by strong references for the life of the
process. What is a sample's fault and what is the device's is told apart here; which of several devices a
unit is on, in leases.py.
"""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch

from mmbeam.errors import DeviceError, UsageError
from mmbeam.process import cores, decoding_paused
from mmbeam.types import Batch, Stage, Tally

Fault = Literal["memory", "device", "surroundings", "sample"]

# What a broken device says in a plain RuntimeError. Such an error is sticky: nothing later is true.
_DEVICE_WORDS = ("cuda error", "cudnn error", "cudnn_status", "cublas_status", "nccl error", "device-side assert")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")


def classify(error: BaseException) -> Fault:
    """Whose fault an exception of a model is: the device's (its memory, itself), the host's, or the sample's."""
    words = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and any(word in words for word in _MEMORY_WORDS):
        return "memory"
    accelerator = getattr(torch, "AcceleratorError", None)
    if accelerator is not None and isinstance(error, accelerator):
        return "device"
    if isinstance(error, DeviceError) or any(word in words for word in _DEVICE_WORDS):
        return "device"
    return "surroundings" if isinstance(error, MemoryError | OSError) else "sample"


def resolve_device(name: str) -> str:
    """The device that `name` means on this machine: "auto" takes a GPU if there is one.

    Raises DeviceError for a GPU that is not there: there is no silent fall-back to the CPU.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} can use. Check nvidia-smi and the torch build, or run with --device cpu."
        )
    return "cuda:0" if name == "cuda" else name


class Device:
    """One device and the thread that owns it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"mmbeam-{name}")
        self._models: dict[str, Any] = {}
        self._broken: str | None = None  # what it said when it broke

    def run(self, stage: Stage, batch: Batch) -> Batch:
        """Run `stage` on `batch` on the device's thread, and wait. A stage that names another one is run on this.

        The result's tally gains the seconds computed ("compute") and those waited for the device
        ("device_wait"). Raises DeviceError when the device fails, and at once ever after.
        """
        begin = time.perf_counter()
        if stage.device != self.name:
            stage = replace(cast(Any, stage), device=self.name)
        result, computed, loaded = self._thread.submit(self._run, stage, batch).result()
        waited = max(0.0, time.perf_counter() - begin - computed - loaded)
        seconds = {"compute": computed, "load_model": loaded, "device_wait": waited}
        return replace(result, tally=result.tally + Tally(seconds=seconds))

    def _run(self, stage: Stage, batch: Batch) -> tuple[Batch, float, float]:
        if self._broken is not None:
            raise DeviceError(f"{self.name} failed before: {self._broken}")
        begin = time.perf_counter()
        try:
            with torch.cuda.device(self.name) if self.name.startswith("cuda") else nullcontext():
                model = self._model(stage)
                loaded = time.perf_counter()
                with decoding_paused() if self._takes_all_cores() else nullcontext():
                    result = stage.run(model, batch)
        except Exception as error:
            if classify(error) == "device":
                self._broken = _first_line(error)
                raise DeviceError(f"{self.name}: {type(error).__name__}: {self._broken}") from error
            raise
        return result, time.perf_counter() - loaded, loaded - begin

    def _takes_all_cores(self) -> bool:
        """Whether its threads, of which there are several, wait for each other on all cores."""
        return not self.name.startswith("cuda") and torch.get_num_threads() >= max(2, cores())

    def _model(self, stage: Stage) -> Any:
        if stage.key not in self._models:
            self._models[stage.key] = stage.load()
        return self._models[stage.key]


def _first_line(error: BaseException) -> str:
    """What CUDA says first; the lines after it are advice on debugging."""
    return str(error).partition("\n")[0]


_devices: dict[str, Device] = {}
_lock = threading.Lock()


def device(name: str) -> Device:
    """The one Device of that name in this process."""
    with _lock:
        if name not in _devices:
            _devices[name] = Device(name)
        return _devices[name]
