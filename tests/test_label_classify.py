"""Classifiers: the scores of transformers' own pipelines on tiny checkpoints, alone and in batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pictures import pictures
from PIL import Image
from tiny_labellers import ANIMALS, DETECTORS, IMAGES, SEGMENTERS, SOUNDS, TAGGERS, TEXTS
from transformers.pipelines import pipeline

from mmbeam.errors import ModelError, UsageError
from mmbeam.models.labellers import tasks_of
from mmbeam.names import LABEL_TASKS
from mmbeam.stages.label import LabelStage, label_stage
from mmbeam.types import Audio, Batch, Sample, WorkUnit

pytestmark = [
    pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),  # WavLM of transformers
]

RATE = 16_000
SIZES = [(60, 80), (48, 48), (200, 90), (48, 48), (31, 33)]  # height, width
PICTURES = pictures(tuple(SIZES))
WAVES = [
    (0.3 * np.sin(np.arange(int(RATE * seconds)) * (0.05 + index / 9))).astype(np.float32)
    for index, seconds in enumerate((0.6, 0.3, 0.6, 0.11))
]
WORDS = ["a dog barks", "a cat and a dog, far away", "Katzen", "a photo of a cat " * 3]


def labels_of(stage: LabelStage, samples: list[Sample], column: str = "labels") -> list[Any]:
    """Return the column's values, with the same batch in one pack and with a sample per pack."""
    model = stage.load()
    values: list[Any] = []
    for batch_size in (len(samples), 1):
        sized = type(stage)(**{**vars(stage), "batch_size": batch_size})
        batch = Batch(unit=WorkUnit(id="test", inputs=()), index=0, last=True, samples=tuple(samples))
        done = sized.run(model, batch)
        assert not done.failures
        values.append(done.features[column].to_pylist())
    for together, alone in zip(*values, strict=True):
        assert [record["label"] for record in together] == [record["label"] for record in alone]
        assert scores_of(together) == pytest.approx(scores_of(alone), abs=1e-5)
    return values[0]


def scores_of(records: list[dict[str, Any]]) -> list[float]:
    return [record["score"] for record in records]


def by_label(records: list[dict[str, Any]]) -> dict[str, float]:
    return {record["label"]: record["score"] for record in records}


def sample(number: int, **values: Any) -> Sample:
    present = frozenset(name for name in values if name in ("image", "audio", "text"))
    return Sample(key=str(number), shard="test", offset=number, present=present, **values)


def images() -> list[Sample]:
    return [
        sample(number, image=picture, image_size=(picture.shape[1], picture.shape[0]))
        for number, picture in enumerate(PICTURES)
    ]


@pytest.mark.parametrize("name", IMAGES)
def test_images_have_the_scores_of_transformers(name: str, tmp_path: Path) -> None:
    directory = IMAGES[name](tmp_path)
    labels = labels_of(label_stage(str(directory), top_k=3), images())
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    model = transformers.AutoModelForImageClassification.from_pretrained(directory).eval()
    for picture, records in zip(PICTURES, labels, strict=True):
        with torch.inference_mode():
            expected = model(**processor(Image.fromarray(picture), return_tensors="pt")).logits[0].softmax(-1)
        assert len(records) == 3
        assert scores_of(records) == sorted(scores_of(records), reverse=True)
        for label, score in by_label(records).items():
            assert score == pytest.approx(float(expected[ANIMALS.index(label)]), abs=2e-2)
        assert scores_of(records) == pytest.approx(sorted(expected.tolist(), reverse=True)[:3], abs=2e-2)


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_have_the_scores_of_transformers(name: str, tmp_path: Path) -> None:
    directory = SOUNDS[name](tmp_path)
    samples = [sample(i, audio=Audio(waves={RATE: wave}, seconds=len(wave) / RATE)) for i, wave in enumerate(WAVES)]
    labels = labels_of(label_stage(str(directory), top_k=7), samples)
    reference = pipeline("audio-classification", model=str(directory), top_k=7, device="cpu")
    for wave, records in zip(WAVES, labels, strict=True):
        assert by_label(records) == pytest.approx(by_label(reference(wave)), abs=2e-4)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, None) for name in TEXTS),
        *(("bert", problem) for problem in ("multi_label_classification", "regression")),
        ("gpt2", "multi_label_classification"),
    ],
)
def test_texts_have_the_scores_of_transformers(name: str, problem: str | None, tmp_path: Path) -> None:
    directory = TEXTS[name](tmp_path, problem_type=problem)
    samples = [sample(i, text=text) for i, text in enumerate(WORDS)]
    stage = label_stage(str(directory), task="sentiment", top_k=7)
    labels = labels_of(stage, samples)
    reference = pipeline("text-classification", model=str(directory), top_k=7, device="cpu")
    for text, records in zip(WORDS, labels, strict=True):
        assert by_label(records) == pytest.approx(by_label(reference([text])[0]), abs=2e-4)


