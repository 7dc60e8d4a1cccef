"""Train a fusion model: from options to a directory that `mmbeam caption --model` takes.

MODEL_DIR/config.json, model.safetensors, tokenizer.json, preprocessing.json, README.md
MODEL_DIR/_training/run.json           the options: the same options resume the run, other options are an error
MODEL_DIR/_training/start/             configuration, vocabulary and sample counts from the start of the training
MODEL_DIR/_training/checkpoint.safetensors, best.safetensors
MODEL_DIR/_training/metrics.jsonl, loss.png, search.json, report.json
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbeam.errors import RunMismatchError, TrainingError, UsageError
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.models.loading import quiet_transformers
from mmbeam.training.card import model_card
from mmbeam.training.checkpoint import write_text
from mmbeam.training.distributed import SINGLE, World, joined, local_device
from mmbeam.training.fit import BEST, CHECKPOINT, SUBSETS_PER_BATCH, ProgressReporter, State, Trainer
from mmbeam.training.options import TrainOptions, difference
from mmbeam.training.scores import Evaluator
from mmbeam.training.setup import FACTS, START, Setup, new_model, set_up

log = logging.getLogger(__name__)


SEARCH = "search.json"


@dataclass(frozen=True)
class Span:
    """A range of a hyperparameter, sampled uniformly or log-uniformly."""

    low: float
    high: float
    logarithmic: bool = False

    def value_at(self, uniform: float) -> float:
        """Map `uniform` in [0, 1) to a value with three significant digits."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        value = low + uniform * (high - low)
        return float(f"{math.exp(value) if self.logarithmic else value:.3g}")


SPACE: Mapping[str, Span] = {
    "learning_rate": Span(3e-4, 5e-3, logarithmic=True),
    "weight_decay": Span(1e-3, 0.1, logarithmic=True),
    "dropout": Span(0.0, 0.3),
    "label_smoothing": Span(0.0, 0.1),
    "modality_dropout": Span(0.05, 0.3),
    "align": Span(0.03, 0.3, logarithmic=True),  # weight of this loss; the weight of the caption loss is 1
    "reconstruct": Span(0.03, 0.3, logarithmic=True),
}


def sample_trials(options: TrainOptions, space: Mapping[str, Span] = SPACE) -> list[dict[str, Any]]:
    """Return the hyperparameter changes of each trial, drawn with the options' seed. The first trial has no changes."""
    rng = np.random.default_rng((options.seed, len(space)))
    drawn = [
        {name: span.value_at(float(uniform)) for (name, span), uniform in zip(space.items(), row, strict=True)}
        for row in rng.random((options.search - 1, len(space)))
    ]
    return [{}, *drawn]


def apply_changes(options: TrainOptions, changes: Mapping[str, Any]) -> TrainOptions:
    """Return the options with the changes of a trial."""
    weights = {name: value for name, value in changes.items() if name in ("align", "reconstruct")}
    others = {name: value for name, value in changes.items() if name not in weights}
    return replace(options, **others, loss_weights={**options.loss_weights, **weights})


def search(
    setup: Setup,
    options: TrainOptions,
    directory: Path,
    device: torch.device,
    reporter: ProgressReporter | None = None,
    space: Mapping[str, Span] = SPACE,
    world: World = SINGLE,
) -> TrainOptions:
    """Return the options with the best of `options.search` configurations. Scores are written to search.json.

    Finished trials of an interrupted run are not repeated. Raises TrainingError if every trial failed.
    """
    path = directory / SEARCH
    trials: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    trial_changes = sample_trials(options, space)
    for number, changes in enumerate(trial_changes[len(trials) :], len(trials)):
        score, error = _run_trial(
            setup, apply_changes(options, changes), directory / f"search-{number}", device, reporter, world
        )
        trials.append({"changed": changes, "score": score, "error": error})
        if world.is_main:
            write_text(path, json.dumps(trials, indent=2) + "\n")
        log.info("trial %d of %d: %s: %s", number + 1, len(trial_changes), changes or "no changes", error or score)
    finished = [trial for trial in trials if trial["score"] is not None]
    if not finished:
        raise TrainingError(f"all {len(trials)} configurations of the search failed; see {path} for their errors")
    best = max(finished, key=lambda trial: list(trial["score"]))
    if world.is_main:
        log.warning(
            "training the best of %d trials, trial %d: %s",
            len(trials),
            trials.index(best) + 1,
            best["changed"] or "no changes",
        )
    return apply_changes(options, best["changed"])


def _run_trial(
    setup: Setup,
    options: TrainOptions,
    directory: Path,
    device: torch.device,
    reporter: ProgressReporter | None,
    world: World,
) -> tuple[list[float] | None, str | None]:
    """Return the best validation scores of a short training (higher is better), or the error that ended it."""
    directory.mkdir(exist_ok=True)
    options = replace(options, steps=options.search_steps, search=0)
    model, frozen = new_model(options, setup, device)
    trainer = Trainer(
        model, setup.processor, setup.source, options, directory, frozen=frozen, reporter=reporter, world=world
    )
    try:
        return trainer.run().best, None
    except TrainingError as error:
        return None, str(error)
    finally:
        for name in (CHECKPOINT, BEST) if world.is_main else ():  # keep only the metrics of a trial
            (directory / name).unlink(missing_ok=True)


