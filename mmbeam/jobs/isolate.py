"""Isolate: run a unit whose attempts ended their processes in child processes, and find the samples that end them.

The first child runs the unit as usual, since the attempts may have been killed for another reason. If it ends too, the
next ones announce each step before they begin it (process.steps), decode one sample at a time, and read nothing ahead.
Where such a child ends, the samples of that step are suspects. Further children run the suspects alone, one by one, and
write nothing. A sample that ends two processes on its own becomes a failure with the step "crash".
The model must pass an input that is known to be good before a sample is suspected (transforms/run_stage.py).
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import apache_beam as beam

from mmbeam.errors import JobError
from mmbeam.jobs.workers import ProcessEndedError, UnitWork, Workers
from mmbeam.models.placement import devices_of
from mmbeam.process import cores
from mmbeam.types import Isolation, SampleId, StepBegun, UnitReport, WorkUnit

log = logging.getLogger(__name__)

MAX_UNEXPLAINED = 2  # crashes that no single sample explains, after which the unit fails
MAX_CRASHES = 20  # samples of one unit that may end processes before the unit fails


@dataclass(frozen=True)
class Isolate:
    """Runs units in child processes, one at a time. Picklable."""

    steps: Callable[[], Sequence[beam.DoFn]]  # of the fused stage, made anew in each child
    device: str

    def __call__(self, unit: WorkUnit) -> UnitReport | str:
        """Run the unit to its commit, and return its report, or the reason why it fails.

        Raises what a child process raises, and JobError if the model ends it on an input known to be good.
        """
        first = self._run(unit)
        if isinstance(first, UnitReport):
            return first
        crashes: dict[SampleId, str] = {}
        single = False
        unexplained = 0
        while len(crashes) <= MAX_CRASHES:
            end = self._run(replace(unit, isolation=Isolation(crashes=crashes, single=single)))
            if isinstance(end, UnitReport):
                return end
            new = self._probe(unit, end.samples)
            crashes |= new
            if not new and len(end.samples) > 1 and not single:
                single = True  # each passes alone, but not all of them together
            elif not new:
                unexplained += 1
            if unexplained == MAX_UNEXPLAINED:
                return f"{end.how} in the step {end.step or 'read'}, and no single sample is the cause"
        shard, offset = next(iter(crashes))
        return f"more than {MAX_CRASHES} of its samples end their process, for example at byte {offset:,} of {shard}"

    def _probe(self, unit: WorkUnit, suspects: Sequence[SampleId]) -> dict[SampleId, str]:
        """Return the samples that crash a process on their own, with a message for each."""
        crashes: dict[SampleId, str] = {}
        ends = Counter(suspects if len(suspects) == 1 else ())  # crashes of processes that ran only this sample
        while left := frozenset(suspects) - crashes.keys():
            end = self._run(replace(unit, isolation=Isolation(crashes=crashes, probed=left, single=True)))
            if isinstance(end, UnitReport) or len(end.samples) != 1 or end.samples[0] in crashes:
                break
            [sample] = end.samples
            ends[sample] += 1
            if ends[sample] == 2:  # once may be chance
                crashes[sample] = f"{end.how} in the step {end.step}, twice with this sample alone"
                log.warning("%s at byte %d: %s", *sample, crashes[sample])
        return crashes

    def _run(self, unit: WorkUnit) -> "UnitReport | _End":
        """Run the unit in a new child process; return its report, or where the process ended."""
        last = StepBegun("", ())

        def begin(step: StepBegun) -> None:
            nonlocal last
            last = step

        work = UnitWork(self.steps, devices_of(self.device), cores(), expendable=True)
        with Workers([work], [cores()], units_per_process=1, restarts=0) as child:
            try:
                [report] = child.do([unit], lambda _: None, begin)
            except ProcessEndedError as error:
                if last.step == "model" and not last.samples:
                    raise JobError(f"the model ends its process on an input known to be good: {error}") from error
                return _End(error.how, *last)
        return report


@dataclass(frozen=True)
class _End:
    """Where a child process ended."""

    how: str
    step: str  # "" if it announced none
    samples: tuple[SampleId, ...]
