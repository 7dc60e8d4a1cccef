"""Ablations of the fusion model: `make ablations`, or `python bench/ablations.py [NAME ...]`.

Each row changes one thing and trains on a short schedule on the procedural corpus, with the shipped model's
other options; what is measured are fresh scenes, the same for all rows. The table goes to the standard
output and, with the command, to bench/ABLATIONS.md. Rows that are done are not done again, so that an
interrupted table goes on.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmbeam.models.fusion import FusionModel, FusionProcessor
from mmbeam.models.loading import load_pretrained
from mmbeam.training.progress import TrainingLine
from mmbeam.training.scores import Judge
from mmbeam.training.shipped import EVALUATION_SEED, corpus_setup, shipped_options
from mmbeam.training.sources import CorpusSource
from mmbeam.training.train import open_run, train_on
from mmbeam.types import Modality

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "ablations"
TABLE = ROOT / "bench" / "ABLATIONS.md"
STEPS = 250
SAMPLES = 500  # that are measured
ADVERSARY = 0.05  # weight of an adversarial term


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that is other than in the shipped model."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    modalities: tuple[Modality, ...] | None = None


def encoders(kind: str) -> dict[str, Any]:
    return {"kinds": dict.fromkeys(("image", "audio", "text"), kind)}


ROWS = [
    Row(name="as shipped: attention, Transformer, alignment, reconstruction"),
    *(Row(name=f"fusion: {fusion}", model={"fusion": fusion}) for fusion in ("concat", "gated", "bilinear")),
    Row(name="generator: LSTM", model={"generator_kind": "lstm"}),
    *(Row(name=f"encoders: {kind}", model=encoders(kind)) for kind in ("conv", "mlp", "lstm", "transformer")),
    *(Row(name=f"{modality} alone", modalities=(modality,)) for modality in ("image", "audio", "text")),
    Row(name="without alignment", losses={"align": 0.0}),
    Row(name="without reconstruction", losses={"reconstruct": 0.0}),
    Row(name="without either", losses={"align": 0.0, "reconstruct": 0.0}),
    Row(name="with the modality adversary", losses={"modality_adversary": ADVERSARY}),
    Row(name="with the generator adversary", losses={"generator_adversary": ADVERSARY}),
]


def measure(row: Row) -> dict[str, Any]:
    """Train the row's model, unless that is done, and what it does on fresh scenes."""
    directory = CACHE / "".join(c if c.isalnum() else "-" for c in row.name)
    result = directory / "row.json"
    if not result.exists():
        options = shipped_options(
            str(directory),
            steps=STEPS,
            model={**shipped_options("").model, **row.model},
            loss_weights=row.losses,
            modalities=row.modalities,
            validation_samples=100,
            device="cpu",
        )
        begin = time.monotonic()
        report = train_on(
            corpus_setup(options), options, open_run(options, True), torch.device("cpu"), TrainingLine(sys.stderr)
        )
        figures = {"seconds": time.monotonic() - begin, "parameters": report["parameters"], **scores(directory, row)}
        result.write_text(json.dumps(figures))
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def scores(directory: Path, row: Row) -> dict[str, Any]:
    model = load_pretrained(FusionModel, directory, torch.device("cpu"), torch.float32)
    judge = Judge(model, FusionProcessor.from_directory(directory), torch.device("cpu"))
    source = CorpusSource(seed=EVALUATION_SEED, epoch_size=SAMPLES, evaluation_size=SAMPLES, modalities=row.modalities)
    return judge.scores(source.examples("train"), per_batch=0).to_json()


def line(name: str, figures: Mapping[str, Any]) -> str:
    recall = [figures["recall"].get(f"{one}->caption cosine") for one in ("image", "audio", "text", "fused")]
    found = " | ".join("" if each is None else f"{each:.1%}" for each in recall)
    return (
        f"| {name} | {figures['exact_match']:.1%} | {figures['words_right']:.1%} | {figures['loss']:.3f} | {found} "
        f"| {figures['parameters'] / 1e6:.2f} | {figures['seconds']:.0f} |"
    )


def main(names: list[str]) -> None:
    rows = [row for row in ROWS if not names or any(name in row.name for name in names)]
    lines = [line(row.name, measure(row)) for row in rows]
    head = [
        "# Ablations of the fusion model",
        "",
        f"`make ablations` on 2 cores: each row trained for {STEPS} steps of 64 fresh scenes (the shipped model has",
        f"more), and measured on {SAMPLES} scenes of seed {EVALUATION_SEED}. A modality alone is measured on its own",
        "clause. Recall@1 among 500: of the right caption, by the cosine of embeddings.",
        "",
        "| | exact match | words right | loss | image to caption | audio | text | fused | M parameters | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    table = "\n".join([*head, *lines, ""])
    if not names:
        TABLE.write_text(table)
    print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
