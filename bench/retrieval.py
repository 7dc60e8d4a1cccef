"""Retrieval among many rows: time, and memory besides the vectors. `python bench/retrieval.py [ROWS ...]`.

Time grows with the square of the number of rows (minutes on one core for 100,000), so `make bench` omits it.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mmbeam.metrics.retrieval import match_ranks, retrieval_scores

ROWS, WIDTH, WARM = (10_000, 100_000), 512, 2048


def pairs(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random vectors, and the same vectors with noise. Noise is added in parts, to use little more memory."""
    random = np.random.default_rng(0)
    left = random.standard_normal((rows, WIDTH), dtype=np.float32)
    right = left.copy()
    for start in range(0, rows, WARM):
        part = right[start : start + WARM]
        part += 4.5 * random.standard_normal(part.shape, dtype=np.float32)
    return left, right


def mebibytes(name: str) -> float:
    """Return VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def measure(rows: int) -> str:
    left, right = pairs(rows)
    match_ranks(left[:WARM], right[:WARM])  # allocates the buffers of the matrix product
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = mebibytes("VmRSS"), time.perf_counter()
    forward, _ = match_ranks(left, right)
    seconds, added = time.perf_counter() - begin, mebibytes("VmHWM") - before
    vectors = 2 * left.nbytes / 2**20
    recall = retrieval_scores(forward)["recall@1"]
    return f"{rows:>9,}{seconds:>9.1f} s{vectors:>9,.0f} MiB of vectors + {added:.1f} MiB   recall@1 {recall:.3f}"


def section(rows: tuple[int, ...] = ROWS) -> None:
    """Print the table; each line comes from a separate process."""
    print(f"\nretrieval, rows of two vectors of {WIDTH} float32")
    for count in rows:
        subprocess.run([sys.executable, __file__, "measure", str(count)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(measure(int(sys.argv[2])), flush=True)
    else:
        section(tuple(map(int, sys.argv[1:])) or ROWS)
