"""`--workers 2` against the faster of two hand-tuned loops on two cores: the section `workers` of bench/run.py.

One loop is a process with two threads for the model and a decode pool ahead of it. The other is two processes of one
thread, each over half of the shards, started together. `mmbeam embed` without `--workers` is measured too. All of them
decode and embed the same shards. Process start, loading and a first batch (for worker processes a first shard each)
are excluded from the time. `python bench/workers.py MODE CASE_DIR` performs one run and prints its seconds.
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
WARM = PROCESSES  # shards for warming up: one per process
LOOPS = {"one process, 2 threads": "loop-2", "2 processes": "loops"}
JOBS = {"mmbeam": "mmbeam-1", "mmbeam --workers 2": "mmbeam-2"}


def section() -> None:
    from cases import CASES

    case = replace(CASES[1], name="workers-clip-15m", samples=3000, per_shard=50)
    directory = case.build(CACHE)
    rates: dict[str, list[float]] = {name: [] for name in LOOPS | JOBS}
    measured = case.samples - WARM * case.per_shard
    for _ in range(PAIRS):
        for name, mode in (LOOPS | JOBS).items():
            rates[name].append(measured / run(mode, directory))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    faster = max(LOOPS, key=lambda name: medians[name])
    print(f"\n{case.name}, rates in samples/s on 2 cores: medians of {PAIRS} alternating runs")
    print("   ".join(f"{name}: {rate:,.0f}" for name, rate in medians.items()))
    for name in JOBS:
        ratios = sorted(job / loop for job, loop in zip(rates[name], rates[faster], strict=True))
        print(f"{name} / {faster}: {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})", flush=True)


def run(mode: str, directory: Path) -> float:
    """Return the seconds of one run; with several loop processes, which start together, those of the slowest."""
    if mode != "loops":
        done = subprocess.run(command(mode, directory), check=True, capture_output=True, text=True)
        return float(done.stdout.splitlines()[-1])
    loops = [start_loop(number, directory) for number in range(PROCESSES)]
    for process in loops:
        assert process.stdout is not None
        process.stdout.readline()  # blocks until it is warm
    for process in loops:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in loops)


def command(mode: str, directory: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, mode, str(directory)]


def start_loop(number: int, directory: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = command(f"half-{number}", directory)
    return subprocess.Popen(process, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# One run


def loop(directory: Path, shards: list[Path], threads: int, ready: Callable[[], object]) -> float:
    """Run the bare loop: a pool decodes ahead of the model. `ready` is called after the warm-up. Return its seconds."""
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
    """Return the seconds of the job in `workers` processes, after a first shard in each of them."""
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
    for count in (WARM, len(job.units)):  # the second run skips the units that the first committed
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
