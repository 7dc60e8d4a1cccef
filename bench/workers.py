"""`--workers 2` beside the better of two hand-tuned loops on two cores: the section `workers` of bench/run.py.

One loop is a process with two threads for the model and a decode pool in front of it; the other is two processes
of one thread each over half the shards, started together. A plain `mmbeam embed` runs beside them. All decode and
embed the same shards; starting, loading and a first batch, or a first shard in each worker process, are outside the
time of all of them. `python bench/workers.py MODE CASE_DIR` is one run, which prints its seconds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmbeam.jobs.embed import EmbedJob

CACHE = Path(__file__).parents[1] / ".cache" / "bench"
PROCESSES, PAIRS = 2, 5
WARM = PROCESSES  # shards: one for each process to load the model on
LOOPS = {"one process, 2 threads": "loop-2", "2 processes": "loops"}
OURS = {"mmbeam": "mmbeam-1", "mmbeam --workers 2": "mmbeam-2"}


def section() -> None:
    from cases import CASES

    case = replace(CASES[1], name="workers-clip-15m", samples=3000, per_shard=50)
    directory = case.build(CACHE)
    rates: dict[str, list[float]] = {name: [] for name in LOOPS | OURS}
    measured = case.samples - WARM * case.per_shard
    for _ in range(PAIRS):
        for name, mode in (LOOPS | OURS).items():
            rates[name].append(measured / run(mode, directory))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    better = max(LOOPS, key=lambda name: medians[name])
    print(f"\n{case.name}, rates in samples/s on 2 cores: medians of {PAIRS} alternating runs")
    print("   ".join(f"{name}: {rate:,.0f}" for name, rate in medians.items()))
    for name in OURS:
        ratios = sorted(ours / theirs for ours, theirs in zip(rates[name], rates[better], strict=True))
        print(f"{name} / {better}: {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})", flush=True)


def run(mode: str, directory: Path) -> float:
    """Seconds of one run; of loops in several processes, which start together, those of the slowest."""
    if mode != "loops":
        done = subprocess.run(command(mode, directory), check=True, capture_output=True, text=True)
        return float(done.stdout.splitlines()[-1])
    loops = [start_loop(number, directory) for number in range(PROCESSES)]
    for each in loops:
        assert each.stdout is not None
        each.stdout.readline()  # it is warm
    for each in loops:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    return max(float(each.communicate()[0]) for each in loops)


def command(mode: str, directory: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, mode, str(directory)]


def start_loop(number: int, directory: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = command(f"half-{number}", directory)
    return subprocess.Popen(process, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# One run


def loop(directory: Path, shards: list[Path], threads: int, ready: Callable[[], object]) -> float:
    """The bare loop over the shards: a pool that decodes in front of the model. `ready` is called when it is warm."""
    import torch
    from loops import batches, decoder, encode, members

    from mmbeam.models.encoders import describe, load
    from mmbeam.readers.windows import Lookahead, ordered_map

    torch.set_num_threads(threads)
    about, spec = json.loads((directory / "case.json").read_text()), describe(directory / "model")
    modality, size = about["modality"], about["batch"]
    decode, model = decoder(modality, None), load(spec, torch.device("cpu"), torch.float32)
    with torch.inference_mode(), ThreadPoolExecutor(threads) as pool:
        encode(model, modality, list(map(decode, islice(members(shards), size))))
        ready()
        begin = time.perf_counter()
        for items in batches(ordered_map(decode, members(shards), pool, Lookahead(2 * size)), size):
            encode(model, modality, items)
        return time.perf_counter() - begin


def wait_for_go() -> None:
    print("warm", flush=True)
    input()


def job_seconds(directory: Path, workers: int) -> float:
    """The job in so many processes of this machine, after a first shard in each."""
    from mmbeam.config import ModelRef
    from mmbeam.jobs.embed import EmbedOptions, prepare

    with tempfile.TemporaryDirectory(dir=directory) as output:
        job = prepare(
            EmbedOptions(
                input=(str(directory / "shards"),),
                output=output,
                models=(ModelRef(model=str(directory / "model")),),
                modalities=("image",),
                device="cpu",
                batch_size=json.loads((directory / "case.json").read_text())["batch"],
                workers=workers,
            )
        )
        return in_this_process(job) if workers == 1 else in_processes(job, workers)


def in_processes(job: "EmbedJob", workers: int) -> float:
    from mmbeam.jobs.options import UNITS_PER_DEVICE
    from mmbeam.jobs.workers import make_workers

    with make_workers(replace(job, units=()).steps, ["cpu"], workers, UNITS_PER_DEVICE) as started:
        list(started.do(job.units[:WARM], lambda _: None))
        begin = time.perf_counter()
        list(started.do(job.units[WARM:], lambda _: None))
        return time.perf_counter() - begin


def in_this_process(job: "EmbedJob") -> float:
    for count in (WARM, len(job.units)):  # the first are committed then
        begin = time.perf_counter()
        replace(job, units=job.units[:count]).execute()
    return time.perf_counter() - begin


def main(mode: str, directory: Path) -> None:
    kind, _, number = mode.partition("-")
    shards = sorted((directory / "shards").glob("*.tar"))[WARM:]
    if kind == "mmbeam":
        print(job_seconds(directory, int(number)))
    elif kind == "loop":
        print(loop(directory, shards, int(number), lambda: None))
    else:
        print(loop(directory, shards[int(number) :: PROCESSES], 1, wait_for_go))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
