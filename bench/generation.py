"""Captions by the shipped model: `mmbeam caption` against a bare `model.generate` loop on the same batches.

The bare loop reads the same shards with the standard library's tarfile, decodes ahead of the model in a thread pool,
orders and packs windows as mmbeam does, calls the model and decodes its tokens. It writes no rows and computes no
log-probabilities, without Beam. Each figure comes from a separate process. Imports, loading and a first batch are
excluded from the time; opening shards and writing rows are included.
"""

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmbeam.config import Reading, Windows
from mmbeam.corpus.write import write_corpus
from mmbeam.decode.audio import decode_audio
from mmbeam.decode.image import decode_image
from mmbeam.models.generators import describe, load
from mmbeam.models.loading import resolve
from mmbeam.names import SHIPPED_MODEL
from mmbeam.prompts.ask import Decoding, Request
from mmbeam.readers.windows import Lookahead, ordered_map
from mmbeam.stages.generate import plan_batches

CACHE = Path(__file__).parents[1] / ".cache" / "bench"
SAMPLES, SHARDS, BATCH, PAIRS = 8000, 16, 32, 5
CORES = len(os.sched_getaffinity(0))
LIMITS = Reading().limits


def build() -> Path:
    """Return the directory with shards of the procedural corpus, and make them unless they exist."""
    directory = CACHE / f"captions-{SAMPLES}"
    if not (directory / "done").exists():
        write_corpus(directory / "shards", samples=SAMPLES, shards=SHARDS, seed=5)
        (directory / "done").touch()
    return directory


def raw_samples(shards: Sequence[Path]) -> Iterator[dict[str, bytes]]:
    """Yield the members of each sample, by extension."""
    for shard in shards:
        with tarfile.open(shard, "r|") as tar:
            key, fields = "", {}
            for member in tar:
                stem, _, field = member.name.partition(".")
                if stem != key and fields:
                    yield fields
                    fields = {}
                file = tar.extractfile(member)
                assert file is not None
                key, fields[field] = stem, file.read()
            yield fields


def to_request(fields: dict[str, bytes], rate: int) -> Request:
    image = next(data for name, data in fields.items() if name in ("jpg", "png", "webp"))
    audio = next(data for name, data in fields.items() if name in ("wav", "flac", "ogg", "mp3"))
    wave = decode_audio(audio, LIMITS, frozenset((rate,))).waves[rate]
    return Request(image=decode_image(image, LIMITS)[0], audio=(wave, rate), text=fields["txt"].decode())


def bare(directory: Path) -> tuple[int, float]:
    spec = describe(resolve(SHIPPED_MODEL).directory)
    generator: Any = load(spec, torch.device("cpu"), torch.float32)
    shards = sorted((directory / "shards").glob("*.tar"))
    rate = spec.sampling_rate
    assert rate is not None
    with torch.inference_mode(), ThreadPoolExecutor(CORES) as pool:
        generator.generate([to_request(next(raw_samples(shards)), rate)] * BATCH, Decoding())
        begin, count = time.perf_counter(), 0
        decoded = ordered_map(lambda fields: to_request(fields, rate), raw_samples(shards), pool, Lookahead(2 * BATCH))
        for window in windows(decoded):
            for indices in plan_batches(generator, window, Decoding(), BATCH):
                inputs = generator.processor([window[index] for index in indices], torch.device("cpu"))
                ids = generator.model.generate(**inputs, max_new_tokens=Decoding().limit, do_sample=False)
                count += len(generator.processor.decode(ids.tolist()))
        return count, time.perf_counter() - begin


def windows(requests: Iterator[Request]) -> Iterator[list[Request]]:
    """Yield windows of the same size as mmbeam's, by the memory of images and audio."""
    first = next(requests)
    assert first.image is not None
    assert first.audio is not None
    size = Windows().decoded_bytes // (first.image.nbytes + first.audio[0].nbytes) + 1
    window = [first, *islice(requests, size - 1)]
    while window:
        yield window
        window = list(islice(requests, size))


def mmbeam(directory: Path) -> tuple[int, float]:
    from mmbeam.jobs.caption import CaptionOptions, prepare
    from mmbeam.models import placement
    from mmbeam.readers.windows import read_batches

    with tempfile.TemporaryDirectory(dir=directory) as output:
        options = CaptionOptions(
            input=(str(directory / "shards"),), output=output, model=SHIPPED_MODEL, device="cpu", batch_size=BATCH
        )
        job = prepare(options)
        (stage,) = job.stages
        warm = next(read_batches(job.units[0], options.reading, stage.needs, Windows(samples=BATCH)))
        placement.get_device("cpu").run(stage, warm)
        begin = time.perf_counter()
        report = job.execute()
        return report.tally.rows, time.perf_counter() - begin


def measure(mode: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, mode]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def section() -> None:
    """Print the table."""
    build()
    pairs = [(measure("bare"), measure("mmbeam")) for _ in range(PAIRS)]
    ratios = sorted(mmbeam["rate"] / bare["rate"] for bare, mmbeam in pairs)
    bare_rate, mmbeam_rate = (statistics.median(pair[side]["rate"] for pair in pairs) for side in (0, 1))
    print(f"\ncaptions by the shipped model, {SAMPLES:,} samples of image, audio and text in batches of {BATCH}")
    print(
        f"bare generate loop {bare_rate:,.0f}  mmbeam {mmbeam_rate:,.0f} samples/s  mmbeam / bare "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f}, {PAIRS} alternating pairs)"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(CORES)
        count, seconds = {"bare": bare, "mmbeam": mmbeam}[sys.argv[1]](build())
        assert count == SAMPLES
        print(json.dumps({"rate": count / seconds}))
    else:
        section()
