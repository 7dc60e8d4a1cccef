"""The program of test_training_distributed.py: `torchrun --nproc-per-node 2 two_processes.py DIRECTORY`.

Each process writes its results to DIRECTORY/<rank>.json, which the test compares.
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
from mmbeam.training.distributed import SINGLE, Losses, World, joined, local_device
from mmbeam.training.examples import Example
from mmbeam.training.fit import Trainer
from mmbeam.training.options import TrainOptions
from mmbeam.training.setup import Setup, new_model
from mmbeam.training.sources import CorpusSource
from mmbeam.training.train import Span, search

CPU = torch.device("cpu")
PAIRS = [["image", "text"], ["image", "fused"], ["text", "caption"], ["text", "text"]]
WEIGHTS = {"align": 0.5, "reconstruct": 0.5, "modality_adversary": 0.1}
SPLITS = {"uneven": (3, 2), "one empty": (5, 0)}  # of five samples


# Losses and gradients


def whole_batch(model: FusionModel) -> tuple[TrainingBatch, dict[str, torch.Tensor]]:
    """Return five samples, some in a group, some without an image (the last two) or audio, and views of the texts."""
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
    """Return the samples [begin, end) with labels cut to the longest; None if the range is empty."""
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
    """Return the losses on a batch split over the processes, and the sum and norm of the gradients."""
    weights = {"caption": 1.0, **weights}
    options = {"pairs": PAIRS, "similarities": ["cosine", "bilinear"], "loss_weights": weights, "dropout": 0.0}
    model = tiny_model(media("mlp", text="transformer"), **options)  # without batch norm
    batch, views = whole_batch(model)
    end = sum(split[: world.rank + 1])
    begin = end - split[world.rank]
    own_part = part(batch, begin, end)
    losses = world.parallel(Losses(model.train()))
    (got, share), *_ = world.steps([own_part] if own_part else [], list(model.sources))
    part_views = {name: values[begin:end] for name, values in views.items()} if own_part else {}
    total, terms = losses(got, part_views, share)
    total.backward()
    return {
        "losses": world.mean({"sum": total.item(), **{name: value.item() for name, value in terms.items()}}),
        "gradients": {
            name: [value.grad.sum().item(), value.grad.norm().item()]
            for name, value in model.named_parameters()
            if value.grad is not None
        },
    }


# Trainings


@dataclass(frozen=True)
class Lopsided:
    """The corpus without images; rank 0 has the first `first` samples of an epoch, rank 1 the rest."""

    size: int = 21
    first: int = 6
    measured: int = 4
    rank: int | None = None  # None: a single process
    broken: int | None = None  # the shard of rank 1 is truncated after this number of samples

    def corpus(self) -> CorpusSource:
        return CorpusSource(seed=0, epoch_size=self.size, evaluation_size=self.measured)

    def count(self, part: Split) -> int | None:
        return self.corpus().count(part)

    def of_rank(self, rank: int, world_size: int) -> "Lopsided":
        return replace(self, rank=rank)

    def examples(self, part: Split, epoch: int = 0) -> Iterator[Example]:
        first, last = {None: (0, None), 0: (0, self.first), 1: (self.first, None)}[self.rank]
        whole = self.corpus().examples(part, epoch)
        for number, example in enumerate(islice(whole, first, last) if part == "train" else whole):
            if (self.rank, number) == (1, self.broken):
                raise ShardError("truncated.tar: ends in the middle of a member")
            yield example.keeping(("audio", "text"))


@cache
def make_setup(source: Lopsided) -> Setup:
    """Set up a tiny model of text and audio."""
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_size": 64, "fusion_layers": 1, "generator_layers": 1}
    config = FusionConfig.for_media(("audio", "text"), kinds={"audio": "mlp"}, **sizes)
    texts = [text for scene in generate_scenes(9, count=60) for text in (scene.caption(), tag(scene))]
    processor = FusionProcessor.fit(config.parsed_sources(), texts, 300)
    config.vocab_size = processor.vocab_size
    return Setup(config=config, processor=processor, source=source, sample_counts={})


class HaltError(Exception):
    """Raised at the same step in both processes."""


class Recorder(Trainer):
    """A trainer that records the keys of its samples, and that stops, spoils its weights or dies after a step."""

    halt: int | None = None
    spoil: int | None = None  # sets a weight of rank 0 to NaN
    die: int | None = None  # kills rank 1

    def _train_batch(self, batch: TrainingBatch | None, global_batch: GlobalBatch) -> None:
        self.keys = [*getattr(self, "keys", []), *(example.key for example in (batch.examples if batch else ()))]
        super()._train_batch(batch, global_batch)
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


def trainer(source: Lopsided, directory: Path, world: World = SINGLE, **changed: Any) -> Recorder:
    directory.mkdir(exist_ok=True, parents=True)
    setup, chosen = make_setup(source), options(directory, **changed)
    model, _ = new_model(chosen, setup, CPU)
    return Recorder(model, setup.processor, source, chosen, directory, world=world)


def facts(run: Recorder) -> dict[str, Any]:
    """Return the final state of a training, the keys of its samples, and the norms of its weights."""
    weights = {name: value.double().norm().item() for name, value in run.model.state_dict().items()}
    return {"state": asdict(run.state) | {"seconds": 0}, "keys": run.keys, "steps": run.steps, "weights": weights}


def trained(directory: Path, world: World) -> dict[str, Any]:
    run = trainer(Lopsided(), directory, world)
    run.run()
    return facts(run)


def halted(directory: Path, world: World) -> None:
    """Stop within the second epoch, with a checkpoint after each step. An epoch has four steps."""
    run = trainer(Lopsided(), directory, world, checkpoint_seconds=0.0)
    run.halt = 6
    raised(run.run)


def raised(action: Callable[[], Any]) -> str:
    """Return the class and message of the exception that `action` raises."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def spoiled(directory: Path, world: World) -> str:
    """Set a weight of rank 0 to NaN after the first step."""
    run = trainer(Lopsided(), directory, world)
    run.spoil = 1
    return raised(run.run)


