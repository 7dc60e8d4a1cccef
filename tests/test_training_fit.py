"""Trainings on the corpus: convergence, interruption, early stopping, invalid losses and searches."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmbeam.corpus.scene import generate_scenes, tag
from mmbeam.errors import TrainingError
from mmbeam.models.fusion import FusionConfig, FusionProcessor
from mmbeam.names import Split
from mmbeam.training.examples import Example, ExampleSource
from mmbeam.training.fit import CHECKPOINT, State, Trainer
from mmbeam.training.options import TrainOptions
from mmbeam.training.scores import SUBSETS
from mmbeam.training.setup import Setup, new_model
from mmbeam.training.sources import CorpusSource
from mmbeam.training.train import Span, search
from pipelines.train_shipped import shipped_options, train_shipped

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "ffn_size": 64, "fusion_layers": 1, "generator_layers": 1}


@pytest.fixture(scope="module")
def setup() -> Setup:
    """A tiny model of texts and sounds on the corpus."""
    config = FusionConfig.for_media(("audio", "text"), kinds={"audio": "mlp"}, **TINY)
    texts = [text for scene in generate_scenes(9, count=300) for text in (scene.caption(), tag(scene))]
    processor = FusionProcessor.fit(config.parsed_sources(), texts, 400)
    config.vocab_size = processor.vocab_size
    return Setup(config=config, processor=processor, source=TwoModalities(), sample_counts={})


class TwoModalities:
    """The corpus without its pictures."""

    def __init__(self, epoch_size: int = 80) -> None:
        self._corpus = CorpusSource(seed=0, epoch_size=epoch_size, evaluation_size=24)

    def count(self, part: Split) -> int | None:
        return self._corpus.count(part)

    def of_rank(self, rank: int, world_size: int) -> ExampleSource:
        return self  # these tests train in one process

    def examples(self, part: Split, epoch: int = 0) -> Iterator[Example]:
        return (example.keeping(("audio", "text")) for example in self._corpus.examples(part, epoch))


def options(output: Path, **changed: Any) -> TrainOptions:
    base = TrainOptions(input=("corpus",), output=str(output), batch_size=8, validation_samples=8, device="cpu")
    return replace(base, **changed)


def trainer(setup: Setup, directory: Path, reporter: Any = None, **changed: Any) -> Trainer:
    directory.mkdir(exist_ok=True, parents=True)
    chosen = options(directory, **changed)
    model, frozen = new_model(chosen, setup, CPU)
    return Trainer(model, setup.processor, setup.source, chosen, directory, frozen=frozen, reporter=reporter)


class Stop:
    """Interrupts the training after `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def show(self, step: int, steps: int, loss: float, samples: int) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def test_sixty_steps_make_the_loss_fall_and_the_best_weights_are_kept(setup: Setup, tmp_path: Path) -> None:
    longer = replace(setup, source=TwoModalities(320))
    run = trainer(longer, tmp_path, steps=60, learning_rate=5e-3, batch_size=16, select="exact_match")
    state = run.run()
    lines = run.journal.lines()
    losses = [line["loss"] for line in lines if "loss" in line]
    epochs = [line for line in lines if "epoch" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert (state.step, state.epoch, state.samples) == (60, 3, 960)
    assert state.best_epoch == 2  # no caption is correct yet, so the loss decides
    assert epochs[-1]["validation"]["loss"] < 0.8 * epochs[0]["validation"]["loss"]
    assert set(epochs[-1]["validation"]["subsets"]) == {"audio", "text"}
    assert "text->caption cosine" in epochs[-1]["validation"]["recall"]
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(best[name], weight) for name, weight in run.model.state_dict().items())


@pytest.mark.parametrize(("stop", "checkpoint_seconds"), [(7, 0.0), (17, 300.0)])
def test_an_interrupted_training_ends_with_the_same_weights(
    stop: int, checkpoint_seconds: float, setup: Setup, tmp_path: Path
) -> None:
    """Stop within the first epoch, at a checkpoint; and in the second, seven steps after a checkpoint."""
    torch.manual_seed(123)
    whole = trainer(setup, tmp_path / "whole", steps=25, patience=None)
    whole.run()
    changed: dict[str, Any] = {"steps": 25, "patience": None, "checkpoint_seconds": checkpoint_seconds}
    with pytest.raises(KeyboardInterrupt):
        trainer(setup, tmp_path / "parts", Stop(stop), **changed).run()
    torch.manual_seed(456)
    rest = trainer(setup, tmp_path / "parts", **changed)
    state = rest.run()
    assert replace(state, seconds=0.0) == replace(whole.state, seconds=0.0)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, rest.model.state_dict()[name]), name
    scores = [[line["validation"] for line in run.journal.lines() if "epoch" in line] for run in (whole, rest)]
    assert scores[0] == scores[1]


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_last_checkpoint(
    setup: Setup, tmp_path: Path
) -> None:
    run = trainer(setup, tmp_path, steps=40)

    class Poison:
        def show(self, step: int, steps: int, loss: float, samples: int) -> None:
            if step == 13:
                with torch.no_grad():
                    run.model.words.weight[5] = torch.nan

    run.reporter = Poison()
    with pytest.raises(
        TrainingError,
        match=r"step 14: expected a finite loss and gradient, found loss nan .*last good checkpoint is kept in ",
    ):
        run.run()
    again = trainer(setup, tmp_path, steps=40)
    again._resume()
    assert again.state.step == 10  # the end of the first epoch
    assert all(weight.isfinite().all() for weight in again.model.state_dict().values())
    assert State(**again.state.__dict__) == again.state


def test_a_checkpoint_of_another_configuration_is_named(setup: Setup, tmp_path: Path) -> None:
    trainer(setup, tmp_path, steps=1).run()
    other = FusionConfig.from_dict(setup.config.to_dict() | {"fusion": "concat"})
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors: its weights do not fit this model; remove it"):
        trainer(replace(setup, config=other), tmp_path, steps=1).run()


def test_the_training_stops_early_when_the_validation_does_not_improve(setup: Setup, tmp_path: Path) -> None:
    run = trainer(setup, tmp_path, epochs=50, patience=2, learning_rate=0.0, weight_decay=0.0)
    assert (run.run().epoch, run.state.best_epoch) == (3, 0)


def test_adversaries_and_views_train_with_sgd(setup: Setup, tmp_path: Path) -> None:
    config = FusionConfig.from_dict(
        setup.config.to_dict()
        | {"pairs": [["text", "text"], ["audio", "caption"]], "similarities": ["dot", "bilinear"]}
    )
    run = trainer(
        replace(setup, config=config),
        tmp_path,
        steps=3,
        optimizer="sgd",
        label_smoothing=0.1,
        loss_weights={"modality_adversary": 0.05, "generator_adversary": 0.05},
    )
    run.run()
    epoch = run.journal.lines()[-1]
    assert set(epoch["train"]) == {"caption", "align", "reconstruct", "modality_adversary", "generator_adversary"}
    assert "text->text (another view) bilinear" in epoch["validation"]["recall"]


def test_an_empty_training_or_validation_split_is_an_error(setup: Setup, tmp_path: Path) -> None:
    empty = replace(setup, source=CorpusSource(seed=0, epoch_size=0, evaluation_size=8))
    with pytest.raises(TrainingError, match="training split has no usable samples"):
        trainer(empty, tmp_path / "a", steps=5).run()
    unmeasured = replace(setup, source=CorpusSource(seed=0, epoch_size=8, evaluation_size=0))
    with pytest.raises(TrainingError, match="validation split has no usable samples"):
        trainer(unmeasured, tmp_path / "b", steps=5).run()


def test_a_search_prefers_a_good_learning_rate_to_an_absurd_one(setup: Setup, tmp_path: Path) -> None:
    chosen_options = options(tmp_path, search=3, search_steps=15, learning_rate=1e-8, patience=None)
    space = {"learning_rate": Span(4e-3, 6e-3)}
    chosen = search(setup, chosen_options, tmp_path, CPU, space=space)
    trials = json.loads((tmp_path / "search.json").read_text())
    assert chosen.learning_rate >= 4e-3
    assert trials[0]["changed"] == {}
    assert trials[0]["score"] < max(trial["score"] for trial in trials)
    for trial in range(3):
        shutil.rmtree(tmp_path / f"search-{trial}")
    assert search(setup, chosen_options, tmp_path, CPU, space=space) == chosen  # finished trials are not repeated
    assert not (tmp_path / "search-0").exists()


def test_a_checkpoint_is_a_safetensors_file(setup: Setup, tmp_path: Path) -> None:
    trainer(setup, tmp_path, steps=2).run()
    names = {name.split(".")[0] for name in load_file(tmp_path / CHECKPOINT)}
    assert names == {"model", "optimizer", "random"}


def test_train_shipped_writes_a_bfloat16_model_and_its_figures(tmp_path: Path) -> None:
    chosen = shipped_options(str(tmp_path), steps=2, batch_size=4, validation_samples=4, device="cpu", model=TINY)
    figures = train_shipped(chosen, count=6)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert set(figures["evaluation"]["subsets"]) == {"+".join(subset) for subset in SUBSETS}
    assert (figures["evaluation"]["samples"], figures["evaluation"]["seed"]) == (6, 2026)
    weights = load_file(tmp_path / "model.safetensors").values()
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {torch.bfloat16}
    assert figures["evaluation"]["exact_match"] == figures["evaluation"]["subsets"]["image+audio+text"]
    assert "mmbeam.corpus" in (tmp_path / "README.md").read_text()
    assert train_shipped(chosen, count=6) == figures
