"""What test_training_distributed.py has two processes do together: `torchrun two_processes.py DIRECTORY`.

Each writes what it found to DIRECTORY/<rank>.json; the test compares.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tiny_fusion import media, tiny_inputs, tiny_labels, tiny_model

from mmbeam.corpus.scene import generate_scenes, tag
from mmbeam.errors import ShardError
from mmbeam.models.fusion import FusionConfig, FusionModel, FusionProcessor
from mmbeam.models.fusion.objectives import GlobalBatch
from mmbeam.names import Split
from mmbeam.prompts.ask import Request
from mmbeam.training.batching import TrainingBatch
from mmbeam.training.distributed import ALONE, Losses, World, joined, local_device
from mmbeam.training.examples import Example
from mmbeam.training.fit import Trainer
from mmbeam.training.options import TrainOptions
from mmbeam.training.setup import Setup, new_model
from mmbeam.training.sources import CorpusSource
from mmbeam.training.train import Span, search

CPU = torch.device("cpu")
PAIRS = [["image", "text"], ["image", "fused"], ["text", "caption"], ["text", "text"]]
WEIGHTS = {"align": 0.5, "reconstruct": 0.5, "modality_adversary": 0.1}
SPLITS = {"uneven": (3, 2), "one has nothing": (5, 0)}  # of five samples


# Losses and gradients


def whole_batch(model: FusionModel) -> tuple[TrainingBatch, dict[str, torch.Tensor]]:
    """Five samples, some of a group, some without a picture (the last two) or a sound; and other views of the texts."""
    inputs, labels = tiny_inputs(model, 5), tiny_labels(5)
    inputs["image_mask"][3:] = False
    inputs["audio_mask"][[0, 4]] = False
    other = tiny_inputs(model, 5, seed=1)
    views = {name: other[name] for name in ("text", "text_mask")}
    examples = [Example(key="", caption="", present=frozenset(), request=lambda _: Request())] * 5
    return TrainingBatch(
        inputs=inputs, labels=labels, groups=torch.tensor([7, -1, 7, -1, -1]), examples=examples
    ), views


def part(batch: TrainingBatch, begin: int, end: int) -> TrainingBatch | None:
    """The samples [begin, end), their captions no longer than they need be; None if there are none."""
    if begin == end:
        return None
    labels = batch.labels[begin:end]
    labels = labels[:, (labels != -100).any(0)]
    assert batch.groups is not None
    inputs = {name: values[begin:end] for name, values in batch.inputs.items()}
    return TrainingBatch(
        inputs=inputs, labels=labels, groups=batch.groups[begin:end], examples=batch.examples[begin:end]
    )


def differentiated(world: World, split: tuple[int, ...], weights: Mapping[str, float]) -> dict[str, Any]:
    """The losses on the batch, of which each process has its part, and sum and norm of the gradients."""
    weights = {"caption": 1.0, **weights}
    options = {"pairs": PAIRS, "similarities": ["cosine", "bilinear"], "loss_weights": weights, "dropout": 0.0}
    model = tiny_model(media("mlp", text="transformer"), **options)  # without batch norm
    batch, views = whole_batch(model)
    end = sum(split[: world.rank + 1])
    own, begin = part(batch, end - split[world.rank], end), end - split[world.rank]
    losses = world.parallel(Losses(model.train()))
    (got, share), *_ = world.steps([own] if own else [], list(model.sources))
    total, each = losses(got, {name: values[begin:end] for name, values in views.items()} if own else {}, share)
    total.backward()
    return {
        "losses": world.mean({"sum": total.item(), **{name: value.item() for name, value in each.items()}}),
        "gradients": {
            name: [value.grad.sum().item(), value.grad.norm().item()]
            for name, value in model.named_parameters()
            if value.grad is not None
        },
    }


# Trainings


@dataclass(frozen=True)
class Lopsided:
    """The corpus without its pictures; rank 0 has the first `first` samples of an epoch, the other the rest."""

    size: int = 21
    first: int = 6
    measured: int = 4
    rank: int | None = None  # None: there is one process
    broken: int | None = None  # rank 1 finds its shard cut off after this number of samples

    def corpus(self) -> CorpusSource:
        return CorpusSource(seed=0, epoch_size=self.size, evaluation_size=self.measured)

    def count(self, part: Split) -> int | None:
        return self.corpus().count(part)

    def of_rank(self, rank: int, world_size: int) -> "Lopsided":
        return replace(self, rank=rank)

    def examples(self, part: Split, epoch: int = 0) -> Iterator[Example]:
        first, last = {None: (0, None), 0: (0, self.first), 1: (self.first, None)}[self.rank]
        whole = self.corpus().examples(part, epoch)
        for number, each in enumerate(islice(whole, first, last) if part == "train" else whole):
            if (self.rank, number) == (1, self.broken):
                raise ShardError("torn.tar: ends in the middle of a member")
            yield each.keeping(("audio", "text"))


@cache
def make_setup(source: Lopsided) -> Setup:
    """A tiny model of texts and sounds."""
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_size": 64, "fusion_layers": 1, "generator_layers": 1}
    config = FusionConfig.for_media(("audio", "text"), kinds={"audio": "mlp"}, **sizes)
    texts = [text for scene in generate_scenes(9, count=60) for text in (scene.caption(), tag(scene))]
    processor = FusionProcessor.fit(config.parsed_sources(), texts, 300)
    config.vocab_size = processor.vocab_size
    return Setup(config=config, processor=processor, source=source, facts={})


class HaltError(Exception):
    """Stopped at the same step in both processes."""


class Recorder(Trainer):
    """A trainer that writes down what it learned from, and to which something happens after a step."""

    halt: int | None = None
    spoil: int | None = None  # rank 0's weights
    die: int | None = None  # rank 1

    def _step(self, batch: TrainingBatch | None, share: GlobalBatch) -> None:
        self.keys = [*getattr(self, "keys", []), *(each.key for each in (batch.examples if batch else ()))]
        super()._step(batch, share)
        if self.state.step == self.spoil and self.world.is_main:
            with torch.no_grad():
                self.model.words.weight[5] = torch.nan
        if self.state.step == self.die and not self.world.is_main:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.state.step == self.halt:
            raise HaltError


def options(directory: Path, **changed: Any) -> TrainOptions:
    base = TrainOptions(input=("corpus",), output=str(directory), batch_size=8, epochs=3, patience=None, device="cpu")
    return replace(base, **changed)


def trainer(source: Lopsided, directory: Path, world: World = ALONE, **changed: Any) -> Recorder:
    directory.mkdir(exist_ok=True, parents=True)
    setup, chosen = make_setup(source), options(directory, **changed)
    model, _ = new_model(chosen, setup, CPU)
    return Recorder(model, setup.processor, source, chosen, directory, world=world)


def facts(run: Recorder) -> dict[str, Any]:
    """Where a training ended, what it saw, and numbers that tell its weights from others."""
    weights = {name: value.double().norm().item() for name, value in run.model.state_dict().items()}
    return {"state": asdict(run.state) | {"seconds": 0}, "keys": run.keys, "steps": run.steps, "weights": weights}


def trained(directory: Path, world: World) -> dict[str, Any]:
    run = trainer(Lopsided(), directory, world)
    run.run()
    return facts(run)


def halted(directory: Path, world: World) -> None:
    """Stop in the second epoch, which has four steps; there is a checkpoint after each."""
    run = trainer(Lopsided(), directory, world, checkpoint_seconds=0.0)
    run.halt = 6
    raised(run.run)


def raised(action: Callable[[], Any]) -> str:
    """The class and the message of what it raises."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def spoiled(directory: Path, world: World) -> str:
    """Some of rank 0's weights are no numbers after the first step."""
    run = trainer(Lopsided(), directory, world)
    run.spoil = 1
    return raised(run.run)


