"""Windows made one ahead of whoever consumes them, by a thread of their own."""

import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

from mmbeam.types import Batch, Tally


def one_ahead(make: Callable[[], Generator[Batch]], name: str) -> Generator[Batch]:
    """The windows of `make` up to the last one, each made while the consumer has the one before.

    So two are in memory. What `make` raises is raised here. The tally of each gains "read_wait", the
    seconds for which the consumer stood still. Closing the generator ends the thread, called `name`.
    """
    ahead = _Ahead()
    thread = threading.Thread(target=ahead.fill, args=(make,), name=name, daemon=True)
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
