"""Ablations of the fusion model: `make ablations`, or `python bench/ablations.py [NAME ...]`.

Each row changes one thing and trains on a short schedule on the procedural corpus, with the shipped model's
other options; what is measured are fresh scenes, the same for all rows. A process for each core trains a row
on one thread, which two threads for one row after another take half as long again for. The table goes to the
standard output and, with the command, to bench/ABLATIONS.md. Rows that are done are not done again, so that
an interrupted table goes on.
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
from mmbeam.training.train import open_run, train_on

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for `pipelines`

from pipelines.train_shipped import EVALUATION_SEED, corpus_setup, shipped_options  # noqa: E402

CACHE = ROOT / ".cache" / "ablations"
CPU = torch.device("cpu")
TABLE = ROOT / "bench" / "ABLATIONS.md"
STEPS = 500
SHIFTED_STEPS = 200
BATCH = (
    32  # half the shipped model's: with as many scenes in all, half the captions are right where its batches make 3 %
)
SAMPLES = 500  # that are measured
ADVERSARY = 0.05  # weight of an adversarial term


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that is other than in the shipped model."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    modalities: tuple[Modality, ...] | None = None
    shifted: bool = False  # on the shifted corpus
    options: Mapping[str, Any] = field(default_factory=dict)


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
    """Another corpus: pale pictures under fog, sounds at half their level with hiss, and captions in other words."""

    corpus: ExampleSource

    def count(self, part: Split) -> int | None:
        return self.corpus.count(part)

    def of_rank(self, rank: int, world_size: int) -> "Shifted":
        return Shifted(self.corpus.of_rank(rank, world_size))

    def examples(self, part: Split, epoch: int = 0) -> Iterator[Example]:
        for example in self.corpus.examples(part, epoch):
            clauses = {m: f"{SAYS[m]} {text.removeprefix('with ')}" for m, text in (example.clauses or {}).items()}
            request = partial(shifted_request, example)
            yield replace(example, request=request, clauses=clauses, caption=compose(clauses, clauses))


SAYS = {"image": "you see", "audio": "you hear", "text": "you are"}


def shifted_request(example: Example, modalities: frozenset[Modality]) -> Request:
    request = example.request(modalities)
    image, audio = request.image, request.audio
    if image is not None:
        image = (0.5 * image + 90).astype(np.uint8)
    if audio is not None:
        hiss = np.random.default_rng(len(example.caption)).standard_normal(len(audio[0]))
        audio = ((0.5 * audio[0] + 0.003 * hiss).astype(np.float32), audio[1])
    return replace(request, image=image, audio=audio)


def measure(row: Row) -> dict[str, Any]:
    """Train the row's model, unless that is done, and what it does on fresh scenes."""
    directory = CACHE / "".join(c if c.isalnum() else "-" for c in row.name)
    result = directory / "row.json"
    if not result.exists():
        options = shipped_options(
            str(directory),
            steps=SHIFTED_STEPS if row.shifted else STEPS,
            batch_size=BATCH,
            model=row.model,
            loss_weights=row.losses,
            modalities=row.modalities,
            validation_samples=100,
            device="cpu",
            **row.options,
        )
        report = train_on(setup(row, options), options, open_run(options, True), CPU, TrainingLine(sys.stderr))
        found = {"parameters": report["parameters"], **scores(directory, row)}
        result.write_text(json.dumps(found))
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def setup(row: Row, options: TrainOptions) -> Setup:
    made = corpus_setup(options)
    if not row.shifted:
        return made
    made = replace(made, source=Shifted(made.source))
    if options.init is None:
        return made
    directory = resolve(options.init).directory
    processor = FusionProcessor.from_directory(directory)
    return replace(made, config=FusionConfig.from_pretrained(directory), processor=processor)


def scores(directory: Path, row: Row) -> dict[str, Any]:
    model = load_pretrained(FusionModel, directory, CPU, torch.float32)
    evaluator = Evaluator(model, FusionProcessor.from_directory(directory), CPU)
    corpus = CorpusSource(seed=EVALUATION_SEED, epoch_size=SAMPLES, evaluation_size=SAMPLES, modalities=row.modalities)
    source = Shifted(corpus) if row.shifted else corpus
    return evaluator.scores(source.examples("train"), per_batch=0).to_json()


def line(row: Row, figures: Mapping[str, Any]) -> str:
    found = " | ".join(recall(row, figures, one) for one in ("image", "audio", "text", "fused"))
    return (
        f"| {row.name} | {figures['exact_match']:.1%} | {figures['words_right']:.1%} | {figures['loss']:.3f} | {found} "
        f"| {figures['parameters'] / 1e6:.2f} |"
    )


def recall(row: Row, figures: Mapping[str, Any], one: str) -> str:
    """From `one` to the caption, by each similarity that was trained."""
    kinds = row.model.get("similarities", ["cosine"])
    found = [figures["recall"].get(f"{one}->caption {kind}") for kind in kinds]
    return " / ".join("" if each is None else f"{each:.1%}" for each in found)


def main(names: list[str]) -> None:
    rows = [row for row in ROWS if not names or any(name in row.name for name in names)]
    context = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        lines = [line(row, figures) for row, figures in zip(rows, pool.map(measure, rows), strict=True)]
    head = [
        "# Ablations of the fusion model",
        "",
        f"`make ablations`, two rows at a time on 2 cores: each is trained for {STEPS} steps of {BATCH} fresh scenes",
        f"(the shipped model for 800 of 64), those on the shifted corpus for {SHIFTED_STEPS}, measured on {SAMPLES}",
        f"scenes of seed {EVALUATION_SEED}. A modality alone is measured on its own clause. Recall@1 is of the right",
        f"caption among {SAMPLES}, by the similarity trained; a model of pictures or sounds alone has no encoder of",
        "texts, so no captions to align with. The shifted corpus: pale pictures, quiet sounds with hiss, captions in",
        "other words.",
        "",
        "One seed a row. A caption is exact when all three clauses are, and what the text says is learned last and at",
        "once: rows of some per cent have not begun to read it after so few steps, and words right and loss tell more.",
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
