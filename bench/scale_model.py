"""The model of docs/scale.md: time, requests and worker losses of a job of many units, and a simulated fleet.

It is arithmetic and a seeded simulation; scale.py runs the real steps.
"""

import heapq
import math
import random
from dataclasses import dataclass

from mmbeam.readers.stream import BLOCK_BYTES


@dataclass(frozen=True, kw_only=True)
class Job:
    """A modelled job. The defaults: a billion images of 100 KB in 100,000 shards, on 100 machines with one GPU each."""

    samples: int = 1_000_000_000
    units: int = 100_000
    unit_bytes: int = 10**9  # of a shard
    workers: int = 100
    rate: float = 1_000.0  # samples/s of one worker
    concurrency: int = 2  # units in flight on one worker
    spread: float = 0.5  # standard deviation of a unit's time, as a fraction of its mean
    start_seconds: float = 300.0  # until a new worker computes: machine, driver, image, model
    losses_per_hour: float = 0.0  # of one worker
    restart_seconds: float = 30.0  # until the job runs again, on the workers that are left and a spare one
    check_seconds: float = 0.15  # to skip a committed unit: five requests one after the other, 30 ms each

    @property
    def ideal_seconds(self) -> float:
        """Duration if all workers compute all the time."""
        return self.samples / (self.workers * self.rate)

    @property
    def unit_seconds(self) -> float:
        """Time from a unit's start to its commit; the units in flight share their worker."""
        return self.concurrency * self.samples / self.units / self.rate

    @property
    def lost_fraction(self) -> float:
        """Extra work caused by losses, as a fraction: a new start, and the finished part of the units in flight."""
        return self.losses_per_hour / 3600 * (self.start_seconds + self.half_unit_seconds)

    @property
    def restart_fraction(self) -> float:
        """Extra work if the loss of any worker restarts the whole job, as in a batch job of Flink, as a fraction."""
        pause = self.restart_seconds + self.checks_seconds
        return self.workers * self.losses_per_hour / 3600 * (pause + self.half_unit_seconds)

    @property
    def restarted_seconds(self) -> float:
        """Duration with such restarts; valid for a restart_fraction below 1/3, since above it long units rarely end."""
        return self.start_seconds + self.ideal_seconds * (1 + self.restart_fraction) + self.tail_seconds

    @property
    def half_unit_seconds(self) -> float:
        """Expected progress of a unit in flight at a random moment, which is more likely to fall into a long unit."""
        return self.unit_seconds / 2 * (1 + self.spread**2)

    @property
    def checks_seconds(self) -> float:
        """Time of a launch or restart to skip the committed units, if half of all are; every slot checks its units."""
        return self.units / 2 / (self.workers * self.concurrency) * self.check_seconds

    @property
    def tail_seconds(self) -> float:
        """Upper bound of the time that the last worker runs alone: one unit of three standard deviations."""
        return self.unit_seconds * (1 + 3 * self.spread)

    @property
    def seconds(self) -> float:
        """Duration if workers pull the next unit when they are ready."""
        return self.start_seconds + self.ideal_seconds * (1 + self.lost_fraction) + self.tail_seconds

    @property
    def dealt_seconds(self) -> float:
        """Duration if all units are assigned to slots at the start, as in a batch job of Flink: the worst slot's."""
        slots = self.workers * self.concurrency
        worst = self.spread * self.unit_seconds * math.sqrt(2 * math.log(slots) * self.units / slots)
        return self.start_seconds + self.ideal_seconds * (1 + self.lost_fraction) + worst


@dataclass(frozen=True)
class Requests:
    """Numbers of requests to a store, by the classes in which GCS bills them."""

    writes: int = 0  # class A: creating objects, and listing up to 1,000 names
    reads: int = 0  # class B

    def __add__(self, requests: "Requests") -> "Requests":
        return Requests(self.writes + requests.writes, self.reads + requests.reads)

    @property
    def cost(self) -> float:
        """Cost in USD."""
        return (self.writes * WRITES_PRICE + self.reads * READS_PRICE) / 1000

    def __mul__(self, times: int) -> "Requests":
        return Requests(self.writes * times, self.reads * times)


# Upper bounds, as counted on fake-gcs-server with gcsfs (tests/test_scale.py). To check whether a file exists, gcsfs
# requests the file and a folder of its name concurrently, and uses the first answer.
LAUNCH = Requests(writes=7, reads=4)  # check for the manifest and the plan, and write them
CHECK = Requests(writes=1, reads=3)  # is the run stopped, is the unit committed
OPEN = Requests(writes=2, reads=4)  # open a shard; its blocks are extra
COMMIT = Requests(writes=2)  # the Parquet, the report; one more if samples failed. Deletion is free.
KEPT = Requests(reads=1)  # the report of a committed unit
WRITES_PRICE, READS_PRICE = 0.005, 0.0004  # USD per 1,000 requests, GCS list price, standard class in one region


