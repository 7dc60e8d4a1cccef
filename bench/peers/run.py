"""Compare mmbeam with its peers: `python bench/peers/run.py [PEER ...] [--case NAME] [--rounds N]`.

Every peer embeds the same images with the same weights, in a virtual environment of its own, which is made at the first
run by uv. The peers run in turn, each as a whole process: start, reading, model and writing.
A peer whose vectors differ from mmbeam's is an error, not a row of the table. README.md says how each is set up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache"
sys.path.insert(0, str(HERE.parent))

import cases  # noqa: E402

COMMON = ("torch==2.13.0", "transformers==5.23.0", "torchvision==0.28.0", "pillow", "numpy", "pyarrow")
PEERS: Mapping[str, tuple[str, ...]] = {  # what is installed into the environment of each
    "webdataset": ("webdataset==1.0.2", *COMMON),
    "beam": ("apache-beam==2.77.0", *COMMON),
    "ray": ("ray[data]==2.60.0", *COMMON),
    "daft": ("daft==0.7.26", *COMMON),
    "clip-retrieval": ("clip-retrieval==2.45.0", "setuptools==80.9.0", "torch==2.13.0", "torchvision==0.28.0"),
}
LEAST_COSINE = 0.98  # of the vectors of a peer and of mmbeam: resizing differs by library


@dataclass(frozen=True)
class Figures:
    """One run of one peer."""

    seconds: float  # of the whole process
    peak_mb: float  # proportional memory of all its processes together


def environment(peer: str) -> Path:
    """Return the Python of the peer's environment, and make the environment unless it exists."""
    folder = CACHE / "peers" / peer
    python = folder / "bin" / "python"
    done = folder / "installed.json"
    wanted = list(PEERS[peer])
    if not done.exists() or json.loads(done.read_text()) != wanted:
        uv = str(Path(sys.executable).parent / "uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *wanted], check=True)
        done.write_text(json.dumps(wanted))
    return python


def run(command: Sequence[str | Path], log: Path) -> Figures:
    """Run a command to its end, and return its time and the peak memory of its session. Raises if it fails."""
    peak, ended = 0.0, threading.Event()
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, start_new_session=True)

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.2):
                peak = max(peak, session_mb(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - begin
        ended.set()
        watcher.join()
    if status:
        raise SystemExit(f"exit status {status}: {' '.join(map(str, command))}\n{log.read_text()[-2000:]}")
    return Figures(seconds, peak)


def session_mb(session: int) -> float:
    """Return the memory of all processes of a session in MB; pages that several share count once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                rollup = (process / "smaps_rollup").read_text()
                total += int(rollup.partition("\nPss:")[2].split()[0])
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    return total / 1024


def command_of(peer: str, case: Path, output: Path, batch: int) -> list[str | Path]:
    """Return the command by which a peer embeds the case's images into `output`."""
    if peer == "mmbeam":
        paths = ["--input", case / "shards", "--model", case / "model", "--output", output]
        return [sys.executable, "-m", "mmbeam", "embed", *paths, "--modalities", "image", "--device", "cpu"]
    return [environment(peer), HERE / f"with_{peer.replace('-', '_')}.py", case, output, str(batch)]


def vectors(output: Path) -> dict[str, np.ndarray]:
    """Return the vectors that a peer has written, normalised, by key."""
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(output.glob("**/img_emb_*.npy")):  # clip-retrieval
        keys = pq.read_table(file.parents[1] / "metadata" / f"metadata_{file.stem[-1]}.parquet")["image_path"]
        arrays |= dict(zip(keys.to_pylist(), np.load(file).astype(np.float32), strict=True))
    for file in sorted(output.glob("**/*.parquet")):
        if file.parent.name not in ("metadata", "_failures"):
            table = pq.read_table(file)
            column = "image_embedding" if "image_embedding" in table.column_names else "embedding"
            rows = zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True)
            arrays |= {key: np.asarray(vector, np.float32) for key, vector in rows}
    return {key: vector / np.linalg.norm(vector) for key, vector in arrays.items()}


def check(peer: str, actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raise SystemExit unless a peer has written all samples, with the vectors of mmbeam."""
    if actual.keys() != expected.keys():
        raise SystemExit(f"{peer} wrote {len(actual):,} samples of {len(expected):,}")
    cosine = min(float(actual[key] @ vector) for key, vector in expected.items())
    if cosine < LEAST_COSINE:
        raise SystemExit(f"{peer}: its vectors differ from those of mmbeam (lowest cosine {cosine:.3f})")


def unpack(case: Path) -> None:
    """Write the members of the shards as files beside them, for peers that do not read tars."""
    if not (case / "files").exists():
        for shard in sorted((case / "shards").glob("*.tar")):
            with tarfile.open(shard) as tar:
                tar.extractall(case / "files", filter="data")


def rounds(names: Sequence[str], case: Path, batch: int, count: int) -> Iterator[tuple[str, Figures]]:
    """Run each peer `count` times in turn, and yield its figures as they come."""
    expected: Mapping[str, np.ndarray] = {}
    for number in range(count):
        for name in names:
            output = CACHE / "peers" / "out" / f"{name}-{number}"
            subprocess.run(["rm", "-rf", str(output)], check=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            figures = run(command_of(name, case, output, batch), output.with_suffix(".log"))
            if name == "mmbeam":
                expected = expected or vectors(output)
            elif number == 0:
                check(name, vectors(output), expected)
            yield name, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", choices=[[], *PEERS], help="default: all")
    parser.add_argument("--case", default="image-clip-15m", choices=[case.name for case in cases.CASES[:2]])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="default: those of the case")
    options = parser.parse_args()
    [chosen] = [case for case in cases.CASES if case.name == options.case]
    if options.samples is not None:
        chosen = replace(chosen, name=f"{chosen.name}-{options.samples}", samples=options.samples)
    case = chosen.build(CACHE / "bench")
    unpack(case)
    names = ("mmbeam", *(options.peers or PEERS))
    for name in names[1:]:
        environment(name)
    results: dict[str, list[Figures]] = {name: [] for name in names}
    for name, figures in rounds(names, case, chosen.batch, options.rounds):
        results[name].append(figures)
        print(f"{name}: {figures.seconds:.1f} s, {figures.peak_mb:,.0f} MB", file=sys.stderr, flush=True)
    print(f"\n{chosen.name}: {chosen.samples:,} samples, whole processes, median of {options.rounds} in turn")
    print(f"{'':<16}{'samples/s':>10}{'mmbeam / peer':>24}{'peak MB':>10}")
    for name, runs in results.items():
        rate = chosen.samples / statistics.median(figures.seconds for figures in runs)
        ratios = sorted(peer.seconds / mmbeam.seconds for peer, mmbeam in zip(runs, results["mmbeam"], strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if name != "mmbeam" else ""
        print(f"{name:<16}{rate:>10,.1f}{ratio:>24}{max(figures.peak_mb for figures in runs):>10,.0f}")


if __name__ == "__main__":
    main()
