"""Marks of attempts at units, from which later attempts see that earlier ones died, and others that one is at work.

A mark is created when an attempt begins and removed when it ends, with success or by an exception. What remains is the
mark of an attempt whose process ended: killed, crashed in a codec, or out of memory. A reader in the same process
namespace looks the process up. Any other reader goes by the mark's age: while its process lives, a mark is written
again every BEAT_SECONDS. The age is the difference of two times of the store, so the clocks of hosts do not matter. A
wrong decision wastes time but loses no row: a unit is committed once, by any attempt.
"""

import atexit
import json
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mmbeam.runs.store import ATTEMPTS, Store, process_identity, process_is_gone
from mmbeam.terminal import before_exit

log = logging.getLogger(__name__)

BEAT_SECONDS = 60.0  # after which a mark is written again
STALE_SECONDS = 300.0  # age at which the mark of a process that cannot be looked up counts as left behind

_lock = threading.RLock()
_held: dict[tuple[str, str], tuple[Store, bytes]] = {}  # marks of this process: store and content, by URL and name
_beat: threading.Thread | None = None


@contextmanager
def attempt(store: Store, unit_id: str, part: str, exclusive: bool = False) -> Iterator[int | None]:
    """Mark an attempt at the unit, and yield the number of earlier ones that ended their processes.

    `part` is the file that commits the unit. The marks of the earlier attempts stay until it exists. If `exclusive`,
    yield None if another attempt is at work. Of two that begin simultaneously the second sees the mark of the first;
    perhaps each sees that of the other, and both get None.
    """
    dead = [name for name in marks(store).get(unit_id, ()) if is_left_behind(store, f"{ATTEMPTS}/{name}")]
    name = f"{ATTEMPTS}/{unit_id}-{uuid.uuid4().hex[:12]}.json"
    content = json.dumps(process_identity()).encode()
    hold(store, name, content)  # first: a fault may be reported after the mark was created
    try:
        store.create(name, content)
        yield None if exclusive and is_held(store, unit_id, name) else len(dead)
        if dead and store.exists(part):
            for other in dead:
                store.remove(f"{ATTEMPTS}/{other}")
    finally:
        release(store, name)


def is_held(store: Store, unit_id: str, but: str = "") -> bool:
    """Return whether a process that may be alive holds a mark of the unit, other than the file `but`."""
    paths = (f"{ATTEMPTS}/{name}" for name in marks(store).get(unit_id, ()))
    return any(path != but and store.exists(path) and not is_left_behind(store, path) for path in paths)


def marks(store: Store) -> dict[str, list[str]]:
    """Return the names of the marks of each unit, of live attempts too. It takes one listing."""
    names: dict[str, list[str]] = {}
    for name in store.list(ATTEMPTS):
        unit, hyphen, _ = name.removesuffix(".json").rpartition("-")
        if hyphen and name.endswith(".json"):
            names.setdefault(unit, []).append(name)
    return names


def is_left_behind(store: Store, name: str) -> bool:
    """Return whether the process that holds the file (a mark or the lock) has ended without removing it."""
    try:
        holder = json.loads(store.read(name))
        gone = process_is_gone(holder)
        return store.now() - store.modified(name) > STALE_SECONDS if gone is None else gone
    except FileNotFoundError:  # removed meanwhile
        return False
    except (ValueError, TypeError, KeyError):
        log.warning("%s/%s: expected a mark of mmbeam, found something else; it is ignored", store, name)
        return False


def hold(store: Store, name: str, content: bytes) -> None:
    """Rewrite the file every BEAT_SECONDS, until `release` or the end of the process."""
    global _beat
    with _lock:
        _held[store.url, name] = store, content
        if _beat is None or not _beat.is_alive():
            _beat = threading.Thread(target=_beat_all, name="mmbeam-attempts", daemon=True)
            _beat.start()


def release(store: Store, name: str) -> None:
    """Remove a file that this process holds."""
    with _lock:
        if _held.pop((store.url, name), None) is not None:
            store.remove(name)


def release_all() -> None:
    """Remove all files that this process holds, since it is about to end on purpose."""
    with _lock:
        for (_, name), (store, _) in list(_held.items()):
            with suppress(Exception):  # of the store; the mark then counts as left behind
                release(store, name)


atexit.register(release_all)
before_exit.append(release_all)
_wake = threading.Event()  # never set: a thread that sleeps in it ends with the process


def _beat_all() -> None:
    while not _wake.wait(BEAT_SECONDS):
        with _lock:
            held: list[tuple[Any, Any]] = list(_held.items())
        for (url, name), (store, content) in held:
            with _lock:  # so that a mark is not written again after its release
                if (url, name) not in _held:
                    continue
                try:
                    if store.read(name) == content:  # otherwise another process has taken it over, or removed it
                        store.replace(name, content)
                except Exception as error:
                    log.debug("%s/%s: could not be renewed: %s", store, name, error)
