"""The loop that fits a fusion model: steps, a score after every epoch, checkpoints, an end.

It knows nothing of where examples come from, nor of what a model directory holds. A loop that is stopped
anywhere and started again on the same files does exactly what it would have done. In several processes each
runs it, in step with the others; rank 0 alone measures and writes.
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
from mmbeam.training import checkpoint
from mmbeam.training.batching import TrainingBatch, collate, make_views, prefetch, training_batches
from mmbeam.training.checkpoint import Journal
from mmbeam.training.distributed import ALONE, Losses, World
from mmbeam.training.encoders import unsaved_prefixes
from mmbeam.training.examples import ExampleSource
from mmbeam.training.options import Schedule, TrainOptions
from mmbeam.training.scores import Evaluator, Scores

log = logging.getLogger(__name__)

BETAS = (0.9, 0.98)  # of Adam; the second as in Vaswani et al. 2017: quick to follow a short training
MOMENTUM = 0.9  # of SGD


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are to learn; biases, norms and other vectors do not decay."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=MOMENTUM)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=options.learning_rate, betas=BETAS)


def warmup_steps(options: TrainOptions, total: int) -> int:
    """How many steps the learning rate rises."""
    return options.warmup_steps if options.warmup_steps is not None else math.ceil(total / 20)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """What part of the highest learning rate step `step` (from 0) of `total` has.

    It rises linearly over `warmup` steps, then falls to 0 along half a cosine or a line, or stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
SUBSETS_PER_BATCH = 8  # samples of a validation batch that are captioned from every subset of their modalities


@dataclass
class State:
    """Where a training is. It is kept in the checkpoint."""

    step: int = 0  # done
    epoch: int = 0  # the one that is going on
    batch: int = 0  # of the epoch, the next one
    samples: int = 0  # seen, by all processes
    seconds: float = 0.0  # of training and validation
    best: list[float] | None = None  # the scores that are selected by, the first deciding; higher is better
    best_epoch: int | None = None
    losses: dict[str, float] = field(default_factory=dict)  # summed over the epoch's batches
    longest: int = 0  # steps of the longest epoch so far


class ProgressReporter(Protocol):
    """Whoever shows how far a training is."""

    def show(self, step: int, steps: int, loss: float, samples: int) -> None: ...


