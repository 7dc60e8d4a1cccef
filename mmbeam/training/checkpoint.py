"""Tensors and facts in one safetensors file, written at once or not at all: no pickle is written or read.

The facts are the file's JSON metadata. What a training needs to go on exactly where it stopped is the
model's weights, the optimizer's moments, and the state of the random number generators.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmbeam.errors import TrainingError

Tensors = Mapping[str, torch.Tensor]


def save(path: Path, tensors: Tensors, facts: Mapping[str, Any]) -> None:
    """Write `path` so that a reader, also after a power cut, finds the file from before or this one, whole."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # tied ones apart
    scratch = path.with_name(f"{path.name}.tmp")
    save_file(own, scratch, metadata={"facts": json.dumps(dict(facts))})
    _publish(scratch, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all."""
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text)
    _publish(scratch, path)


def _publish(scratch: Path, path: Path) -> None:
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and facts of a file that `save` wrote. Raises TrainingError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(
            f"{path}: no checkpoint of mmbeam train ({type(error).__name__}: {error}); "
            "remove the file to start over, or choose another --output"
        ) from None


def prefixed(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors with `prefix` and a dot before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix` and a dot, without it."""
    return {name[len(prefix) + 1 :]: each for name, each in tensors.items() if name.startswith(f"{prefix}.")}


def model_tensors(model: torch.nn.Module, left_out: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """The model's weights, but those whose names begin with one of `left_out`."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(left_out)}


def restore_model(model: torch.nn.Module, tensors: Tensors, path: Path, left_out: tuple[str, ...] = ()) -> None:
    """Put back the weights that `path` held; those of `left_out` stay. Raises TrainingError for another model's."""
    staying = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(left_out)}
    try:
        model.load_state_dict({**staying, **tensors})
    except RuntimeError as error:  # its message lists every tensor
        raise TrainingError(
            f"{path}: the checkpoint of another configuration; remove it to start over, or choose another --output"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state, "<number of the parameter>.<name>": tensor; its options are the run's own."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` gave, on the device of the parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_tensors() -> dict[str, torch.Tensor]:
    """The states of torch's random number generators, of the CPU and of each GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random(tensors: Tensors) -> None:
    """Put back what `random_tensors` gave, as far as this machine has the devices."""
    torch.set_rng_state(tensors["cpu"])
    for number in range(torch.cuda.device_count()):
        if f"cuda{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{number}"], number)
