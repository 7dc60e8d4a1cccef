"""Zero-shot classification: the scores of transformers' pipelines on tiny joint models, alone and in batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_label_classify import PICTURES, by_label, images, labels_of, sample, scores_of
from tiny_models import save_siglip
from transformers.pipelines import pipeline

from mmbeam.config import Labelling
from mmbeam.errors import UsageError
from mmbeam.models.labellers import tasks_of
from mmbeam.names import SHIPPED_MODEL
from mmbeam.stages.label import label_stage
from mmbeam.types import Audio

LABELS = ("cat", "a dog", "and a photo")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("models") / "siglip")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_images_have_the_scores_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(name)
    labels = labels_of(label_stage(str(directory), task="zero-shot", labels=LABELS), images())
    model = transformers.AutoModel.from_pretrained(directory).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = tokenizer(
        [f"This is a photo of {label}." for label in LABELS],
        return_tensors="pt",
        padding="max_length" if name == "siglip" else True,
        max_length=64,
        truncation=True,
    )
    for picture, records in zip(PICTURES, labels, strict=True):
        pixels = processor(picture, input_data_format="channels_last", return_tensors="pt")
        with torch.inference_mode():
            logits = model(**texts, **pixels).logits_per_image[0]
        expected = logits.sigmoid() if name == "siglip" else logits.softmax(-1)
        assert by_label(records) == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=2e-2)
        assert scores_of(records) == sorted(scores_of(records), reverse=True)


def test_sounds_have_the_scores_of_transformers(clap: Path) -> None:
    rate = 48_000
    waves = [(0.2 * np.sin(np.arange(rate * 2) * step)).astype(np.float32) for step in (0.05, 0.1, 0.4)]
    samples = [sample(i, audio=Audio(waves={rate: wave}, seconds=2.0)) for i, wave in enumerate(waves)]
    labels = labels_of(label_stage(str(clap), task="zero-shot", labels=LABELS), samples)
    reference = pipeline("zero-shot-audio-classification", model=str(clap), device="cpu")
    for wave, records in zip(waves, labels, strict=True):
        expected = by_label(reference(wave, candidate_labels=list(LABELS)))
        assert by_label(records) == pytest.approx(expected, abs=2e-3)


def test_templates_are_averaged_and_labels_encoded_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = ("a photo of {}", "{}, far away")
    stage = label_stage(str(clip), task="zero-shot", labels=LABELS, templates=templates)
    model = stage.load()
    vectors = []
    for template in templates:
        ids = model.encoder.tokenize([template.format(label) for label in LABELS])
        vectors.append(torch.nn.functional.normalize(model.encoder.encode_text(ids).pooled, dim=-1))
    mean = torch.nn.functional.normalize((vectors[0] + vectors[1]) / 2, dim=-1)
    assert torch.allclose(model.labels["image"], mean.T, atol=1e-6)
    monkeypatch.setattr(model.encoder, "encode_text", None)
    assert model.compute("image", PICTURES).shape == (len(PICTURES), len(LABELS))


def test_the_shipped_model_averages_its_modalities(tmp_path: Path) -> None:
    stage = label_stage(SHIPPED_MODEL, task="zero-shot", labels=("a red circle", "a green ring"))
    audio = Audio(waves={16_000: np.zeros(16_000, np.float32)}, seconds=1.0)
    [picture, _, *_] = images()
    both = sample(0, image=picture.image, image_size=picture.image_size, audio=audio)
    alone = [sample(1, image=picture.image, image_size=picture.image_size), sample(2, audio=audio)]
    [together, seen, heard] = labels_of(stage, [both, *alone])
    for label, score in by_label(together).items():
        assert score == pytest.approx((by_label(seen)[label] + by_label(heard)[label]) / 2, abs=1e-6)


def test_what_zero_shot_needs(clip: Path) -> None:
    assert tasks_of(clip) == ("zero-shot",)
    assert Labelling(task="zero-shot", labels=LABELS).labels == LABELS
    with pytest.raises(UsageError, match="needs `labels`"):
        label_stage(str(clip), task="zero-shot")
    with pytest.raises(UsageError, match=r"`templates` 'photo': expected one \{\}"):
        label_stage(str(clip), task="zero-shot", labels=LABELS, templates=("photo",))
    with pytest.raises(UsageError, match=r"`task` classify: .*CLIPModel, which can do zero-shot"):
        label_stage(str(clip))
