"""One measurement in a separate process: `python bench/loops.py MODE CASE_DIR`. Prints one JSON line.

MODE is one of:

decode   the thread pool alone
model    the model alone, on decoded samples
bare     the plain torch loop: a thread pool that decodes ahead of the model
mmbeam   the whole job, with rows on disk
flow     the reading and the stage of the job, without Beam and without writing
load     the start-up of a bare loop: import torch, transformers and Beam, and load the model
first    the start-up of the job, until its model is called
plan     list and plan the shards in CASE_DIR

CASE_DIR holds case.json, model/ and shards/, as bench/cases.py makes them. BENCH_DEVICE names the device (default:
cpu); the model runs in its default dtype. Except for load and first, imports, loading the model and a warm-up batch are
excluded from the time; opening shards and writing rows are included.
"""

import contextlib
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmbeam.config import Reading
from mmbeam.decode.audio import decode_audio
from mmbeam.decode.image import decode_image
from mmbeam.models.encoders import describe, load
from mmbeam.models.encoders.base import Encoder
from mmbeam.models.loading import parse_dtype
from mmbeam.readers.windows import Lookahead, ordered_map

if TYPE_CHECKING:
    from mmbeam.jobs.embed import EmbedJob
    from mmbeam.types import WorkUnit

CORES = len(os.sched_getaffinity(0))
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
LIMITS = Reading().limits
BEGIN = float(os.environ.get("BENCH_BEGIN", "nan"))  # time.time() when this process was started


def members(shards: list[Path]) -> Iterator[bytes]:
    """Yield the bytes of every member, in order, with the standard library's streaming reader."""
    for shard in shards:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield file.read()


def decoder(modality: str, rate: int | None) -> Callable[[bytes], Any]:
    if modality == "image":
        return lambda data: decode_image(data, LIMITS)[0]
    if modality == "audio":
        assert rate is not None
        return lambda data: decode_audio(data, LIMITS, frozenset((rate,))).waves[rate]
    return lambda data: data.decode()


def encode(model: Encoder, modality: str, items: list[Any]) -> np.ndarray:
    if modality == "image":
        pooled = model.encode_image(items).pooled
    elif modality == "audio":
        pooled = model.encode_audio(items, [model.spec.sampling_rate] * len(items)).pooled
    else:
        pooled = model.encode_text(model.tokenize(items)).pooled
    return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()


def batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def measure(mode: str, case: Path) -> dict[str, float]:
    if mode == "plan":
        return measure_plan(case)
    about = json.loads((case / "case.json").read_text())
    modality, batch = about["modality"], about["batch"]
    if mode == "load":
        return measure_load(case)
    if mode == "flow":
        return measure_flow(case, modality, batch)
    if mode in ("mmbeam", "first"):
        return measure_mmbeam(case, modality, batch, only_first=mode == "first")
    return measure_loop(mode, case, modality, batch, about["samples"])


