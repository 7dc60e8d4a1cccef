"""The model of docs/scale.md: time, requests and losses of a job of many units, and a simulated fleet.

Plain arithmetic and a seeded simulation; nothing is run here. What is run is in scale.py.
"""

import heapq
import math
import random
from dataclasses import dataclass

from mmbeam.readers.stream import BLOCK_BYTES


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job on paper. The defaults: a billion pictures of 100 KB in 100,000 shards, on 100 machines with a GPU each."""

    samples: int = 1_000_000_000
    units: int = 100_000
    unit_bytes: int = 10**9  # of a shard
    workers: int = 100
    rate: float = 1_000.0  # samples/s of one worker
    at_once: int = 2  # units in flight on one worker
    spread: float = 0.5  # standard deviation of a unit's time, as a share of its mean
    start_seconds: float = 300.0  # until a new worker computes: machine, driver, image, model
    losses_per_hour: float = 0.0  # of one worker
    restart_seconds: float = 30.0  # of a job that goes on with the workers it has, and a spare one
    look_seconds: float = 0.15  # at a committed unit: five requests one after the other, 30 ms each

    @property
    def ideal_seconds(self) -> float:
        """All workers computing, all the time."""
        return self.samples / (self.workers * self.rate)

    @property
    def unit_seconds(self) -> float:
        """From a unit's start to its commit: its worker shares itself among those in flight."""
        return self.at_once * self.samples / self.units / self.rate

    @property
    def lost_share(self) -> float:
        """More work for losses, as a share: a new start, and what was done of the units in flight."""
        return self.losses_per_hour / 3600 * (self.start_seconds + self.half_unit_seconds)

    @property
    def restart_share(self) -> float:
        """The same where one loss restarts the whole job, as in a batch job of Flink: for all workers' losses."""
        pause = self.restart_seconds + self.looks_seconds
        return self.workers * self.losses_per_hour / 3600 * (pause + self.half_unit_seconds)

    @property
    def restarted_seconds(self) -> float:
        """The whole run under such restarts. Good for shares below a third; above, long units hardly ever end."""
        return self.start_seconds + self.ideal_seconds * (1 + self.restart_share) + self.tail_seconds

    @property
    def half_unit_seconds(self) -> float:
        """What is done of a unit at a moment taken by chance: of the long ones more, and more often."""
        return self.unit_seconds / 2 * (1 + self.spread**2)

    @property
    def looks_seconds(self) -> float:
        """Of a launch or a restart with half of the units committed: each is looked at, on its slot."""
        return self.units / 2 / (self.workers * self.at_once) * self.look_seconds

    @property
    def tail_seconds(self) -> float:
        """How long the last worker may be alone at most: one unit that is three deviations long."""
        return self.unit_seconds * (1 + 3 * self.spread)

    @property
    def seconds(self) -> float:
        """The whole run, where a worker takes the next unit when it is ready for one."""
        return self.start_seconds + self.ideal_seconds * (1 + self.lost_share) + self.tail_seconds

    @property
    def dealt_seconds(self) -> float:
        """The whole run, where all units are dealt out at the start, as a batch job of Flink does: the worst slot's."""
        slots = self.workers * self.at_once
        worst = self.spread * self.unit_seconds * math.sqrt(2 * math.log(slots) * self.units / slots)
        return self.start_seconds + self.ideal_seconds * (1 + self.lost_share) + worst


@dataclass(frozen=True)
class Requests:
    """To a store, in the classes by which GCS bills them."""

    writes: int = 0  # class A: what creates, and listings, of 1,000 names each
    reads: int = 0  # class B

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(self.writes + other.writes, self.reads + other.reads)

    @property
    def cost(self) -> float:
        """USD."""
        return (self.writes * WRITES_PRICE + self.reads * READS_PRICE) / 1000

    def __mul__(self, times: int) -> "Requests":
        return Requests(self.writes * times, self.reads * times)