def killed(directory: Path, world: World) -> str:
    """Kill rank 1 in the second epoch; return the error in rank 0."""
    run = trainer(Lopsided(), directory, world)
    run.die = 6
    return raised(run.run)


def searched(directory: Path, world: World) -> float:
    directory.mkdir(exist_ok=True)
    chosen = options(directory, search=2, search_steps=2)
    space = {"learning_rate": Span(4e-3, 6e-3)}
    return search(make_setup(Lopsided()), chosen, directory, CPU, space=space, world=world).learning_rate


def main(out: Path, world: World) -> None:
    results: dict[str, Any] = {name: differentiated(world, split, WEIGHTS) for name, split in SPLITS.items()}
    results["adversary"] = differentiated(world, (3, 2), {"generator_adversary": 0.1})
    results["trained"] = trained(out / "trained", world)
    halted(out / "halted", world)
    results["resumed"] = trained(out / "halted", world)
    halted(out / "left", world)
    early = trainer(Lopsided(), out / "early", world, patience=1, learning_rate=0.0, weight_decay=0.0)
    results["early"] = early.run().epoch
    results["spoiled"] = spoiled(out / "spoiled", world)
    results["truncated"] = raised(trainer(Lopsided(broken=5), out / "truncated", world).run)
    results["no validation"] = raised(trainer(Lopsided(measured=0), out / "no validation", world).run)
    results["search"] = searched(out / "search", world)
    results["odd"] = raised(lambda: trainer(Lopsided(), out / "odd", world, batch_size=9))
    report = out / f"{world.rank}.json"
    report.write_text(json.dumps(results))
    results["killed"] = killed(out / "killed", world)
    report.write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(local_device("cpu")) as world_of_two:
        main(Path(sys.argv[1]), world_of_two)
