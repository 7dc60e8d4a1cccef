"""The training loop of a fusion model: optimizer steps, validation after every epoch, checkpoints, early stopping.

The loop is independent of the source of examples and of the model directory. A loop that is interrupted anywhere
and restarted on the same files has the same result as an uninterrupted one. Several processes run the loop in
lockstep; only rank 0 validates and writes files.
"""

import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from mmbeam.errors import RunMismatchError, TrainingError
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.objectives import GlobalBatch
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.names import Schedule
from mmbeam.training import checkpoint
from mmbeam.training.batching import TrainingBatch, collate, make_views, prefetch_batches, training_batches
from mmbeam.training.checkpoint import Journal
from mmbeam.training.distributed import SINGLE, Losses, World
from mmbeam.training.encoders import unsaved_prefixes
from mmbeam.training.examples import ExampleSource
from mmbeam.training.options import TrainOptions
from mmbeam.training.scores import Evaluator, Scores

log = logging.getLogger(__name__)

BETAS = (0.9, 0.98)  # of Adam; 0.98 (Vaswani et al., 2017) adapts faster than 0.999 and so suits short trainings
MOMENTUM = 0.9  # of SGD


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, without weight decay on vectors (biases, norms)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=MOMENTUM)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=options.learning_rate, betas=BETAS)


