"""The loop that fits a fusion model: steps, a score after every epoch, checkpoints, an end.

It knows nothing of where examples come from, nor of what a model directory holds. A loop that is stopped
anywhere and started again on the same files does exactly what it would have done.
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

from mmbeam.errors import TrainingError
from mmbeam.models.fusion import FusionModel, FusionProcessor
from mmbeam.training import checkpoint
from mmbeam.training.batching import Batch, ahead, collate, training_batches
from mmbeam.training.examples import Source
from mmbeam.training.journal import Journal
from mmbeam.training.optim import learning_rate_factor, make_optimizer, set_learning_rate, warmup_steps
from mmbeam.training.options import TrainOptions
from mmbeam.training.scores import Judge, Scores
from mmbeam.training.views import make_views

log = logging.getLogger(__name__)

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
SUBSETS_PER_BATCH = 8  # samples of a validation batch that are captioned from every subset of their modalities


@dataclass
class State:
    """Where a training is. It is kept in the checkpoint."""

    step: int = 0  # done
    epoch: int = 0  # the one that is going on
    batch: int = 0  # of the epoch, the next one
    samples: int = 0  # seen
    seconds: float = 0.0  # of training and validation
    best: list[float] | None = None  # the scores that are selected by, the first deciding; higher is better
    best_epoch: int | None = None
    losses: dict[str, float] = field(default_factory=dict)  # summed over the epoch's batches


class Watcher(Protocol):
    """Whoever shows how far a training is."""

    def show(self, step: int, steps: int, loss: float, samples: int) -> None: ...


class Trainer:
    """Fits `model` in place; when `run` returns, it has its best weights."""

    def __init__(
        self,
        model: FusionModel,
        processor: FusionProcessor,
        source: Source,
        options: TrainOptions,
        directory: Path,
        *,
        frozen: Sequence[torch.nn.Module] = (),
        watcher: Watcher | None = None,
    ) -> None:
        """`directory` is for the checkpoint and the journal; `frozen` are the parts of the model that do not learn."""
        self.model, self.processor, self.source, self.options = model, processor, source, options
        self.directory, self.watcher = directory, watcher
        self.device = model.device
        self.state = State()
        self.journal = Journal(directory)
        self._frozen = list(frozen)
        for part in self._frozen:
            part.requires_grad_(False)
        self.optimizer = make_optimizer(model, options)
        self.steps = total_steps(options, source)
        self._saved = time.monotonic()

    def run(self) -> State:
        """Train to the end, from the last checkpoint if there is one. Raises TrainingError."""
        if not self._resume():
            torch.manual_seed(self.options.seed + 1)  # of dropout and views; the weights were drawn with the seed
            self._save()
        while not self._finished():
            self._epoch()
        if self.state.best_epoch is not None:
            self.model.load_state_dict(checkpoint.load(self.directory / BEST)[0])
        return self.state

    def _finished(self) -> bool:
        """Whether an epoch has ended the training."""
        state, options = self.state, self.options
        if state.batch or not state.epoch:
            return False
        since = state.epoch - 1 - (state.best_epoch or 0)
        out_of_patience = options.patience is not None and since >= options.patience
        out_of_epochs = options.steps is None and state.epoch >= options.epochs
        return state.step >= self.steps or out_of_epochs or out_of_patience

    def _epoch(self) -> None:
        """The rest of an epoch, and its score."""
        begin, before = time.monotonic(), self.state.seconds
        with closing(self._batches()) as batches:
            for batch in batches:
                self._step(batch)
                self.state.seconds = before + time.monotonic() - begin
                if self.state.step >= self.steps:
                    break
                if time.monotonic() - self._saved >= self.options.checkpoint_seconds:
                    self._save()
        if not self.state.batch:
            raise TrainingError("the training part gave no samples: none has a caption and a modality of the model's")
        scores = self._validate()
        self.state.seconds = before + time.monotonic() - begin
        self._close(scores)

    def _batches(self) -> Generator[Batch]:
        options, epoch = self.options, self.state.epoch
        make = partial(
            collate, processor=self.processor, device=self.device, max_tokens=self.model.config.max_target_positions
        )

        def batches() -> Iterator[Batch]:
            examples = self.source.examples("train", epoch)
            drawn = training_batches(examples, options.batch_size, options.modality_dropout, (options.seed, epoch))
            return map(make, islice(drawn, self.state.batch, None))

        return ahead(batches)

    def _step(self, batch: Batch) -> None:
        state, options = self.state, self.options
        factor = learning_rate_factor(state.step, self.steps, warmup_steps(options, self.steps), options.schedule)
        set_learning_rate(self.optimizer, options.learning_rate * factor)
        self.model.train()
        for part in self._frozen:
            part.eval()  # its running statistics stay too
        loss, losses = self._learn(batch)
        state.step, state.batch = state.step + 1, state.batch + 1
        state.samples += len(batch.examples)
        for name, value in losses.items():
            state.losses[name] = state.losses.get(name, 0.0) + value
        self.journal.step(state.step, loss, options.learning_rate * factor)
        if self.watcher is not None:
            self.watcher.show(state.step, self.steps, loss, len(batch.examples))

    def _learn(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """One step of the optimizer. Raises TrainingError, before it, if loss or gradient is no finite number."""
        with torch.autocast(
            "cuda", torch.bfloat16, enabled=self.options.mixed_precision and self.device.type == "cuda"
        ):
            output = self.model(labels=batch.labels, groups=batch.groups, views=self._views(batch), **batch.inputs)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm or math.inf)
        losses = {name: float(value.detach()) for name, value in output.losses.items()}
        loss = float(output.loss.detach())
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            self._stop(loss, losses, float(norm))
        self.optimizer.step()
        return loss, losses

    def _views(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Other views of the sources that are aligned with themselves; samples that have groups need none."""
        names = [a for a, b in self.model.pairs if a == b]
        return {} if self.options.group is not None else make_views(self.model.sources, names, batch.inputs)

    def _stop(self, loss: float, losses: dict[str, float], norm: float) -> None:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise TrainingError(
            f"step {self.state.step + 1}: the loss is {loss:.4g} ({parts}), the gradient's norm {norm:.4g}: expected "
            f"finite numbers; {self._kept}"
        )

    @property
    def _kept(self) -> str:
        return (
            f"the last good checkpoint is kept in {self.directory / CHECKPOINT}. "
            "Try a lower --learning-rate or a longer --warmup-steps, on another --output or with --overwrite"
        )

    def _validate(self) -> Scores:
        examples = islice(self.source.examples("validation"), self.options.validation_samples)
        judge = Judge(
            model=self.model, processor=self.processor, device=self.device, batch_size=self.options.batch_size
        )
        scores = judge.scores(examples, SUBSETS_PER_BATCH)
        if not scores.samples:
            raise TrainingError("the validation part gave no samples: give more, or a larger share with --split")
        if not math.isfinite(scores.loss):
            raise TrainingError(
                f"step {self.state.step}: the loss on the validation part is {scores.loss}; {self._kept}"
            )
        return scores

    def _close(self, scores: Scores) -> None:
        """Write down the epoch's scores, keep its weights if they are the best, and begin the next."""
        state = self.state
        value = [scores.exact_match, -scores.loss] if self.options.select == "exact_match" else [-scores.loss]
        if state.best is None or value > state.best:
            state.best, state.best_epoch = value, state.epoch
            checkpoint.save(self.directory / BEST, self.model.state_dict(), {"epoch": state.epoch, "scores": value})
        losses = {name: total / state.batch for name, total in state.losses.items()}
        self.journal.epoch(state.epoch, state.step, state.seconds, losses, scores.to_json())
        log.info("epoch %d, step %d: %s", state.epoch + 1, state.step, summary(scores))
        state.epoch, state.batch, state.losses = state.epoch + 1, 0, {}
        self._save()

    def _save(self) -> None:
        tensors = {
            **checkpoint.prefixed("model", self.model.state_dict()),
            **checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
            **checkpoint.prefixed("random", checkpoint.random_tensors()),
        }
        checkpoint.save(self.directory / CHECKPOINT, tensors, asdict(self.state))
        self._saved = time.monotonic()

    def _resume(self) -> bool:
        path = self.directory / CHECKPOINT
        if not path.exists():
            return False
        tensors, facts = checkpoint.load(path)
        self.model.load_state_dict(checkpoint.under("model", tensors))
        checkpoint.restore_optimizer(self.optimizer, checkpoint.under("optimizer", tensors))
        checkpoint.restore_random(checkpoint.under("random", tensors))
        self.state = State(**facts)
        self.journal.cut(self.state.step)
        log.info("going on after step %d", self.state.step)
        return True


def total_steps(options: TrainOptions, source: Source) -> int:
    """How many steps there will be: as asked for, or so many epochs of so many batches."""
    if options.steps is not None:
        return options.steps
    count = source.count("train")
    if count is None:
        raise TrainingError("nobody has counted the training samples; say how many --steps to train")
    return options.epochs * math.ceil(count / options.batch_size)


def summary(scores: Scores) -> str:
    """The scores in a line."""
    return f"loss {scores.loss:.3f}, exact match {scores.exact_match:.1%}, words right {scores.words_right:.1%}"
