"""Which device a unit of work is on: several GPUs in one process, or one GPU for each process of a machine.

A process that was launched here uses every GPU it sees. Each unit leases the one with the fewest units when it
begins and keeps it to its end, so that with twice as many units at once as GPUs each has one that computes and one
that is being prepared. A worker process that another machine's runner started takes one GPU for itself, since the
runner starts as many as there are GPUs (Flink: --sdk_worker_parallelism), by a lock file per GPU in the temporary
directory. The system drops a lock with its process, however that ends, so no GPU is lost; a process too many shares
the least taken GPU and says so. Where a GPU is given to a container (CUDA_VISIBLE_DEVICES, Kubernetes), there is
nothing to choose.
"""

import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from mmbeam.errors import DeviceError
from mmbeam.models.placement import Device, device, resolve_device

log = logging.getLogger(__name__)

_lock = threading.Lock()
_mine: tuple[str, ...] = ()  # this process's devices; (): all that torch sees
_leases: dict[tuple[str, str], str] = {}  # the device of a unit, by what its stage's device is called and the unit
_taken: list[FileLock] = []  # held as long as this process lives


def use(devices: Sequence[str]) -> None:
    """From now on use these devices and no others of their kind; none: all that torch sees."""
    global _mine
    _mine = tuple(devices)


def devices_of(name: str) -> tuple[str, ...]:
    """The devices that `name` means in this process: itself if it has a number, else all of that kind.

    "auto" is every GPU, or the CPU where there is none. Raises DeviceError for a GPU that is not there.
    """
    kind = resolve_device(name).partition(":")[0]
    if ":" in name:
        return (name,)
    mine = tuple(each for each in _mine if torch.device(each).type == kind)
    return mine or (("cpu",) if kind == "cpu" else tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())))


def lease(name: str, unit: str) -> Device:
    """The device, of those that `name` means, on which the unit is: the least busy one if it is on none yet."""
    with _lock:
        if (name, unit) not in _leases:
            units = Counter(_leases.values())
            _leases[name, unit] = min(devices_of(name), key=lambda each: units[each])
        return device(_leases[name, unit])


def release(name: str, unit: str) -> None:
    """The unit has come to its end; nothing happens if it has no lease."""
    with _lock:
        _leases.pop((name, unit), None)


def own_one(name: str) -> None:
    """In a worker process that a runner started: of several GPUs that `name` means, use one that no other has."""
    with _lock:
        devices = devices_of(name)
        if len(devices) > 1:
            use([devices[take_one([_identity(each) for each in devices])]])


def _identity(name: str) -> str:
    """Of a GPU not its number, which is each process's own where CUDA_VISIBLE_DEVICES is set."""
    found = torch.device(name)
    return str(torch.cuda.get_device_properties(found).uuid) if found.type == "cuda" else name


def take_one(ids: Sequence[str], directory: Path | None = None) -> int:
    """The index of the one that the fewest processes of this machine and user have taken; this one now has it too.

    Raises DeviceError if the directory of the locks is another user's.
    """
    directory = directory or Path(tempfile.gettempdir(), f"mmbeam-devices-{os.getuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.getuid():  # in it may be links to any file of ours
        raise DeviceError(f"{directory}: expected a directory of this user; remove it, or set TMPDIR")
    for others in count():
        for index, name in enumerate(ids):
            lock = FileLock(directory / f"{name}.{others}")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            if others:
                log.warning("%s has %d processes: more worker processes than devices here", name, others + 1)
            _taken.append(lock)
            return index
    raise AssertionError("some lock is always free")
