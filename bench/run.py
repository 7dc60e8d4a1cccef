"""The benchmark: `make bench`, or `python bench/run.py [SECTION ...]`, where a section may be a case of throughput.

The speed of a machine drifts, so speed is compared within one run: the bare torch loop and mmbeam alternate, and the
result is the median ratio of five pairs. Each figure comes from a separate process. The cases are made once, under
.cache/bench.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import families
import generation
import loader
import retrieval
import workers
from cases import CASES, GPU_CASES, Case, memory_case

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "bench"
PAIRS = 5
SECTIONS = ("throughput", "captions", "families", "workers", "loader", "memory", "start", "plan")


def measure(mode: str, case: Path) -> dict[str, float]:
    """Return the figures of one run of bench/loops.py."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "loops.py"), mode, str(case)]
    env = {**os.environ, "BENCH_BEGIN": str(time.time())}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def throughput(cases: list[Case]) -> None:
    print(f"\nrates in samples/s; mmbeam / bare: median of {PAIRS} alternating pairs (lowest-highest)")
    print(f"{'case':<20}{'decode':>8}{'model':>8}{'bare':>8}{'mmbeam':>8}   {'mmbeam / bare':<20}{'peak MB':>14}")
    for case in cases:
        directory = case.build(CACHE)
        parts = [measure(mode, directory)["rate"] for mode in ("decode", "model")]
        pairs = [(measure("bare", directory), measure("mmbeam", directory)) for _ in range(PAIRS)]
        ratios = sorted(mmbeam["rate"] / bare["rate"] for bare, mmbeam in pairs)
        rates = [statistics.median(pair[side]["rate"] for pair in pairs) for side in (0, 1)]
        peaks = [statistics.median(pair[side]["peak_mb"] for pair in pairs) for side in (0, 1)]
        print(
            f"{case.name:<20}" + "".join(f"{rate:>8,.0f}" for rate in [*parts, *rates]) + f"   "
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})  "
            f"{peaks[0]:>6,.0f} {peaks[1] - peaks[0]:>+6,.0f}",
            flush=True,
        )


def gpu() -> None:
    """Compare the bare loop with mmbeam's reading and stage on the first GPU. Beam is not needed."""
    os.environ["BENCH_DEVICE"] = "cuda:0"
    print(f"\nGPU, bfloat16: rates in samples/s; flow / bare: median of {PAIRS} alternating pairs (lowest-highest)")
    for case in GPU_CASES:
        directory = case.build(CACHE)
        decode, model = (measure(mode, directory)["rate"] for mode in ("decode", "model"))
        pairs = [(measure("bare", directory), measure("flow", directory)) for _ in range(PAIRS)]
        ratios = sorted(flow["rate"] / bare["rate"] for bare, flow in pairs)
        bare, flow = (statistics.median(pair[side]["rate"] for pair in pairs) for side in (0, 1))
        utilisation = statistics.median(pair[1]["utilisation"] for pair in pairs)
        print(
            f"{case.name:<20} decode {decode:,.0f}  model {model:,.0f}  bare {bare:,.0f}  flow {flow:,.0f}  "
            f"flow / bare {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})  "
            f"model utilisation {utilisation:.0%}",
            flush=True,
        )


def memory() -> None:
    print("\npeak memory of mmbeam on small images and a tiny model")
    peaks = {}
    for samples in (1000, 100_000):
        figures = measure("mmbeam", memory_case(samples).build(CACHE))
        peaks[samples] = figures["peak_mb"]
        print(f"{samples:>9,} samples{figures['peak_mb']:>8,.0f} MB{figures['rate']:>10,.0f} samples/s", flush=True)
    print(f"ratio {peaks[100_000] / peaks[1000]:.3f}")


def start() -> None:
    """Compare the time from the start of the process to the first batch with that of imports and loading alone."""
    case = CASES[0].build(CACHE)
    print(f"\nseconds to the first batch in the model (median of {PAIRS} alternating pairs)")
    pairs = [(measure("load", case), measure("first", case)) for _ in range(PAIRS)]
    load, first = (statistics.median(pair[side]["seconds"] for pair in pairs) for side in (0, 1))
    added = statistics.median(first["seconds"] - load["seconds"] for load, first in pairs)
    print(
        f"import torch, transformers, Beam, load the model: {load:.2f}   mmbeam embed: {first:.2f}   added: {added:.2f}"
    )
    seconds = []
    for _ in range(PAIRS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmbeam", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    print(f"mmbeam --help: {statistics.median(seconds):.2f}")


def plan() -> None:
    print("\nplanning and resuming")
    with tempfile.TemporaryDirectory() as directory:
        for number in range(100_000):
            Path(directory, f"{number:06}.tar").touch()
        figures = measure("plan", Path(directory))
        print(f"list and plan 100,000 shards: {figures['seconds']:.1f} s, peak {figures['peak_mb']:,.0f} MB")
    case = resume_case().build(CACHE)
    command = [sys.executable, "-W", "ignore", "-m", "mmbeam", "embed", "--input", str(case / "shards")]
    command += ["--device", "cpu", "--model", str(case / "model"), "--modalities", "image", "--output"]
    with tempfile.TemporaryDirectory() as output:
        for name in ("write 1,000 units", "the same command again"):
            begin = time.perf_counter()
            subprocess.run([*command, output], check=True, stdout=subprocess.DEVNULL)
            print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)


def resume_case() -> Case:
    tiny = memory_case(1000)
    return Case(**{**vars(tiny), "name": "resume-1000", "per_shard": 1})


FUNCTIONS: dict[str, Callable[[], None]] = {  # of the sections other than throughput
    "captions": generation.section,
    "families": families.section,
    "workers": workers.section,
    "loader": loader.section,
    "memory": memory,
    "start": start,
    "plan": plan,
    "gpu": gpu,
    "retrieval": retrieval.section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the benchmark; without SECTION, all but retrieval and gpu.")
    known = {"throughput": partial(throughput, CASES), **{case.name: partial(throughput, [case]) for case in CASES}}
    known |= FUNCTIONS
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(known))
    sections = parser.parse_args().sections or SECTIONS
    if unknown := sorted(set(sections) - set(known)):
        parser.error(f"{', '.join(unknown)}: expected {', '.join(known)}")
    print(f"{os.cpu_count()} cores; torch on the CPU; one process at a time")
    for section in sections:
        known[section]()


if __name__ == "__main__":
    main()
