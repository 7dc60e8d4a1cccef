"""What a training writes down as it goes: metrics.jsonl, and a plot of the losses.

A line is the mean loss of some steps, {"step", "loss", "learning_rate"}, or an epoch, {"epoch", "step",
"seconds", "train": losses, "validation": scores}.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmbeam.training.checkpoint import write_text

METRICS, PLOT = "metrics.jsonl", "loss.png"
STEPS_PER_LINE = 10
PLOT_SECONDS = 60.0  # between two plots: one takes a second


class Journal:
    """The metrics of a training in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS
        self._losses: list[float] = []
        self._drawn = time.monotonic()

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """One step was done."""
        self._losses.append(loss)
        if step % STEPS_PER_LINE == 0:
            mean = sum(self._losses) / len(self._losses)
            self._append({"step": step, "loss": mean, "learning_rate": learning_rate})
            self._losses.clear()

    def epoch(
        self, epoch: int, step: int, seconds: float, losses: Mapping[str, float], scores: Mapping[str, Any]
    ) -> None:
        """An epoch was done: its mean losses, and what was measured on the validation part."""
        self._append(
            {"epoch": epoch, "step": step, "seconds": round(seconds, 3), "train": losses, "validation": scores}
        )
        if time.monotonic() - self._drawn >= PLOT_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Plot what is written down."""
        plot(self.lines(), self.path.with_name(PLOT))
        self._drawn = time.monotonic()

    def lines(self) -> list[dict[str, Any]]:
        """What is written down; a line that was being written when the process died is left out."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def cut(self, step: int) -> None:
        """Forget what came after `step`: it will be done again."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
        write_text(self.path, "".join(kept))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A picture of the training loss, the validation loss and the exact match over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes half a second, and draws no window
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    left = figure.subplots()
    steps = [line for line in lines if "loss" in line]
    epochs = [line for line in lines if "epoch" in line]
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training, all losses")
    for name, of in (("training", "train"), ("validation", "validation")):
        losses = [line[of].get("caption", line[of].get("loss")) for line in epochs]
        left.plot([line["step"] for line in epochs], losses, marker="o", label=f"{name}, caption")
    left.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    right = left.twinx()
    exact = [line["validation"]["exact_match"] for line in epochs]
    right.plot([line["step"] for line in epochs], exact, "k--", label="exact match")
    right.set(ylabel="exact match on the validation part", ylim=(0, 1.02))
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="center right")
    scratch = path.with_name(f"tmp-{path.name}")
    figure.savefig(scratch, dpi=100)
    scratch.replace(path)
