"""A small run with units and windows, attempts at a unit in other processes, and readers of what a job wrote."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from mmbeam.names import Modality
from mmbeam.runs.plan import extend_plan
from mmbeam.runs.run import Run
from mmbeam.runs.store import Store
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Batch, Failure, Input, Output, RunReport, Sample, Shard, Tally, WorkUnit

DIM = 4
VECTOR = pa.list_(pa.float32(), DIM)
IMAGE = Output(modalities=frozenset({"image"}), columns=(pa.field("image_embedding", VECTOR),))
TEXT = Output(modalities=frozenset({"text"}), columns=(pa.field("text_embedding", VECTOR),))
CAPTION = Output(
    modalities=frozenset({"image", "audio"}),
    columns=(pa.field("caption", pa.string()), pa.field("caption_logprob", pa.float32())),
)
OUTPUTS = (IMAGE, TEXT)


def make_run(output: str, outputs: Sequence[Output] = OUTPUTS, **changes: Any) -> Run:
    return Run.create(
        output=output,
        configuration={"task": "embed", "models": {"clip": {"digest": "12ab"}}, **changes},
        recorded={"device": "cpu", "versions": {"torch": "2.13"}},
        outputs=outputs,
    )


def make_unit(name: str = "a-1", **shard: Any) -> WorkUnit:
    facts = {"path": f"/shards/{name}.tar", "url": f"/shards/{name}.tar", "size": 1024, "etag": "e1", **shard}
    return WorkUnit(id=name, inputs=(Input(shard=Shard(**facts)),))


def make_sample(unit: WorkUnit, number: int, present: Sequence[Modality] = ("image", "text")) -> Sample:
    return Sample(
        key=f"{number:05d}",
        shard=unit.inputs[0].shard.path,
        offset=number * 1024,
        present=frozenset(present),
        text=f"Text {number}" if "text" in present else None,
        image_size=(64, 48) if "image" in present else None,
    )


def vector(number: int) -> list[float]:
    return [float(number)] * DIM


def make_batches(unit: WorkUnit, windows: int = 2, samples: int = 5) -> list[Batch]:
    """Make windows in which the first sample has a broken image and the second has no text."""
    return [_make_batch(unit, index, samples, last=index == windows - 1) for index in range(windows)]


def _make_batch(unit: WorkUnit, index: int, count: int, last: bool) -> Batch:
    numbers = range(index * count, (index + 1) * count)
    samples = [make_sample(unit, n, ("image",) if n == numbers[1] else ("image", "text")) for n in numbers]
    broken = samples[0]
    failure = Failure(
        key=broken.key,
        shard=broken.shard,
        offset=broken.offset,
        modality="image",
        step="decode",
        error="DecodeError",
        message="truncated JPEG",
    )
    images = [None if n == numbers[0] else vector(n) for n in numbers]
    texts = [None if n == numbers[1] else vector(-n) for n in numbers]
    return Batch(
        unit=unit,
        index=index,
        last=last,
        samples=tuple(samples),
        features={"image_embedding": pa.array(images, VECTOR), "text_embedding": pa.array(texts, VECTOR)},
        failures=(failure,),
        tally=Tally(samples=count),
    )


def write_unit(run: Run, unit: WorkUnit) -> UnitWriter:
    """Return an attempt that has written every window and not committed."""
    writer = UnitWriter(run, unit)
    for batch in make_batches(unit):
        writer.write(batch)
    return writer


# What a job wrote


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Read the rows under `output`, by shard and offset."""
    rows = ds.dataset(output / "data").to_table().to_pylist()
    return sorted(rows, key=lambda row: (row["shard"], row["offset"]))


def read_failures(output: Path) -> list[dict[str, Any]]:
    """Read the failure records under `output`, by shard and offset."""
    records = ds.dataset(output / "_failures").to_table().to_pylist()
    return sorted(records, key=lambda record: (record["shard"], record["offset"] or 0))


def is_conserved(report: RunReport) -> bool:
    """Whether every sample is a row, a failure or a skip."""
    tally = report.tally
    return tally.samples == tally.rows + tally.failed + sum(tally.skipped.values())


# Processes


def start(target: Callable[..., None], *args: Any) -> Any:
    """Start a process that runs `target`, forked from a server that has no threads and has imported the modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmbeam.runs.writer", "s3fs", "gcsfs"])
    process = context.Process(target=_with_environment, args=(dict(os.environ), target, args))
    process.start()
    return process


def _with_environment(environment: dict[str, str], target: Callable[..., None], args: Sequence[Any]) -> None:
    """Run `target` in the caller's environment: the server has that of its first caller, with other stores."""
    os.environ.update(environment)
    target(*args)


def new_barrier(parties: int) -> Barrier:
    return multiprocessing.get_context("forkserver").Barrier(parties, timeout=30)


def commit_together(output: str, unit: WorkUnit, barrier: Barrier, results: Any) -> None:
    """Publish a unit when all other attempts are about to."""
    writer = write_unit(make_run(output), unit)
    barrier.wait()
    results.put((writer.attempt, writer.commit().to_json()))


def commit_and_die(output: str, unit: WorkUnit, folder: str) -> None:
    """Publish a unit, and kill the process just before it publishes a file in `folder`."""
    publish = Store._publish

    def dying(store: Store, name: str, source: Path | bytes, exclusive: bool) -> None:
        if name.startswith(folder):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(store, name, source, exclusive)

    Store._publish = dying  # type: ignore[method-assign]
    write_unit(make_run(output), unit).commit()


def plan_together(output: str, shards: Sequence[Shard], barrier: Barrier, results: Any) -> None:
    """Extend the plan of a run while another process does."""
    run = make_run(output)
    barrier.wait()
    results.put([unit.id for unit in extend_plan(run, shards)])
