"""The data loader of precomputed features against pyarrow alone: `python bench/loader.py`, or a section of run.py.

The data set has three columns of 512-wide float16 vectors, of which a tenth are null, in files as `mmbeam embed`
writes them, and is in the page cache. Each figure is measured in a separate process on one core, in processor time:
nothing waits, so on an idle machine wall time is the same. pyarrow only decodes the same columns to Arrow, by row
group or by step, whichever is faster.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmbeam.names import FUSION_MODALITIES, Modality
from mmbeam.runs.run import Run
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Batch, Input, Output, Sample, Shard, Tally, WorkUnit

CACHE = Path(__file__).parents[1] / ".cache" / "bench"
WIDTH = 512
COLUMNS = [f"{modality}_embedding" for modality in FUSION_MODALITIES]
UNITS, ROWS = 16, 10_000  # 480 MB, two shuffle windows
BATCH = 1024
EPOCHS = 3  # in one process; only the first allocates the buffers
PAIRS = 5


def build() -> Path:
    """Return the data set, built unless it exists."""
    output = CACHE / f"features-{UNITS}x{ROWS}"
    if not (output / "done").exists():
        rng = np.random.default_rng(0)
        outputs = [_output(modality) for modality in FUSION_MODALITIES]
        run = Run.create(output=str(output), configuration={"task": "embed"}, recorded={}, outputs=outputs)
        for number in range(UNITS):
            shard = Shard(path=f"/{number}.tar", url=f"/{number}.tar", size=1, etag="")
            unit = WorkUnit(id=f"{number:05}", inputs=(Input(shard=shard),))
            with UnitWriter(run, unit) as writer:
                writer.write(_window(rng, unit))
                writer.commit()
        (output / "done").touch()
    return output


def _output(modality: Modality) -> Output:
    column = pa.field(f"{modality}_embedding", pa.list_(pa.float16(), WIDTH))
    return Output(modalities=frozenset({modality}), columns=(column,))


def _window(rng: np.random.Generator, unit: WorkUnit) -> Batch:
    present = rng.random((ROWS, len(FUSION_MODALITIES))) < 0.9
    samples = [
        Sample(
            key=f"{unit.id}-{number:08}",
            shard=unit.inputs[0].shard.path,
            offset=number * 1024,
            present=frozenset(modality for modality, has in zip(FUSION_MODALITIES, row, strict=True) if has),
        )
        for number, row in enumerate(present)
    ]
    features = {column: _vectors(rng, ~present[:, i]) for i, column in enumerate(COLUMNS)}
    return Batch(unit=unit, index=0, last=True, samples=tuple(samples), features=features, tally=Tally(samples=ROWS))


def _vectors(rng: np.random.Generator, missing: np.ndarray) -> pa.Array:
    vectors = rng.standard_normal((len(missing), WIDTH), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, WIDTH, mask=pa.array(missing))


def by_row_group(output: Path) -> int:
    rows = 0
    for path in sorted(output.glob("data/*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows += file.read_row_group(group, columns=COLUMNS, use_threads=False).num_rows
    return rows


def by_step(output: Path) -> int:
    rows = 0
    for path in sorted(output.glob("data/*.parquet")):
        with pq.ParquetFile(path) as file:
            rows += sum(b.num_rows for b in file.iter_batches(BATCH // 2, columns=COLUMNS, use_threads=False))
    return rows


def loader(output: Path) -> Callable[[], int]:
    import torch

    from mmbeam.features import FeatureDataset

    torch.set_num_threads(1)
    dataset = FeatureDataset(str(output), batch_size=BATCH)
    epochs = iter(range(EPOCHS))

    def epoch() -> int:
        dataset.set_epoch(next(epochs))
        return sum(len(batch[COLUMNS[0]]) for batch in dataset)

    return epoch


def run_mode(mode: str, output: Path) -> float:
    """Return rows per second of processor time in the fastest epoch."""
    modes = {"row groups": lambda: by_row_group(output), "steps": lambda: by_step(output)}
    epoch = loader(output) if mode == "mmbeam" else modes[mode]
    best = 0.0
    for _ in range(EPOCHS):
        begin = time.process_time()
        rows = epoch()
        assert rows == UNITS * ROWS
        best = max(best, rows / (time.process_time() - begin))
    return best


def measure(mode: str) -> float:
    command = [sys.executable, "-W", "ignore", __file__, mode]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout))


def section() -> None:
    """Print the figures."""
    build()
    print("\nthe data loader of features on one core, shuffled: three 512-wide float16 vectors, thousands of rows/s")
    rates = {mode: measure(mode) for mode in ("row groups", "steps")}
    faster = max(rates, key=lambda mode: rates[mode])
    print("pyarrow alone, by " + ", by ".join(f"{mode}: {rate / 1000:,.0f}" for mode, rate in rates.items()))
    pairs = [(measure(faster), measure("mmbeam")) for _ in range(PAIRS)]
    pyarrow, mmbeam = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    ratios = sorted(mmbeam_rate / pyarrow_rate for pyarrow_rate, mmbeam_rate in pairs)
    print(
        f"pyarrow {pyarrow / 1000:,.0f}  mmbeam {mmbeam / 1000:,.0f}  mmbeam / pyarrow "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}, {PAIRS} alternating pairs)"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(run_mode(sys.argv[1], build())))
    else:
        section()