def test_a_long_clip_has_the_mean_scores_of_its_windows(tmp_path: Path) -> None:
    directory = SOUNDS["ast"](tmp_path)
    long = np.concatenate([WAVES[0], WAVES[2], WAVES[0], WAVES[2]])
    stage = label_stage(str(directory), top_k=7)
    [records] = labels_of(stage, [sample(0, audio=Audio(waves={RATE: long}, seconds=2.4))])
    assert sum(scores_of(records)) == pytest.approx(1, abs=1e-5)


def test_a_threshold_and_top_k_choose_among_the_labels(tmp_path: Path) -> None:
    directory = IMAGES["vit"](tmp_path, problem_type="multi_label_classification")
    everything = labels_of(label_stage(str(directory), top_k=7), images())
    chosen = labels_of(label_stage(str(directory), top_k=2, threshold=0.5), images())
    for records, kept in zip(everything, chosen, strict=True):
        assert kept == [record for record in records if record["score"] >= 0.5][:2]


def test_a_checkpoint_without_names_of_its_classes_needs_labels(tmp_path: Path) -> None:
    directory = IMAGES["vit"](tmp_path, id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    with pytest.raises(ModelError, match=r"expected id2label, the names of the 2 classes.*`labels`, or add id2label"):
        label_stage(str(directory))
    with pytest.raises(ModelError, match=r"each of the 2 classes, found 3"):
        label_stage(str(directory), labels=("a", "b", "c"))
    records = labels_of(label_stage(str(directory), labels=("yes", "no")), images())[0]
    assert set(by_label(records)) == {"yes", "no"}


def test_a_task_that_a_model_cannot_do_names_those_it_can(tmp_path: Path) -> None:
    directory = TEXTS["bert"](tmp_path / "text")
    with pytest.raises(
        UsageError, match=r"`task` detect: .* BertForSequenceClassification, which can do classify, sen"
    ):
        label_stage(str(directory), task="detect")
    bare = IMAGES["vit"](tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    with pytest.raises(UsageError, match=r"ViTModel, which can do none of classify, zero-shot"):
        label_stage(str(bare))


FAMILIES = [*IMAGES.values(), *SOUNDS.values(), *TEXTS.values(), *DETECTORS.values(), *SEGMENTERS.values()]


@pytest.mark.torture
@pytest.mark.parametrize("save", [*FAMILIES, *TAGGERS.values()])
def test_every_family_names_its_tasks_and_needs_names_of_its_classes(save: Callable[..., Path], tmp_path: Path) -> None:
    directory = save(tmp_path)
    tasks = tasks_of(directory)
    other = next(task for task in LABEL_TASKS if task not in (*tasks, "zero-shot"))
    with pytest.raises(UsageError, match=f"`task` {other}: .* which can do {', '.join(tasks)}$"):
        label_stage(str(directory), task=other)
    config = json.loads((directory / "config.json").read_text())
    for name in ("id2label", "label2id"):
        del config[name]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected id2label"):
        label_stage(str(directory), task=tasks[0])
