"""The benchmark: `make bench`, or `python bench/run.py` and what to measure (--help): a section, or one of its cases.

Speed is a ratio in one run: the bare torch loop and mmbeam alternate, A B A B, and the median of five
pairs is what counts, since a machine's own speed drifts. Every figure is of a process of its own. The
cases are made once, under .cache/bench.
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
    """What bench/loops.py prints for one run."""
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
        alone = [measure(mode, directory)["rate"] for mode in ("decode", "model")]
        pairs = [(measure("bare", directory), measure("mmbeam", directory)) for _ in range(PAIRS)]
        ratios = sorted(mmbeam["rate"] / bare["rate"] for bare, mmbeam in pairs)
        rates = [statistics.median(pair[side]["rate"] for pair in pairs) for side in (0, 1)]
        peaks = [statistics.median(pair[side]["peak_mb"] for pair in pairs) for side in (0, 1)]
        print(
            f"{case.name:<20}" + "".join(f"{rate:>8,.0f}" for rate in [*alone, *rates]) + f"   "
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})  "
            f"{peaks[0]:>6,.0f} {peaks[1] - peaks[0]:>+6,.0f}",
            flush=True,
        )


def gpu() -> None:
    """On the first GPU, where Beam may be missing: the bare loop against mmbeam's reading and stage."""
    os.environ["BENCH_DEVICE"] = "cuda:0"
    print(f"\nGPU, bfloat16: rates in samples/s; flow / bare: median of {PAIRS} alternating pairs (lowest-highest)")
    for case in GPU_CASES:
        directory = case.build(CACHE)
        decode, model = (measure(mode, directory)["rate"] for mode in ("decode", "model"))
        pairs = [(measure("bare", directory), measure("flow", directory)) for _ in range(PAIRS)]
        ratios = sorted(flow["rate"] / bare["rate"] for bare, flow in pairs)
        bare, flow = (statistics.median(pair[side]["rate"] for pair in pairs) for side in (0, 1))
        light = statistics.median(pair[1]["light"] for pair in pairs)
        print(
            f"{case.name:<20} decode {decode:,.0f}  model {model:,.0f}  bare {bare:,.0f}  flow {flow:,.0f}  "
            f"flow / bare {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})  light {light:.0%}",
            flush=True,
        )


def memory() -> None:
    print("\npeak memory of mmbeam on small pictures and a tiny model")
    peaks = {}
    for samples in (1000, 100_000):
        figures = measure("mmbeam", memory_case(samples).build(CACHE))
        peaks[samples] = figures["peak_mb"]
        print(f"{samples:>9,} samples{figures['peak_mb']:>8,.0f} MB{figures['rate']:>10,.0f} samples/s", flush=True)
    print(f"ratio {peaks[100_000] / peaks[1000]:.3f}")


def start() -> None:
    """Seconds from the start of the process to the first batch in the model, beside importing and loading alone."""
    case = CASES[0].build(CACHE)
    print("\nseconds to the first batch in the model (median of 5 alternating pairs)")
    pairs = [(measure("load", case), measure("first", case)) for _ in range(PAIRS)]
    alone, first = (statistics.median(pair[side]["seconds"] for pair in pairs) for side in (0, 1))
    more = statistics.median(first["seconds"] - alone["seconds"] for alone, first in pairs)
    print(
        f"import torch, transformers, Beam, load the model: {alone:.2f}   mmbeam embed: {first:.2f}   more: {more:.2f}"
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
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mmbeam",
        "embed",
        "--input",
        str(case / "shards"),
        "--device",
        "cpu",
    ]
    command += ["--model", str(case / "model"), "--modalities", "image", "--output"]
    with tempfile.TemporaryDirectory() as output:
        for name in ("write 1,000 units", "the same command again"):
            begin = time.perf_counter()
            subprocess.run([*command, output], check=True, stdout=subprocess.DEVNULL)
            print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)


def resume_case() -> Case:
    tiny = memory_case(1000)
    return Case(**{**vars(tiny), "name": "resume-1000", "per_shard": 1})


OTHERS: dict[str, Callable[[], None]] = {
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
    parser = argparse.ArgumentParser(description="What to measure; without a name, all but retrieval and gpu.")
    parts = {"throughput": partial(throughput, CASES), **{case.name: partial(throughput, [case]) for case in CASES}}
    parts |= OTHERS
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(parts))
    sections = parser.parse_args().sections or SECTIONS
    if unknown := sorted(set(sections) - set(parts)):
        parser.error(f"{', '.join(unknown)}: expected {', '.join(parts)}")
    print(f"{os.cpu_count()} cores; torch on the CPU; every process alone on the machine")
    for section in sections:
        parts[section]()


if __name__ == "__main__":
    main()
