"""Ablations of the fusion model: `make ablations`, or `python bench/ablations.py [NAME ...]`.

Each row changes one option of the shipped model, trains on the procedural corpus with a short schedule, and is
measured on fresh scenes, the same for all rows. Every core trains one row at a time on one thread: on 2 cores the
rows one after another on two threads take half as long again. The table is printed, and written to
bench/ABLATIONS.md unless NAMEs select rows. Finished rows are kept, so an interrupted table resumes.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbeam.models.fusion import FusionConfig, FusionModel, FusionProcessor
from mmbeam.models.loading import load_pretrained, resolve
from mmbeam.names import SHIPPED_MODEL, Modality, Split
from mmbeam.prompts.ask import Request
from mmbeam.report.progress import TrainingLine
from mmbeam.training.examples import Example, ExampleSource, compose
from mmbeam.training.options import TrainOptions
from mmbeam.training.scores import Evaluator
from mmbeam.training.setup import Setup
from mmbeam.training.sources import CorpusSource
from mmbeam.training.train import open_training, train_on

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for `pipelines`

from pipelines.train_shipped import EVALUATION_SEED, corpus_setup, shipped_options  # noqa: E402

CACHE = ROOT / ".cache" / "ablations"
CPU = torch.device("cpu")
TABLE = ROOT / "bench" / "ABLATIONS.md"
STEPS = 500
SHIFTED_STEPS = 200
# Half the batch of the shipped model. With the same number of scenes, half of the captions are then exact; with the
# shipped model's batches, 3 % are.
BATCH = 32
SAMPLES = 500  # scenes that a row is measured on
ADVERSARY = 0.05  # weight of an adversarial loss


@dataclass(frozen=True, kw_only=True)
class Row:
    """One change to the shipped model."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)  # arguments of FusionConfig
    losses: Mapping[str, float] = field(default_factory=dict)  # weights
    modalities: tuple[Modality, ...] | None = None
    is_shifted: bool = False  # trained and measured on the shifted corpus
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of TrainOptions


def encoders(kind: str) -> dict[str, Any]:
    return {"kinds": dict.fromkeys(("image", "audio", "text"), kind)}


ROWS = [
    Row(name="as shipped: attention, Transformer, alignment, reconstruction"),
    *(Row(name=f"fusion: {fusion}", model={"fusion": fusion}) for fusion in ("concat", "gated", "bilinear")),
    Row(name="generator: LSTM", model={"generator_kind": "lstm"}),
    *(Row(name=f"encoders: {kind}", model=encoders(kind)) for kind in ("conv", "mlp", "lstm", "transformer")),
    *(Row(name=f"{modality} alone", modalities=(modality,)) for modality in ("image", "audio", "text")),
    Row(name="similarities: dot", model={"similarities": ["dot"]}),
    Row(name="similarities: bilinear", model={"similarities": ["bilinear"]}),
    Row(name="similarities: all three", model={"similarities": ["cosine", "dot", "bilinear"]}),
    Row(name="without alignment", losses={"align": 0.0}),
    Row(name="without reconstruction", losses={"reconstruct": 0.0}),
    Row(name="without either", losses={"align": 0.0, "reconstruct": 0.0}),
    Row(name="with the modality adversary", losses={"modality_adversary": ADVERSARY}),
    Row(name="with the generator adversary", losses={"generator_adversary": ADVERSARY}),
    Row(name="shifted corpus, from scratch", shifted=True),
    Row(name="shifted corpus, --init shipped", shifted=True, options={"init": SHIPPED_MODEL}),
    Row(
        name="shifted corpus, --init shipped --freeze image,audio,text",
        shifted=True,
        options={"init": SHIPPED_MODEL, "freeze": ("image", "audio", "text")},
    ),
]


@dataclass(frozen=True)
class Shifted:
    """A shifted corpus: images at half contrast, audio at half volume with noise, and captions in other words."""

    corpus: ExampleSource

    def count(self, split: Split) -> int | None:
        return self.corpus.count(split)

    def of_rank(self, rank: int, world_size: int) -> "Shifted":
        return Shifted(self.corpus.of_rank(rank, world_size))

    def examples(self, split: Split, epoch: int = 0) -> Iterator[Example]:
        for example in self.corpus.examples(split, epoch):
            clauses = {m: f"{PREFIXES[m]} {text.removeprefix('with ')}" for m, text in (example.clauses or {}).items()}
            request = partial(shifted_request, example)
            yield replace(example, request=request, clauses=clauses, caption=compose(clauses, clauses))


