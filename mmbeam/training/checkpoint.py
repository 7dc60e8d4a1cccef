"""Files of a training: checkpoints, metrics.jsonl and its plot. Checkpoints are replaced atomically, without pickle.

A checkpoint is one safetensors file: model weights, optimizer moments and the states of the random number
generators. Its JSON metadata holds the state of the training, under the key facts.

A line of metrics.jsonl is the mean loss of some steps, {"step", "loss", "learning_rate"}, or an epoch, {"epoch",
"step", "seconds", "train": losses, "validation": scores}.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmbeam.errors import TrainingError

Tensors = Mapping[str, torch.Tensor]


def save(path: Path, tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Write `path` atomically: it holds the old content or the new, even after a power failure."""
    # safetensors rejects tensors that share memory, so tied weights are copied.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    scratch = path.with_name(f"{path.name}.tmp")
    save_file(copies, scratch, metadata={"facts": json.dumps(dict(state))})
    _publish(scratch, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text)
    _publish(scratch, path)


def _publish(scratch: Path, path: Path) -> None:
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the state in a file that `save` wrote. Raises TrainingError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise TrainingError(
            f"{path}: not a checkpoint of mmbeam train ({type(error).__name__}: {error}); "
            "remove the file to start over, or choose another `output`"
        ) from None


def prefixed(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors with `prefix` and a dot before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with `prefix` and a dot, under the rest of the name."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def model_tensors(model: torch.nn.Module, excluded: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Return the model's weights without those whose names begin with one of `excluded`."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(excluded)}


def restore_model(model: torch.nn.Module, tensors: Tensors, path: Path, excluded: tuple[str, ...] = ()) -> None:
    """Load the weights in `path`, except those of `excluded`. Raises TrainingError if they do not fit the model."""
    unchanged = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(excluded)}
    try:
        model.load_state_dict({**unchanged, **tensors})
    except RuntimeError as error:  # its message lists every tensor
        raise TrainingError(
            f"{path}: its weights do not fit this model; remove it to start over, or choose another `output`"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors by "<parameter's number>.<name>", without hyperparameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Load what `optimizer_tensors` returned, onto the device of the parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_tensors() -> dict[str, torch.Tensor]:
    """Return the states of torch's random number generators, of the CPU and of each GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random(tensors: Tensors) -> None:
    """Load what `random_tensors` returned, for the devices of this machine."""
    torch.set_rng_state(tensors["cpu"])
    for number in range(torch.cuda.device_count()):
        if f"cuda{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{number}"], number)


METRICS, PLOT = "metrics.jsonl", "loss.png"
STEPS_PER_LINE = 10
PLOT_SECONDS = 60.0  # at least, between two plots; a plot takes a second


class Journal:
    """The metrics of a training in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS
        self._losses: list[float] = []
        self._drawn = time.monotonic()

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Record a step."""
        self._losses.append(loss)
        if step % STEPS_PER_LINE == 0:
            mean = sum(self._losses) / len(self._losses)
            self._append({"step": step, "loss": mean, "learning_rate": learning_rate})
            self._losses.clear()

    def epoch(
        self, epoch: int, step: int, seconds: float, losses: Mapping[str, float], scores: Mapping[str, Any]
    ) -> None:
        """Record an epoch: its mean training losses and its validation scores."""
        self._append(
            {"epoch": epoch, "step": step, "seconds": round(seconds, 3), "train": losses, "validation": scores}
        )
        if time.monotonic() - self._drawn >= PLOT_SECONDS:
            self.plot()

    def plot(self) -> None:
        """Plot the metrics."""
        plot(self.lines(), self.path.with_name(PLOT))
        self._drawn = time.monotonic()

    def lines(self) -> list[dict[str, Any]]:
        """Return the recorded lines, without a line that was cut off when the process died."""
        lines = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    def cut(self, step: int) -> None:
        """Remove the lines after `step`: those steps will run again."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
        write_text(self.path, "".join(kept))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot training loss, validation loss and exact match over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    left = figure.subplots()
    steps = [line for line in lines if "loss" in line]
    epochs = [line for line in lines if "epoch" in line]
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training, all losses")
    for name, key in (("training", "train"), ("validation", "validation")):
        losses = [line[key].get("caption", line[key].get("loss")) for line in epochs]
        left.plot([line["step"] for line in epochs], losses, marker="o", label=f"{name}, caption")
    left.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    right = left.twinx()
    exact = [line["validation"]["exact_match"] for line in epochs]
    right.plot([line["step"] for line in epochs], exact, "k--", label="exact match")
    right.set(ylabel="exact match on the validation split", ylim=(0, 1.02))
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="center right")
    scratch = path.with_name(f"tmp-{path.name}")
    figure.savefig(scratch, dpi=100)
    scratch.replace(path)