# At most, as counted on fake-gcs-server with gcsfs (tests/test_scale.py). To learn whether a file is there, gcsfs asks
# for it and for a folder of its name at the same time, and takes the answer that comes first.
LAUNCH = Requests(writes=6, reads=4)  # the manifest and the plan, and whether they are there
LOOK = Requests(writes=1, reads=3)  # is the run stopped, is the unit committed
OPEN = Requests(writes=2, reads=4)  # a shard, beside its blocks
COMMIT = Requests(writes=2)  # the Parquet, the report; one more if samples failed. Deleting is free.
KEPT = Requests(reads=1)  # the report of a unit that is committed
WRITES_PRICE, READS_PRICE = 0.005, 0.0004  # USD for 1,000 in one region's standard class, as GCS lists them


def listing(names: int) -> Requests:
    return Requests(writes=-(-names // 1000))


def requests(job: Job) -> Requests:
    """Of a run from nothing to the end, at most."""
    blocks = Requests(reads=-(-job.unit_bytes // BLOCK_BYTES))
    return LAUNCH + listing(job.units) * 2 + (LOOK + OPEN + blocks + COMMIT) * job.units


def requests_of_resume(job: Job) -> Requests:
    """Of a second run that finds every unit committed only when it looks at it, at most."""
    return LAUNCH + listing(job.units) * 2 + (LOOK + KEPT) * job.units


@dataclass(frozen=True)
class Fleet:
    """What became of a simulated run."""

    seconds: float
    lost_seconds: float  # of all workers: starts after losses, and work that was done again
    losses: int


def simulate(job: Job, dealt: bool = False, seed: int = 0) -> Fleet:
    """The job as events: units of lognormal length on slots that are lost by chance and come back.

    A slot is one of a worker's units in flight. With `dealt` every slot has its units from the start.
    """
    chance = random.Random(seed)
    lengths = _lengths(job, chance)
    slots = job.workers * job.at_once
    if dealt:
        ends = [_one_slot(lengths[slot::slots], job, chance) for slot in range(slots)]
    else:
        ends = _shared_queue(lengths, slots, job, chance)
    return Fleet(max(end for end, _, _ in ends), sum(lost for _, lost, _ in ends), sum(n for _, _, n in ends))


def simulate_restarts(job: Job, seed: int = 0) -> Fleet:
    """The job as events, where each loss of a worker sends all units in flight back and restarts the job."""
    chance = random.Random(seed)
    waiting = _lengths(job, chance)
    pause = job.restart_seconds + job.looks_seconds
    now, lost, losses = job.start_seconds, 0.0, 0
    loss = now + chance.expovariate(job.workers * job.losses_per_hour / 3600)
    running: list[tuple[float, float]] = []  # end, length
    while waiting or running:
        while waiting and len(running) < job.workers * job.at_once:
            length = waiting.pop()
            heapq.heappush(running, (now + length, length))
        if running[0][0] <= loss:
            now, _ = heapq.heappop(running)
            continue
        lost += sum(length - (end - loss) + pause for end, length in running)
        losses += 1
        waiting += [length for _, length in running]
        running, now = [], loss + pause
        loss = now + chance.expovariate(job.workers * job.losses_per_hour / 3600)
    return Fleet(now, lost, losses)


def _lengths(job: Job, chance: random.Random) -> list[float]:
    sigma = math.sqrt(math.log(1 + job.spread**2))
    return [chance.lognormvariate(-(sigma**2) / 2, sigma) * job.unit_seconds for _ in range(job.units)]


def _shared_queue(lengths: list[float], slots: int, job: Job, chance: random.Random) -> list[tuple[float, float, int]]:
    free = [(job.start_seconds, 0.0, 0) for _ in range(slots)]
    for length in lengths:
        now, lost, losses = heapq.heappop(free)
        spent, again = _attempts(length, job, chance)
        heapq.heappush(free, (now + length + spent, lost + spent, losses + again))
    return free


def _one_slot(lengths: list[float], job: Job, chance: random.Random) -> tuple[float, float, int]:
    return _shared_queue(lengths, 1, job, chance)[0]


def _attempts(length: float, job: Job, chance: random.Random) -> tuple[float, int]:
    """Seconds and times that a unit was lost before it was whole."""
    spent, losses = 0.0, 0
    while job.losses_per_hour and (alive := chance.expovariate(job.losses_per_hour / 3600)) < length:
        spent += alive + job.start_seconds
        losses += 1
    return spent, losses


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
    """JOBS as docs/scale.md shows them: hours on paper, and simulated in brackets."""
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