def killed(directory: Path, world: World) -> str:
    """Rank 1 dies in the second epoch; what that is to rank 0."""
    run = trainer(Lopsided(), directory, world)
    run.die = 6
    return raised(run.run)


def searched(directory: Path, world: World) -> float:
    directory.mkdir(exist_ok=True)
    asked = options(directory, search=2, search_steps=2)
    space = {"learning_rate": Span(4e-3, 6e-3)}
    return search(make_setup(Lopsided()), asked, directory, CPU, space=space, world=world).learning_rate


def main(out: Path, world: World) -> None:
    found: dict[str, Any] = {name: differentiated(world, split, WEIGHTS) for name, split in SPLITS.items()}
    found["adversary"] = differentiated(world, (3, 2), {"generator_adversary": 0.1})
    found["trained"] = trained(out / "trained", world)
    halted(out / "halted", world)
    found["resumed"] = trained(out / "halted", world)
    halted(out / "left", world)
    early = trainer(Lopsided(), out / "early", world, patience=1, learning_rate=0.0, weight_decay=0.0)
    found["early"] = early.run().epoch
    found["spoiled"] = spoiled(out / "spoiled", world)
    found["torn"] = raised(trainer(Lopsided(broken=5), out / "torn", world).run)
    found["not measured"] = raised(trainer(Lopsided(measured=0), out / "not", world).run)
    found["search"] = searched(out / "search", world)
    found["odd"] = raised(lambda: trainer(Lopsided(), out / "odd", world, batch_size=9))
    report = out / f"{world.rank}.json"
    report.write_text(json.dumps(found))
    found["killed"] = killed(out / "killed", world)
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    with joined(local_device("cpu")) as both:
        main(Path(sys.argv[1]), both)