def listing(names: int) -> Requests:
    return Requests(writes=-(-names // 1000))


def requests(job: Job) -> Requests:
    """Return an upper bound for a complete run."""
    blocks = Requests(reads=-(-job.unit_bytes // BLOCK_BYTES))
    return LAUNCH + listing(job.units) * 2 + (CHECK + OPEN + blocks + COMMIT) * job.units


def requests_of_resume(job: Job) -> Requests:
    """Return an upper bound for a second run in which every unit turns out to be committed when it starts."""
    return LAUNCH + listing(job.units) * 2 + (CHECK + KEPT) * job.units


@dataclass(frozen=True)
class Fleet:
    """The result of a simulated run."""

    seconds: float
    lost_seconds: float  # of all workers: starts after losses, and repeated work
    losses: int


def simulate(job: Job, dealt: bool = False, seed: int = 0) -> Fleet:
    """Simulate the job by events: units of lognormal duration on slots that are lost at random and come back.

    A slot is one of a worker's units in flight. With `dealt`, all units are assigned to slots at the start.
    """
    rng = random.Random(seed)
    lengths = _lengths(job, rng)
    slots = job.workers * job.concurrency
    if dealt:
        ends = [_shared_queue(lengths[slot::slots], 1, job, rng)[0] for slot in range(slots)]
    else:
        ends = _shared_queue(lengths, slots, job, rng)
    return Fleet(max(end for end, _, _ in ends), sum(lost for _, lost, _ in ends), sum(n for _, _, n in ends))


def simulate_restarts(job: Job, seed: int = 0) -> Fleet:
    """Simulate the job by events. The loss of a worker restarts the job, and all units in flight start again."""
    rng = random.Random(seed)
    waiting = _lengths(job, rng)
    pause = job.restart_seconds + job.checks_seconds
    now, lost, losses = job.start_seconds, 0.0, 0
    loss = now + rng.expovariate(job.workers * job.losses_per_hour / 3600)
    running: list[tuple[float, float]] = []  # end, length
    while waiting or running:
        while waiting and len(running) < job.workers * job.concurrency:
            length = waiting.pop()
            heapq.heappush(running, (now + length, length))
        if running[0][0] <= loss:
            now, _ = heapq.heappop(running)
            continue
        lost += sum(length - (end - loss) + pause for end, length in running)
        losses += 1
        waiting += [length for _, length in running]
        running, now = [], loss + pause
        loss = now + rng.expovariate(job.workers * job.losses_per_hour / 3600)
    return Fleet(now, lost, losses)


def _lengths(job: Job, rng: random.Random) -> list[float]:
    """Return the seconds of each unit."""
    sigma = math.sqrt(math.log(1 + job.spread**2))
    return [rng.lognormvariate(-(sigma**2) / 2, sigma) * job.unit_seconds for _ in range(job.units)]


def _shared_queue(lengths: list[float], slots: int, job: Job, rng: random.Random) -> list[tuple[float, float, int]]:
    """Return the end, the lost seconds and the losses of each slot, if free slots take the next unit."""
    free = [(job.start_seconds, 0.0, 0) for _ in range(slots)]
    for length in lengths:
        now, lost, losses = heapq.heappop(free)
        lost_of_unit, losses_of_unit = _lost_attempts(length, job, rng)
        heapq.heappush(free, (now + length + lost_of_unit, lost + lost_of_unit, losses + losses_of_unit))
    return free


def _lost_attempts(length: float, job: Job, rng: random.Random) -> tuple[float, int]:
    """Return the seconds and the number of a unit's attempts that ended with the loss of the worker."""
    seconds, losses = 0.0, 0
    while job.losses_per_hour and (alive := rng.expovariate(job.losses_per_hour / 3600)) < length:
        seconds += alive + job.start_seconds
        losses += 1
    return seconds, losses


JOBS = {
    "embed, 1,000/s": Job(),
    "embed, 1,000/s, losses": Job(losses_per_hour=0.05),
    "embed, 200/s": Job(rate=200),
    "caption, 20/s": Job(rate=20),
    "caption, 20/s, losses": Job(rate=20, losses_per_hour=0.05),
    "caption, 20/s, 10 workers, losses": Job(rate=20, workers=10, losses_per_hour=0.05),
    "10 workers": Job(workers=10),
    "1,000 workers": Job(workers=1000),
}


def table() -> str:
    """Return the table of docs/scale.md: the modelled hours of JOBS, with the simulated hours in parentheses."""
    lines = [
        "| job | ideal | unit | pulled | dealt | full restart | commits/s | requests |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, job in JOBS.items():
        losses = job.losses_per_hour > 0
        restarted = f"{_hours(job.restarted_seconds)} ({_hours(simulate_restarts(job).seconds)})" if losses else ""
        row = [
            name,
            _hours(job.ideal_seconds),
            f"{job.unit_seconds:,.0f} s",
            f"{_hours(job.seconds)} ({_hours(simulate(job).seconds)})",
            f"{_hours(job.dealt_seconds)} ({_hours(simulate(job, dealt=True).seconds)})",
            restarted,
            f"{job.units / job.ideal_seconds:.1f}",
            f"${requests(job).cost:.2f}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}"


if __name__ == "__main__":
    print(table())
