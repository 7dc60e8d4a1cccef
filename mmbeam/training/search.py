"""Try some configurations on a short schedule, and say which is best on the validation part.

SPACE says what is drawn. The first trial is what the options say, so a search never ends below them by
chance. The test part is not touched.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbeam.errors import TrainingError
from mmbeam.training.checkpoint import write_text
from mmbeam.training.distributed import ALONE, World
from mmbeam.training.fit import BEST, CHECKPOINT, Trainer, Watcher
from mmbeam.training.options import TrainOptions
from mmbeam.training.setup import Setup, new_model

log = logging.getLogger(__name__)

FOUND = "search.json"


@dataclass(frozen=True)
class Span:
    """Where a number is drawn from: evenly, or evenly in its logarithm."""

    low: float
    high: float
    logarithmic: bool = False

    def draw(self, uniform: float) -> float:
        """The number that one in [0, 1) stands for, to three digits."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        value = low + uniform * (high - low)
        return float(f"{math.exp(value) if self.logarithmic else value:.3g}")


SPACE: Mapping[str, Span] = {
    "learning_rate": Span(3e-4, 5e-3, logarithmic=True),
    "weight_decay": Span(1e-3, 0.1, logarithmic=True),
    "dropout": Span(0.0, 0.3),
    "label_smoothing": Span(0.0, 0.1),
    "modality_dropout": Span(0.05, 0.3),
    "align": Span(0.03, 0.3, logarithmic=True),  # weights of losses; that of the captions is 1
    "reconstruct": Span(0.03, 0.3, logarithmic=True),
}


def draw(options: TrainOptions, space: Mapping[str, Span] = SPACE) -> list[dict[str, Any]]:
    """The configurations to try, a function of the options' seed: what to change in the options."""
    rng = np.random.default_rng((options.seed, len(space)))
    drawn = [
        {name: span.draw(float(uniform)) for (name, span), uniform in zip(space.items(), row, strict=True)}
        for row in rng.random((options.search - 1, len(space)))
    ]
    return [{}, *drawn]


def with_choice(options: TrainOptions, choice: Mapping[str, Any]) -> TrainOptions:
    """The options with a drawn configuration in them."""
    weights = {name: value for name, value in choice.items() if name in ("align", "reconstruct")}
    others = {name: value for name, value in choice.items() if name not in weights}
    return replace(options, **others, loss_weights={**options.loss_weights, **weights})


def search(
    setup: Setup,
    options: TrainOptions,
    directory: Path,
    device: torch.device,
    watcher: Watcher | None = None,
    space: Mapping[str, Span] = SPACE,
    world: World = ALONE,
) -> TrainOptions:
    """The options with the best of `options.search` configurations; search.json says how each did.

    Trials that an interrupted run has finished are not done again. Raises TrainingError if none could be
    trained.
    """
    path = directory / FOUND
    trials: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    choices = draw(options, space)
    for number, choice in enumerate(choices[len(trials) :], len(trials)):
        score, error = _try(setup, with_choice(options, choice), directory / f"search-{number}", device, watcher, world)
        trials.append({"changed": choice, "score": score, "error": error})
        if world.is_main:
            write_text(path, json.dumps(trials, indent=2) + "\n")
        log.info("trial %d of %d: %s: %s", number + 1, len(choices), choice or "as given", error or score)
    done = [trial for trial in trials if trial["score"] is not None]
    if not done:
        raise TrainingError(f"none of the {len(trials)} configurations could be trained; see {path}")
    best = max(done, key=lambda trial: list(trial["score"]))
    if world.is_main:
        log.warning("trial %d of %d won: %s", trials.index(best) + 1, len(trials), best["changed"] or "as given")
    return with_choice(options, best["changed"])


def _try(
    setup: Setup, options: TrainOptions, directory: Path, device: torch.device, watcher: Watcher | None, world: World
) -> tuple[list[float] | None, str | None]:
    """The best validation scores of a short training, higher is better; None and why if its loss was no number."""
    directory.mkdir(exist_ok=True)
    options = replace(options, steps=options.search_steps, search=0)
    model, frozen = new_model(options, setup, device)
    trainer = Trainer(
        model, setup.processor, setup.source, options, directory, frozen=frozen, watcher=watcher, world=world
    )
    try:
        return trainer.run().best, None
    except TrainingError as error:
        return None, str(error)
    finally:
        for name in (CHECKPOINT, BEST) if world.is_main else ():  # what is left of a trial is its metrics
            (directory / name).unlink(missing_ok=True)