class Trainer:
    """Fits `model` in place; when `run` returns, it has its best weights."""

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
        world: World = ALONE,
    ) -> None:
        """`directory` is for the checkpoint and the journal; `frozen` are the parts of the model that do not learn.

        `source` is whole: of a `world` of several processes each takes its own share of it.
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
        """Train to the end, from the last checkpoint if there is one. Raises TrainingError."""
        if not self._resume():
            torch.manual_seed(self.options.seed + 1)  # of dropout and views; the weights were drawn with the seed
            self._save()
        while not self._finished():
            self._epoch()
        self.world.wait()  # until the best weights are written
        if self.state.best_epoch is not None:
            path = self.directory / BEST
            checkpoint.restore_model(self.model, checkpoint.load(path)[0], path, self._left_out)
        self.world.wait()  # and until all have read them
        return self.state

    def _finished(self) -> bool:
        """Whether an epoch has ended the training."""
        state, options = self.state, self.options
        if state.batch or not state.epoch:
            return False
        since = state.epoch - 1 - (state.best_epoch or 0)
        out_of_patience = options.patience is not None and since >= options.patience
        return self._out_of_steps or out_of_patience or (options.steps is None and state.epoch >= options.epochs)

    @property
    def _out_of_steps(self) -> bool:
        return self.options.steps is not None and self.state.step >= self.options.steps

    def _epoch(self) -> None:
        """The rest of an epoch, and its score."""
        begin, before = time.monotonic(), self.state.seconds
        with closing(self._batches()) as batches:
            for batch, share in self.world.steps(batches, list(self.model.sources)):
                self._step(batch, share)
                self.state.seconds = before + time.monotonic() - begin
                if self._out_of_steps:
                    break
                if time.monotonic() - self._saved >= self.options.checkpoint_seconds:
                    self._save()
        if not self.state.batch:
            raise TrainingError("the training part gave no samples: none has a caption and a modality of the model's")
        scores = Scores(**self.world.from_main(lambda: self._validate().to_json()))
        self.state.seconds = before + time.monotonic() - begin
        self._close(scores)

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

        return prefetch(batches)

    def _step(self, batch: TrainingBatch | None, share: GlobalBatch) -> None:
        state, options = self.state, self.options
        factor = learning_rate_factor(state.step, self.steps, warmup_steps(options, self.steps), options.schedule)
        set_learning_rate(self.optimizer, options.learning_rate * factor)
        self.world.seed(options.seed, state.step)
        self.model.train()
        for part in self._frozen:
            part.eval()  # its running statistics stay too
        loss, losses = self._learn(batch, share)
        state.step, state.batch = state.step + 1, state.batch + 1
        state.samples += sum(share.rows)
        for name, value in losses.items():
            state.losses[name] = state.losses.get(name, 0.0) + value
        if self.world.is_main:
            self.journal.step(state.step, loss, options.learning_rate * factor)
        if self.reporter is not None and self.world.is_main:
            self.reporter.show(state.step, self.steps, loss, sum(share.rows))

    def _learn(self, batch: TrainingBatch | None, share: GlobalBatch) -> tuple[float, dict[str, float]]:
        """One step of the optimizer; the losses of the whole batch.

        Raises TrainingError before it, in all processes, if loss or gradient is no finite number.
        """
        with self.world.connected():
            norm, values = self._differentiate(batch, share)
        losses = self.world.mean(values)
        loss = losses.pop("")
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._stop(loss, losses, norm)
        self.optimizer.step()
        return loss, losses

    def _differentiate(self, batch: TrainingBatch | None, share: GlobalBatch) -> tuple[float, dict[str, float]]:
        """The norm that the gradients had before they were clipped, and this process's losses; "" is their sum."""
        with torch.autocast(
            "cuda", torch.bfloat16, enabled=self.options.mixed_precision and self.device.type == "cuda"
        ):
            loss, losses = self._losses(batch, self._views(batch), share)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm or math.inf)
        return float(norm), {name: float(value.detach()) for name, value in {**losses, "": loss}.items()}

    def _views(self, batch: TrainingBatch | None) -> dict[str, torch.Tensor]:
        """Other views of the sources that are aligned with themselves; samples that have groups need none."""
        names = [a for a, b in self.model.pairs if a == b]
        if batch is None or self.options.group is not None:
            return {}
        return make_views(self.model.sources, names, batch.inputs)

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
        evaluator = Evaluator(self.model, self.processor, self.device, self.options.batch_size)
        scores = evaluator.scores(examples, SUBSETS_PER_BATCH)
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
            if self.world.is_main:
                checkpoint.save(self.directory / BEST, self._weights(), {"epoch": state.epoch, "scores": value})
        losses = {name: total / state.batch for name, total in state.losses.items()}
        if self.world.is_main:
            self.journal.epoch(state.epoch, state.step, state.seconds, losses, scores.to_json())
        log.info("epoch %d, step %d: %s", state.epoch + 1, state.step, summary(scores))
        state.longest = max(state.longest, state.batch)
        state.epoch, state.batch, state.losses = state.epoch + 1, 0, {}
        self.steps = total_steps(self.options, self.source, state.longest)
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
        tensors, facts = checkpoint.load(path)
        self._check_processes(facts.pop("processes", 1), facts["batch"])
        checkpoint.restore_model(self.model, checkpoint.without_prefix("model", tensors), path, self._left_out)
        checkpoint.restore_optimizer(self.optimizer, checkpoint.without_prefix("optimizer", tensors))
        checkpoint.restore_random(checkpoint.without_prefix("random", tensors))
        self.state = State(**facts)
        self.steps = total_steps(self.options, self.source, self.state.longest)
        if self.world.is_main:
            self.journal.cut(self.state.step)
        log.info("going on after step %d", self.state.step)
        return True

    def _check_processes(self, then: int, batch: int) -> None:
        """Between epochs any number of processes can go on; in one, only those that have their shares of its rows."""
        if batch and then != self.world.size:
            raise RunMismatchError(
                f"{self.directory / CHECKPOINT}: was written in the middle of an epoch whose samples {then} processes "
                f"share, and here are {self.world.size}. Go on with --nproc-per-node {then} to the end of an epoch"
            )


def total_steps(options: TrainOptions, source: ExampleSource, longest: int = 0) -> int:
    """How many steps there will be: as asked for, or so many epochs of so many batches.

    Processes whose shares of the samples differ need more steps than one would: as many as the longest epoch had.
    """
    if options.steps is not None:
        return options.steps
    count = source.count("train")
    if count is None:
        raise TrainingError("nobody has counted the training samples; say how many --steps to train")
    return options.epochs * max(longest, math.ceil(count / options.batch_size))


def summary(scores: Scores) -> str:
    """The scores in a line."""
    return f"loss {scores.loss:.3f}, exact match {scores.exact_match:.1%}, words right {scores.words_right:.1%}"