def measure_loop(mode: str, case: Path, modality: str, batch: int, samples: int) -> dict[str, float]:
    shards = sorted((case / "shards").glob("*.tar"))
    spec = describe(case / "model")
    decode = decoder(modality, spec.sampling_rate)
    with torch.inference_mode(), ThreadPoolExecutor(CORES) as pool:
        decoded = ordered_map(decode, members(shards), pool, Lookahead(2 * batch))
        if mode == "decode":
            begin = time.perf_counter()
            return {"samples": sum(1 for _ in decoded), "seconds": time.perf_counter() - begin}
        model = load(spec, torch.device(DEVICE), parse_dtype(None, DEVICE))
        warm = list(islice(ordered_map(decode, members(shards[:1]), pool, Lookahead(batch)), batch))
        encode(model, modality, warm)
        begin = time.perf_counter()
        if mode == "model":
            rounds = max(1, samples // len(warm))
            for _ in range(rounds):
                encode(model, modality, warm)
            return {"samples": rounds * len(warm), "seconds": time.perf_counter() - begin}
        vectors = [encode(model, modality, items) for items in batches(decoded, batch)]
        return {"samples": sum(map(len, vectors)), "seconds": time.perf_counter() - begin}


def measure_load(case: Path) -> dict[str, float]:
    import apache_beam  # noqa: F401
    from transformers import CLIPModel

    CLIPModel.from_pretrained(case / "model", dtype=torch.float32)
    return {"samples": 0, "seconds": time.time() - BEGIN}


def measure_plan(directory: Path) -> dict[str, float]:
    from mmbeam.readers.listing import list_shards
    from mmbeam.readers.units import plan_units

    begin = time.perf_counter()
    units = plan_units(list_shards([str(directory)]), [])
    return {"samples": len(units), "seconds": time.perf_counter() - begin}


def measure_mmbeam(case: Path, modality: str, batch: int, only_first: bool) -> dict[str, float]:
    from mmbeam.config import ModelRef
    from mmbeam.jobs.embed import EmbedOptions, prepare
    from mmbeam.jobs.execute import execute_pipeline
    from mmbeam.models import placement
    from mmbeam.readers.windows import read_batches

    with tempfile.TemporaryDirectory(dir=case) as output:
        options = EmbedOptions(
            input=(str(case / "shards"),),
            output=output,
            models=(ModelRef(model=str(case / "model")),),
            modalities=(modality,),
            device=DEVICE,
            batch_size=batch,
        )
        job = prepare(options)
        stage = job.stages[0]
        if only_first:
            return {"samples": 0, "seconds": time_of_first_batch(job)}
        warm = next(read_batches(job.units[0], options.reading, stage.needs, options.windows))
        placement.get_device(DEVICE).run(stage, warm)
        del warm
        begin = time.perf_counter()
        report = execute_pipeline(job.run, job.units, (), job.build, job.check)
        seconds = time.perf_counter() - begin
    return {"samples": report.tally.rows, "seconds": seconds, "utilisation": report.model_utilisation}


def measure_flow(case: Path, modality: str, batch: int) -> dict[str, float]:
    """Run two units concurrently, as the job does: each of two threads reads its units and waits for the device."""
    from mmbeam.config import Windows
    from mmbeam.models import placement
    from mmbeam.readers.listing import list_shards
    from mmbeam.readers.units import plan_units
    from mmbeam.readers.windows import prefetch, read_batches
    from mmbeam.stages.embed import embed_stage

    units = plan_units(list_shards([str(case / "shards")]), [])
    stage = embed_stage(str(case / "model"), modalities=(modality,), device=DEVICE, batch_size=batch)
    device = placement.get_device(DEVICE)

    def embed(units: list[WorkUnit]) -> tuple[int, float]:
        samples, computed = 0, 0.0
        for unit in units:
            for window in prefetch(read_batches(unit, Reading(), stage.needs, Windows()), unit.id):
                done = device.run(stage, window) if window.samples else window
                samples += len(done.samples)
                computed += done.tally.seconds.get("compute", 0.0)
        return samples, computed

    embed(units[:1])
    begin = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(embed, (units[::2], units[1::2])))
    seconds = time.perf_counter() - begin
    computed = sum(seconds for _, seconds in results)
    return {"samples": sum(n for n, _ in results), "seconds": seconds, "utilisation": computed / seconds}


def time_of_first_batch(job: "EmbedJob") -> float:
    """Return the seconds from the start of the process until the model is called for the first time."""
    from mmbeam.jobs.execute import execute_pipeline
    from mmbeam.models.encoders.joint import ClipEncoder

    called: list[float] = []

    def encode_image(*_: object) -> None:
        called.append(time.time())
        raise MemoryError("the first batch has arrived")

    ClipEncoder.encode_image = encode_image
    with contextlib.suppress(Exception):
        execute_pipeline(job.run, job.units, (), job.build, job.check)
    return called[0] - BEGIN


if __name__ == "__main__":
    torch.set_num_threads(CORES)
    figures = measure(sys.argv[1], Path(sys.argv[2]))
    figures["rate"] = figures["samples"] / figures["seconds"]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    figures["peak_mb"] = usage.ru_maxrss / 1024
    print(json.dumps(figures))
