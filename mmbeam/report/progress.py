"""What this process has done of the run so far, for the progress line.

Runners give metrics only at the end, so live progress is what the steps of this process put here, and,
for workers elsewhere, what is committed in the output. It counts; the command line prints.
"""

import threading
import time
from dataclasses import dataclass, field

from mmbeam.types import Tally, UnitReport


@dataclass
class Progress:
    """Counters of one run. Thread-safe; `start` begins a new run."""

    units: int = 0  # that the run has in all
    units_done: int = 0
    units_kept: int = 0  # of those done: committed by an earlier run
    units_failed: int = 0
    tally: Tally = Tally()
    started: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def start(self, units: int) -> None:
        with self._lock:
            self.units, self.units_done, self.units_kept, self.units_failed = units, 0, 0, 0
            self.tally, self.started = Tally(), time.monotonic()

    def add(self, tally: Tally) -> None:
        """Put a window's counts on the sum."""
        with self._lock:
            self.tally += tally

    def unit_done(self, report: UnitReport) -> None:
        with self._lock:
            self.units_done += 1
            self.units_kept += report.status == "kept"
            self.units_failed += report.status == "failed"

    def line(self, committed: int = 0) -> str:
        """One line: units, samples, rate, time left. `committed` is what the output itself shows."""
        with self._lock:
            seconds = time.monotonic() - self.started
            done, tally = max(self.units_done, committed), self.tally
            worked = max(done - self.units_kept, 0)
            left = (self.units - done) * seconds / worked if worked else None
        rate = tally.samples / seconds if seconds > 0 else 0.0
        text = f"{done:,}/{self.units:,} units  {tally.samples:,} samples  {rate:,.0f}/s"
        text += f"  {tally.failed:,} failed" if tally.failed else ""
        return text + (f"  {clock(left)} left" if left is not None and done < self.units else "")


def clock(seconds: float) -> str:
    """Seconds as a person says them: 41s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


progress = Progress()