PREFIXES = {"image": "you see", "audio": "you hear", "text": "you are"}  # of the clauses


def shifted_request(example: Example, modalities: frozenset[Modality]) -> Request:
    request = example.request(modalities)
    image, audio = request.image, request.audio
    if image is not None:
        image = (0.5 * image + 90).astype(np.uint8)
    if audio is not None:
        noise = np.random.default_rng(len(example.caption)).standard_normal(len(audio[0]))
        audio = ((0.5 * audio[0] + 0.003 * noise).astype(np.float32), audio[1])
    return replace(request, image=image, audio=audio)


def measure(row: Row) -> dict[str, Any]:
    """Train the row's model unless it is cached, and return its scores on fresh scenes."""
    directory = CACHE / "".join(c if c.isalnum() else "-" for c in row.name)
    result = directory / "row.json"
    if not result.exists():
        options = shipped_options(
            str(directory),
            steps=SHIFTED_STEPS if row.is_shifted else STEPS,
            batch_size=BATCH,
            model=row.model,
            loss_weights=row.losses,
            modalities=row.modalities,
            validation_samples=100,
            device="cpu",
            **row.options,
        )
        report = train_on(setup(row, options), options, open_training(options, True), CPU, TrainingLine(sys.stderr))
        result.write_text(json.dumps({"parameters": report["parameters"], **scores(directory, row)}))
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def setup(row: Row, options: TrainOptions) -> Setup:
    unshifted = corpus_setup(options)
    if not row.is_shifted:
        return unshifted
    shifted = replace(unshifted, source=Shifted(unshifted.source))
    if options.init is None:
        return shifted
    directory = resolve(options.init).directory
    processor = FusionProcessor.from_directory(directory)
    return replace(shifted, config=FusionConfig.from_pretrained(directory), processor=processor)


def scores(directory: Path, row: Row) -> dict[str, Any]:
    model = load_pretrained(FusionModel, directory, CPU, torch.float32)
    evaluator = Evaluator(model, FusionProcessor.from_directory(directory), CPU)
    corpus = CorpusSource(seed=EVALUATION_SEED, epoch_size=SAMPLES, evaluation_size=SAMPLES, modalities=row.modalities)
    source = Shifted(corpus) if row.is_shifted else corpus
    return evaluator.scores(source.examples("train"), per_batch=0).to_json()


def line(row: Row, figures: Mapping[str, Any]) -> str:
    recalls = " | ".join(recall(row, figures, source) for source in ("image", "audio", "text", "fused"))
    return (
        f"| {row.name} | {figures['exact_match']:.1%} | {figures['words_right']:.1%} | {figures['loss']:.3f} "
        f"| {recalls} | {figures['parameters'] / 1e6:.2f} |"
    )


def recall(row: Row, figures: Mapping[str, Any], source: str) -> str:
    """Return recall@1 from `source` to the caption, by each similarity that was trained."""
    kinds = row.model.get("similarities", ["cosine"])
    values = [figures["recall"].get(f"{source}->caption {kind}") for kind in kinds]
    return " / ".join("" if value is None else f"{value:.1%}" for value in values)


def main(names: list[str]) -> None:
    rows = [row for row in ROWS if not names or any(name in row.name for name in names)]
    context = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        lines = [line(row, figures) for row, figures in zip(rows, pool.map(measure, rows), strict=True)]
    head = [
        "# Ablations of the fusion model",
        "",
        f"`make ablations`, two rows at a time on 2 cores. Each row is one model, trained for {STEPS} steps of {BATCH}",
        f"fresh scenes (the shipped model for 800 steps of 64), or {SHIFTED_STEPS} steps on the shifted corpus, and",
        f"measured on {SAMPLES} scenes of seed {EVALUATION_SEED}. Recall@1 is that of the caption among {SAMPLES}, by",
        "the similarities that the row trains. A row with one modality is measured on the clause of that modality;",
        "with image or audio alone the model has no text encoder, so no embeddings of captions. The shifted corpus",
        "has images at half contrast, audio at half volume with noise, and captions in other words.",
        "",
        "Every row has a single seed. An exact caption needs all three clauses. The clause of the text is learned last",
        "and abruptly: a row below 10 % has not learned it after this number of steps. Compare such rows by words",
        "right and loss.",
        "",
        "| | exact match | words right | loss | image to caption | audio | text | fused | M parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    table = "\n".join([*head, *lines, ""])
    if not names:
        TABLE.write_text(table)
    print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
