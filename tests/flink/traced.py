"""`mmbeam embed` with a slow model step that writes a trace: the process of every model load and of every unit.

python traced.py TRACE SECONDS embed --input ...
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mmbeam.jobs.embed
from mmbeam.cli import main
from mmbeam.stages.embed import EmbedStage, embed_stage
from mmbeam.types import Batch


@dataclass(frozen=True, kw_only=True)
class TracedStage(EmbedStage):
    """An encoder that appends its calls to a file, and sleeps."""

    trace: str
    seconds: float

    def load(self) -> Any:
        self._note("load", "model")
        return super().load()

    def prepare(self, model: Any, batch: Batch) -> Iterator[Any]:
        self._note("run", batch.unit.id)
        if self.seconds < 0:  # like the OOM killer
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        yield from super().prepare(model, batch)

    def _note(self, *words: str) -> None:
        line = " ".join([str(os.getpid()), *words])
        with Path(self.trace).open("ab", buffering=0) as file:  # one write, so lines of several processes stay whole
            file.write(f"{line}\n".encode())


def _traced(trace: str, seconds: float) -> Any:
    def make(model: str, **options: Any) -> TracedStage:
        stage = embed_stage(model, **options)
        return TracedStage(
            **{field.name: getattr(stage, field.name) for field in fields(stage)}, trace=trace, seconds=seconds
        )

    return make


if __name__ == "__main__":
    import traced  # so that workers can unpickle its classes by module name

    mmbeam.jobs.embed.embed_stage = traced._traced(sys.argv[1], float(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