TRAINING, RUN, REPORT = "_training", "run.json", "report.json"


def train(
    options: TrainOptions, *, overwrite: bool = False, reporter: ProgressReporter | None = None
) -> dict[str, Any]:
    """Train a model, test it once, write it to `options.output`, and return the report.

    Called again with the same options, it resumes an interrupted run and returns the report of a completed run. In
    the processes of torchrun it trains one model and returns the report in all of them; `options.output` must be on a
    file system that they share.

    Raises UsageError, NoShardsError, MissingModalityError, ModelError, RunMismatchError or DeviceError before the
    training, TrainingError or ShardError during it, and JobError if another process fails.
    """
    device = local_device(options.device)
    quiet_transformers()
    with joined(device) as world:
        world.local_batch_size(options.batch_size)
        with world.main_first():
            directory = open_training(options, overwrite, world)
            done = (directory / REPORT).exists()
            setup = None if done else set_up(options, directory)
        if setup is None:
            log.info("%s: already trained", options.output)
            return read_report(directory)
        return train_on(setup, options, directory, device, reporter, world)


def train_on(
    setup: Setup,
    options: TrainOptions,
    directory: Path,
    device: torch.device,
    reporter: ProgressReporter | None = None,
    world: World = SINGLE,
) -> dict[str, Any]:
    """Train the setup, write the model to the parent of `directory`, and return the report."""
    if options.search:
        options = search(setup, options, directory, device, reporter, world=world)
    model, frozen = new_model(options, setup, device)
    trainer = Trainer(
        model, setup.processor, setup.source, options, directory, frozen=frozen, reporter=reporter, world=world
    )
    state = trainer.run()
    return world.from_main(lambda: _finish(trainer, state, setup, directory.parent))


def _finish(trainer: Trainer, state: State, setup: Setup, output: Path) -> dict[str, Any]:
    """Test the model, write it with its card, and return the report."""
    model, options = trainer.model, trainer.options
    evaluator = Evaluator(model, setup.processor, trainer.device, options.batch_size)
    test = evaluator.scores(setup.source.examples("test"), SUBSETS_PER_BATCH)
    trainer.journal.plot()
    epochs = [line for line in trainer.journal.lines() if "epoch" in line]
    report = {
        "options": options.identity(),
        "versions": {name: version(name) for name in ("mmbeam", "torch", "transformers", "tokenizers", "numpy")},
        "device": trainer.device.type,
        "processes": trainer.world.size,
        "parameters": model.num_parameters(),
        "data": setup.sample_counts,
        "training": asdict(state),
        "validation": next(line["validation"] for line in epochs if line["epoch"] == state.best_epoch),
        "test": test.to_json(),
    }
    write_model(model, setup.processor, output)
    write_text(output / "README.md", model_card(report))
    write_text(trainer.directory / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def write_model(model: FusionModel, processor: FusionProcessor, directory: Path) -> None:
    """Write weights, configuration and processor with the same permissions."""
    model.save_pretrained(directory)
    processor.save(directory)
    # safetensors creates a file that only its owner can read.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")


def read_report(directory: Path) -> dict[str, Any]:
    """Return the report of a completed training."""
    report: dict[str, Any] = json.loads((directory / REPORT).read_text())
    return report


def open_training(options: TrainOptions, overwrite: bool, world: World = SINGLE) -> Path:
    """Return the directory of the run's files. Rank 0 creates it and writes the options to run.json.

    Raises RunMismatchError if it holds a training with other options, UsageError if `options.output` is a file, holds
    a model from another source, or is not visible to this rank.
    """
    output = Path(options.output).expanduser()
    directory = output / TRAINING
    if not world.is_main:
        if not (directory / RUN).exists():
            raise UsageError(
                f"`output` {options.output}: not visible to rank {world.rank}; it must be on a shared file system"
            )
        return directory
    if overwrite and directory.exists():
        shutil.rmtree(directory)
    has_started = (directory / START / FACTS).exists() or (directory / CHECKPOINT).exists()
    if has_started and (directory / RUN).exists():  # a run that was rejected before its start is replaced
        saved = json.loads((directory / RUN).read_text())
        if "shares" in saved:  # as mmbeam 0.1 called it
            saved["split_fractions"] = saved.pop("shares")
        lines = difference(saved, options.identity())
        if lines:
            raise RunMismatchError(
                f"`output` {options.output}: holds a training with other options:\n  " + "\n  ".join(lines) + "\n"
                "To resume it, pass the same options; otherwise choose another `output`, or start over with `overwrite`"
            )
        return directory
    if output.exists() and not output.is_dir():
        raise UsageError(f"`output` {options.output}: expected a directory, found a file")
    if (output / "config.json").exists() and not overwrite:
        raise UsageError(f"`output` {options.output}: holds a model from another source; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / RUN, json.dumps(options.identity(), indent=2) + "\n")
    return directory