def warmup_steps(options: TrainOptions, total: int) -> int:
    """Return the number of warmup steps, by default 5 % of `total`."""
    return options.warmup_steps if options.warmup_steps is not None else math.ceil(total / 20)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """Return the learning rate of step `step` (from 0) of `total`, as a fraction of the highest.

    It rises linearly over `warmup` steps, then falls to 0 (cosine, linear) or stays (constant).
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
SUBSETS_PER_BATCH = 8  # samples of a validation batch that are captioned from each subset of their modalities


@dataclass
class State:
    """The progress of a training, kept in the checkpoint."""

    step: int = 0  # completed
    epoch: int = 0  # the current one
    batch: int = 0  # next batch of the epoch
    samples: int = 0  # seen, by all processes
    seconds: float = 0.0  # of training and validation
    best: list[float] | None = None  # the selection scores in order of precedence; higher is better
    best_epoch: int | None = None
    losses: dict[str, float] = field(default_factory=dict)  # summed over the epoch's batches
    max_epoch_steps: int = 0  # number of steps of the longest epoch


class ProgressReporter(Protocol):
    """Displays the progress of a training."""

    def show(self, step: int, steps: int, loss: float, samples: int) -> None:
        """Report a completed step, its loss and its number of samples."""


class Trainer:
    """Trains `model` in place. When `run` returns, the model has its best weights."""

    def __init__(
        self,
        model: FusionModel,
        processor: FusionProcessor,
        source: ExampleSource,
        options: TrainOptions,
        directory: Path,
        *,
        frozen: Sequence[torch.nn.Module] = (),
        reporter: ProgressReporter | None = None,
        world: World = SINGLE,
    ) -> None:
        """Prepare a training.

        `directory` holds the checkpoint and the journal. `frozen` are the modules that are not trained. `source`
        yields the samples of all processes of `world`.
        """
        self.model, self.processor, self.options, self.world = model, processor, options, world
        self.source = source if world.size == 1 else source.of_rank(world.rank, world.size)
        self.batch_size = world.local_batch_size(options.batch_size)
        self.directory, self.reporter, self.device = directory, reporter, model.device
        self.state = State()
        self.journal = Journal(directory)
        self._frozen = list(frozen)
        for part in self._frozen:
            part.requires_grad_(False)
        self.optimizer = make_optimizer(model, options)
        self.steps = total_steps(options, source)
        self._losses = world.parallel(Losses(model))
        self._left_out = unsaved_prefixes(model, options)
        self._weights = partial(checkpoint.model_tensors, model, self._left_out)
        self._saved = time.monotonic()

    def run(self) -> State:
        """Train to the end, from the last checkpoint if one exists. Raises TrainingError."""
        if not self._resume():
            # For dropout and views. The weights were drawn with the seed itself.
            torch.manual_seed(self.options.seed + 1)
            self._save()
        while not self._finished():
            self._epoch()
        self.world.wait()  # until the best weights are written
        if self.state.best_epoch is not None:
            path = self.directory / BEST
            checkpoint.restore_model(self.model, checkpoint.load(path)[0], path, self._left_out)
        self.world.wait()  # until all processes have read them
        return self.state

    def _finished(self) -> bool:
        """Whether the training is complete. It ends only at the end of an epoch."""
        state, options = self.state, self.options
        if state.batch or not state.epoch:
            return False
        epochs_since_best = state.epoch - 1 - (state.best_epoch or 0)
        out_of_patience = options.patience is not None and epochs_since_best >= options.patience
        out_of_epochs = options.steps is None and state.epoch >= options.epochs
        return self._is_last_step or out_of_patience or out_of_epochs

    @property
    def _is_last_step(self) -> bool:
        return self.options.steps is not None and self.state.step >= self.options.steps

    def _epoch(self) -> None:
        """Run the epoch from its next batch, and validate."""
        begin, before = time.monotonic(), self.state.seconds
        with closing(self._batches()) as batches:
            for batch, global_batch in self.world.steps(batches, list(self.model.sources)):
                self._train_batch(batch, global_batch)
                self.state.seconds = before + time.monotonic() - begin
                if self._is_last_step:
                    break
                if time.monotonic() - self._saved >= self.options.checkpoint_seconds:
                    self._save()
        if not self.state.batch:
            raise TrainingError(
                "the training split has no usable samples: each needs a caption and a modality that the model takes"
            )
        scores = Scores(**self.world.from_main(lambda: self._validate().to_json()))
        self.state.seconds = before + time.monotonic() - begin
        self._finish_epoch(scores)

    def _batches(self) -> Generator[TrainingBatch]:
        options, epoch = self.options, self.state.epoch
        make = partial(
            collate, processor=self.processor, device=self.device, max_tokens=self.model.config.max_target_positions
        )

        def batches() -> Iterator[TrainingBatch]:
            examples = self.source.examples("train", epoch)
            seed = (options.seed, epoch, *([self.world.rank] if self.world.size > 1 else []))
            drawn = training_batches(examples, self.batch_size, options.modality_dropout, seed)
            return map(make, islice(drawn, self.state.batch, None))

        return prefetch_batches(batches)

    def _train_batch(self, batch: TrainingBatch | None, global_batch: GlobalBatch) -> None:
        state, options = self.state, self.options
        factor = learning_rate_factor(state.step, self.steps, warmup_steps(options, self.steps), options.schedule)
        set_learning_rate(self.optimizer, options.learning_rate * factor)
        self.world.seed(options.seed, state.step)
        self.model.train()
        for part in self._frozen:
            part.eval()  # leaves its running statistics unchanged too
        loss, losses = self._optimizer_step(batch, global_batch)
        state.step, state.batch = state.step + 1, state.batch + 1
        state.samples += sum(global_batch.rows)
        for name, value in losses.items():
            state.losses[name] = state.losses.get(name, 0.0) + value
        if self.world.is_main:
            self.journal.step(state.step, loss, options.learning_rate * factor)
        if self.reporter is not None and self.world.is_main:
            self.reporter.show(state.step, self.steps, loss, sum(global_batch.rows))

    def _optimizer_step(self, batch: TrainingBatch | None, global_batch: GlobalBatch) -> tuple[float, dict[str, float]]:
        """Run one optimizer step; return the total loss and the losses of the whole batch.

        Raises TrainingError in all processes, before the step, if the loss or the gradient is not finite.
        """
        with self.world.connected():
            norm, values = self._backward(batch, global_batch)
        losses = self.world.mean(values)
        loss = losses.pop("total")
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._stop(loss, losses, norm)
        self.optimizer.step()
        return loss, losses

    def _backward(self, batch: TrainingBatch | None, global_batch: GlobalBatch) -> tuple[float, dict[str, float]]:
        """Return the gradient norm before clipping, and the losses of this process; "total" is their weighted sum."""
        with torch.autocast(
            "cuda", torch.bfloat16, enabled=self.options.mixed_precision and self.device.type == "cuda"
        ):
            loss, losses = self._losses(batch, self._views(batch), global_batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm or math.inf)
        return float(norm), {name: float(value.detach()) for name, value in {**losses, "total": loss}.items()}

    def _views(self, batch: TrainingBatch | None) -> dict[str, torch.Tensor]:
        """Return augmented views of the sources that are aligned with themselves; not needed with groups."""
        names = [a for a, b in self.model.pairs if a == b]
        if batch is None or self.options.group is not None:
            return {}
        return make_views(self.model.sources, names, batch.inputs)

    def _stop(self, loss: float, losses: dict[str, float], norm: float) -> None:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise TrainingError(
            f"step {self.state.step + 1}: expected a finite loss and gradient, found loss {loss:.4g} ({parts}), "
            f"gradient norm {norm:.4g}; {self._recovery_hint}"
        )

    @property
    def _recovery_hint(self) -> str:
        return (
            f"the last good checkpoint is kept in {self.directory / CHECKPOINT}. "
            "Try a lower `learning_rate` or more `warmup_steps`, with another `output` or with `overwrite`"
        )

    def _validate(self) -> Scores:
        examples = islice(self.source.examples("validation"), self.options.validation_samples)
        evaluator = Evaluator(self.model, self.processor, self.device, self.options.batch_size)
        scores = evaluator.scores(examples, SUBSETS_PER_BATCH)
        if not scores.samples:
            raise TrainingError(
                "the validation split has no usable samples: add samples, or raise its fraction in `split_fractions`"
            )
        if not math.isfinite(scores.loss):
            raise TrainingError(f"step {self.state.step}: the validation loss is {scores.loss}; {self._recovery_hint}")
        return scores

    def _finish_epoch(self, scores: Scores) -> None:
        """Record the epoch's scores, save the weights if they are the best so far, and start the next epoch."""
        state = self.state
        value = [scores.exact_match, -scores.loss] if self.options.select == "exact_match" else [-scores.loss]
        if state.best is None or value > state.best:
            state.best, state.best_epoch = value, state.epoch
            if self.world.is_main:
                checkpoint.save(self.directory / BEST, self._weights(), {"epoch": state.epoch, "scores": value})
        losses = {name: total / state.batch for name, total in state.losses.items()}
        if self.world.is_main:
            self.journal.epoch(state.epoch, state.step, state.seconds, losses, scores.to_json())
        log.info("epoch %d, step %d: %s", state.epoch + 1, state.step, summary(scores))
        state.max_epoch_steps = max(state.max_epoch_steps, state.batch)
        state.epoch, state.batch, state.losses = state.epoch + 1, 0, {}
        self.steps = total_steps(self.options, self.source, state.max_epoch_steps)
        self._save()

    def _save(self) -> None:
        if not self.world.is_main:
            return
        tensors = {
            **checkpoint.prefixed("model", self._weights()),
            **checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
            **checkpoint.prefixed("random", checkpoint.random_tensors()),
        }
        checkpoint.save(self.directory / CHECKPOINT, tensors, {**asdict(self.state), "processes": self.world.size})
        self._saved = time.monotonic()

    def _resume(self) -> bool:
        path = self.directory / CHECKPOINT
        if not self.world.from_main(path.exists):
            return False
        tensors, state = checkpoint.load(path)
        if "longest" in state:  # as mmbeam 0.1 called it
            state["max_epoch_steps"] = state.pop("longest")
        self._check_processes(state.pop("processes", 1), state["batch"])
        checkpoint.restore_model(self.model, checkpoint.without_prefix("model", tensors), path, self._left_out)
        checkpoint.restore_optimizer(self.optimizer, checkpoint.without_prefix("optimizer", tensors))
        checkpoint.restore_random(checkpoint.without_prefix("random", tensors))
        self.state = State(**state)
        self.steps = total_steps(self.options, self.source, self.state.max_epoch_steps)
        if self.world.is_main:
            self.journal.cut(self.state.step)
        log.info("resuming after step %d", self.state.step)
        return True

    def _check_processes(self, saved: int, batch: int) -> None:
        """Raise RunMismatchError if the number of processes changed within an epoch, whose samples they partition."""
        if batch and saved != self.world.size:
            raise RunMismatchError(
                f"{self.directory / CHECKPOINT}: expected {saved} processes, found {self.world.size}: the checkpoint "
                f"is from the middle of an epoch. Resume with --nproc-per-node {saved} to the end of the epoch"
            )


def total_steps(options: TrainOptions, source: ExampleSource, max_epoch_steps: int = 0) -> int:
    """Return the number of steps of the training: `steps`, or epochs times batches per epoch.

    With several processes an epoch may have more steps than the number of samples implies. `max_epoch_steps` is the
    number of steps of the longest epoch so far. Raises TrainingError if the number of samples is unknown.
    """
    if options.steps is not None:
        return options.steps
    count = source.count("train")
    if count is None:
        raise TrainingError("number of training samples unknown; pass `steps`")
    return options.epochs * max(max_epoch_steps, math.ceil(count / options.batch_size))


def summary(scores: Scores) -> str:
    """Return the scores as one line."""
    return f"loss {scores.loss:.3f}, exact match {scores.exact_match:.1%}, words right {scores.words_right:.1%}"
