"""The model that ships with the package, on scenes it was not trained on."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from mmbeam.corpus.scene import Scene, generate_scenes
from mmbeam.corpus.write import write_corpus
from mmbeam.jobs.caption import CaptionOptions, caption
from mmbeam.models.generators import describe, load
from mmbeam.models.generators.base import Generator
from mmbeam.models.loading import resolve
from mmbeam.names import FUSION_MODALITIES, SHIPPED_MODEL
from mmbeam.prompts.ask import Decoding, Generated
from mmbeam.training.sources import scene_example
from pipelines.train_shipped import EVALUATION_SEED, evaluate

DIRECTORY = resolve(SHIPPED_MODEL).directory
SEED = 77  # not used for training, selection or the figures of the card


@pytest.fixture(scope="module")
def figures() -> dict[str, object]:
    """Exact match on fewer scenes than the card: one wrong caption of 150 is 0.7 %."""
    return evaluate(DIRECTORY, torch.device("cpu"), 150, seed=SEED)


def test_shipped_captions_are_exact_for_every_subset_of_modalities(figures: dict[str, object]) -> None:
    subsets = figures["subsets"]
    assert isinstance(subsets, dict)
    assert len(subsets) == 7
    assert min(subsets.values()) >= 0.96, subsets
    assert figures["exact_match"] == subsets["image+audio+text"]
    assert float(str(figures["words_right"])) >= 0.99


def test_shipped_embeddings_retrieve_the_caption(figures: dict[str, object]) -> None:
    recall = figures["recall"]
    assert isinstance(recall, dict)
    assert recall["fused->caption cosine"] >= 0.9
    assert recall["image->caption cosine"] >= 0.5


def test_shipped_model_card_matches_the_weights() -> None:
    weights = (DIRECTORY / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in (DIRECTORY / "README.md").read_text()
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 10_000_000
    figures = json.loads((DIRECTORY / "figures.json").read_text())["evaluation"]
    assert (figures["samples"], figures["seed"]) == (2000, EVALUATION_SEED)
    assert figures["exact_match"] >= 0.97
    assert figures["words_right"] >= 0.99
    assert min(figures["subsets"].values()) >= 0.97


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Rows of a caption job on shards with real codecs, at another size and rate than in training."""
    directory = tmp_path_factory.mktemp("shipped")
    write_corpus(directory / "shards", samples=60, shards=2, seed=SEED)
    options = CaptionOptions(
        input=(str(directory / "shards"),),
        output=str(directory / "out"),
        model=SHIPPED_MODEL,
        device="cpu",
        explain=True,
        with_embeddings=True,
    )
    assert caption(options).tally.rows == 60
    table: list[dict[str, object]] = ds.dataset(directory / "out" / "data").to_table().sort_by("key").to_pylist()
    return table


def test_caption_job_with_the_shipped_model(rows: list[dict[str, object]]) -> None:
    truths = {scene.key: scene.caption() for scene in generate_scenes(SEED, count=60)}
    right = [row["caption"] == truths[str(row["key"])] for row in rows]
    assert np.mean(right) >= 0.95, [(row["caption"], truths[str(row["key"])]) for row in rows]


def test_attribution_covers_every_modality(rows: list[dict[str, object]]) -> None:
    attributions = np.array([[row[f"caption_{m}_attribution"] for m in FUSION_MODALITIES] for row in rows], float)
    assert np.allclose(attributions.sum(1), 1)
    assert (attributions > 0.05).all()


def test_masking_a_modality_removes_its_clause_only() -> None:
    """Clauses are in the order of the modalities."""
    model = load(describe(DIRECTORY), torch.device("cpu"), torch.float32)
    scene = Scene.draw(SEED, 3)
    request = scene_example(scene).make()
    (made,) = model.generate([request], Decoding())
    assert made.text == scene.caption()
    clauses = list(scene.clauses().values())
    for number, modality in enumerate(FUSION_MODALITIES):
        before = prefix(model, ", ".join(clauses[:number]), made)
        until = prefix(model, ", ".join(clauses[: number + 1]), made)
        whole, masked = (
            model.score([variant, variant], [before, until]) for variant in (request, request.without(modality, {}))
        )
        assert whole[0] - masked[0] < 0.5, modality  # the text before its clause is unaffected
        assert (whole[1] - masked[1]) - (whole[0] - masked[0]) > 3, modality  # its clause loses


def prefix(model: Generator, text: str, made: Generated) -> Generated:
    """Return the first generated tokens, those of `text`."""
    count = model.count_tokens([text])[0]
    return replace(made, token_ids=made.token_ids[:count])
