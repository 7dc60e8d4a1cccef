"""Train the fusion model that ships with mmbeam on the procedural corpus, and evaluate it on held-out scenes.

    python pipelines/train_shipped.py --output models/fusion

writes the model (bfloat16), its model card and figures.json: exact match from every subset of the modalities, words
right, the accuracy of each class of words and of each word, and recall@1. The default hyperparameters are those of the
shipped model; options change them:

    python pipelines/train_shipped.py --output lstm --generator lstm --steps 2400 --seed 1

The same command again resumes an interrupted training. It runs on one machine, without Apache Beam.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from mmbeam.corpus.scene import Scene, generate_scenes, tag
from mmbeam.models.fusion.configuration import FusionConfig
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.models.loading import load_pretrained, quiet_transformers
from mmbeam.names import FUSION_MODALITIES, FUSIONS, GENERATOR_KINDS, Modality
from mmbeam.report.progress import TrainingLine
from mmbeam.training.checkpoint import write_text
from mmbeam.training.distributed import joined, local_device
from mmbeam.training.examples import Example
from mmbeam.training.fit import ProgressReporter
from mmbeam.training.options import TrainOptions
from mmbeam.training.scores import CANDIDATES, SUBSETS, Evaluator, count_words
from mmbeam.training.setup import Setup
from mmbeam.training.sources import CorpusSource, scene_example
from mmbeam.training.train import REPORT, open_training, read_report, train_on, write_model

EPOCH_SAMPLES = 12_800  # training scenes between two validations
VOCABULARY_SAMPLES = 4000  # scenes whose captions and tags determine the vocabulary
VOCABULARY = 1024  # tokens at most: the bytes, and all words of the corpus in all cases
# The modalities of a scene are independent of each other, so each is aligned with the caption only.
PAIRS = [[name, "caption"] for name in (*FUSION_MODALITIES, "fused")]
EVALUATION_SEED = 2026
EVALUATION_SAMPLES = 2000
FIGURES = "figures.json"


def shipped_options(output: str, **changed: Any) -> TrainOptions:
    """Return the options that the shipped model was trained with, except for `changed`."""
    return replace(
        TrainOptions(
            input=("corpus://procedural",),
            output=output,
            vocab_size=VOCABULARY,
            learning_rate=2e-3,
            warmup_steps=60,
            weight_decay=0.01,
            dropout=0.1,
            modality_dropout=0.15,
            batch_size=64,
            steps=800,
            patience=None,
            validation_samples=500,
            select="exact_match",
        ),
        **changed,
    )


def train_shipped(
    options: TrainOptions,
    *,
    overwrite: bool = False,
    reporter: ProgressReporter | None = None,
    count: int = EVALUATION_SAMPLES,
) -> dict[str, Any]:
    """Train on the corpus, evaluate on `count` held-out scenes, write the model in bfloat16, and return the figures.

    The same options again resume an interrupted training. Raises the errors of `train`.
    """
    device = local_device(options.device)
    quiet_transformers()
    with joined(device) as world:
        with world.main_first():
            directory = open_training(options, overwrite, world)
            done = (directory / REPORT).exists()
        if done:
            report = read_report(directory)
        else:
            report = train_on(corpus_setup(options), options, directory, device, reporter, world)
        return world.from_main(lambda: _finish(report, directory.parent, device, count))


def _finish(report: Mapping[str, Any], output: Path, device: torch.device, count: int) -> dict[str, Any]:
    """Write the trained model in bfloat16, with its figures and its card, and return the figures."""
    model = load_pretrained(FusionModel, output, torch.device("cpu"), torch.bfloat16)
    write_model(model, FusionProcessor.from_directory(output), output)
    figures = {"training": report, "evaluation": evaluate(output, device, count)}
    write_text(output / FIGURES, json.dumps(figures, indent=2) + "\n")
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    write_text(output / "README.md", shipped_card(figures, digest))
    return figures


def corpus_setup(options: TrainOptions) -> Setup:
    """Return the setup of a training on the corpus, with a new model."""
    modalities = options.modalities or FUSION_MODALITIES
    pairs = [pair for pair in PAIRS if pair[0] in (*modalities, "fused") and "text" in modalities]
    config = FusionConfig.for_media(modalities, **{"pairs": pairs, **options.model})
    scenes = generate_scenes(options.seed, count=VOCABULARY_SAMPLES)
    texts = (text for scene in scenes for text in (scene.caption(), tag(scene)))
    processor = FusionProcessor.fit(config.parsed_sources(), texts, options.vocab_size)
    config.vocab_size = processor.vocab_size
    source = CorpusSource(
        seed=options.seed,
        epoch_size=EPOCH_SAMPLES,
        evaluation_size=options.validation_samples,
        modalities=processor.modalities,
    )
    samples = "the procedural corpus of mmbeam.corpus, 64 pixels and 8 kHz"
    counts = {"samples": samples, "modalities": dict.fromkeys(processor.modalities, "rendered")}
    return Setup(config=config, processor=processor, source=source, sample_counts=counts)


def evaluate(directory: Path, device: torch.device, count: int, seed: int = EVALUATION_SEED) -> dict[str, Any]:
    """Return the scores of the model in `directory` on `count` held-out scenes, from every subset of its modalities.

    The score of a subset is the fraction of captions that equal the clauses of the subset. With all modalities, the
    scores also include the fraction of correct words, overall, by class and by word, and recall@1.
    """
    model = load_pretrained(FusionModel, directory, device, torch.float32)
    evaluator = Evaluator(model, FusionProcessor.from_directory(directory), device, batch_size=100)
    subsets = [subset for subset in SUBSETS if set(subset) <= set(evaluator.processor.modalities)]
    scenes = list(generate_scenes(seed, count=count))
    examples = [scene_example(scene).keeping(subsets[-1]) for scene in scenes]
    exact = {}
    for subset in subsets:  # the last has all modalities
        captions = evaluator.captions([example.keeping(subset) for example in examples])
        exact["+".join(subset)] = sum(example.caption == caption for example, caption in captions) / count
    counts = [count_words(example.caption, caption) for example, caption in captions]
    return {
        "seed": seed,
        "samples": count,
        "exact_match": exact["+".join(subsets[-1])],
        "words_right": sum(right for right, _ in counts) / sum(words for _, words in counts),
        "subsets": exact,
        "classes": word_classes(scenes, captions),
        "words": single_words(captions),
        "recall": evaluator.recall(examples),
    }


def word_classes(scenes: Iterable[Scene], captions: Iterable[tuple[Example, str]]) -> dict[str, float]:
    """Return the fraction of correct words of each class (colour, pitch, place, ...)."""
    by_key = {scene.key: scene for scene in scenes}
    total, right = Counter[str](), Counter[str]()
    for example, caption in captions:
        classes = _classes(by_key[example.key])
        names = [name for modality, names in classes.items() if modality in example.present for name in names]
        for name, hit in zip(names, _hits(example.caption, caption), strict=True):
            total[name] += 1
            right[name] += hit
    return {name: right[name] / count for name, count in sorted(total.items())}


def single_words(captions: Iterable[tuple[Example, str]]) -> dict[str, float]:
    """Return, for each word of the references, the fraction of its occurrences that the caption reproduces."""
    total, right = Counter[str](), Counter[str]()
    for example, caption in captions:
        for word, hit in zip(example.caption.split(), _hits(example.caption, caption), strict=True):
            total[word.strip(",.")] += 1
            right[word.strip(",.")] += hit
    return {word: right[word] / count for word, count in sorted(total.items())}


def _hits(reference: str, caption: str) -> list[bool]:
    """Return whether the caption has the same word at the same position, for each word of the reference."""
    return [a == b for a, b in zip_longest(reference.split(), caption.split()) if a is not None]


def _classes(scene: Scene) -> dict[Modality, list[str]]:
    """Return the class of each word of the scene's clauses; words that all captions share are "grammar"."""
    shapes: list[str] = []
    for number, shape in enumerate(scene.shapes):
        shapes += ["grammar"] * (1 + bool(number))  # [and] a
        shapes += ["size", "colour", "form", *["position"] * len(shape.position.split())]
    kind = ["kind"] * len(scene.sound.kind.split())
    return {
        "image": shapes,
        "audio": ["grammar", "grammar", "loudness", "tempo", "pitch", *kind],  # with a
        "text": ["grammar", "grammar", "place", "grammar", "time"],  # in the ... at ...
    }


def shipped_card(figures: Mapping[str, Any], sha256: str) -> str:
    """Return the model card of the shipped model, from the figures of `train_shipped`."""
    report, evaluation = figures["training"], figures["evaluation"]
    training, options = report["training"], report["options"]
    worst = sorted((fraction, word) for word, fraction in evaluation["words"].items() if fraction < 1)[:8]
    shown = ", ".join(f"{word} ({fraction:.2%} correct)" for fraction, word in worst) or "none"
    return "\n".join(
        [
            "---",
            "library_name: mmbeam",
            "license: apache-2.0",
            "tags: [multimodal, captioning]",
            "---",
            "# The small fusion model that ships with mmbeam",
            "",
            "It captions scenes of the procedural corpus from an image, a sound and a short text, or any of the three:",
            "`mmbeam caption --input SHARDS --output OUT`. Its purpose is to demonstrate the path from shards to",
            "captions and to check the captions against known ones.",
            "",
            "## Training",
            "",
            f"`make model`: {training['step']:,} steps of {options['batch_size']} scenes, each rendered once, with "
            f"seed {options['seed']}, in {training['seconds']:,.0f} s including validation",
            "(2 shared cores).",
            f"{report['parameters']:,} parameters, stored in bfloat16; model.safetensors has SHA-256",
            f"`{sha256}`.",
            f"{', '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
            "",
            "The scenes come from `mmbeam.corpus`: one or two of six shapes in eight colours, two sizes and nine",
            "positions; a tone, chirp or noise of three pitches, three tempi and two loudnesses; a text with one of 16",
            "places and one of four times, in six templates and three cases. Each modality is dropped with probability",
            f"{options['modality_dropout']}, together with its clause of the caption.",
            "",
            "## Figures",
            "",
            f"On {evaluation['samples']:,} held-out scenes of seed {evaluation['seed']}, with greedy decoding: exact "
            f"match {evaluation['exact_match']:.2%}, correct words {evaluation['words_right']:.2%}.",
            "",
            "| modalities | exact match with their clauses |",
            "|---|---|",
            *(f"| {name} | {fraction:.2%} |" for name, fraction in evaluation["subsets"].items()),
            "",
            "| class of words | correct |",
            "|---|---|",
            *(f"| {name} | {fraction:.2%} |" for name, fraction in evaluation["classes"].items()),
            "",
            f"Least accurate words: {shown}.",
            "",
            f"| recall@1 among {CANDIDATES}, by cosine similarity | |",
            "|---|---|",
            *(f"| {name} | {fraction:.1%} |" for name, fraction in evaluation["recall"].items()),
            "",
            "figures.json has the accuracy of every word, and the training options.",
            "",
            "## Limits",
            "",
            "The model covers this corpus only: captions of photographs are meaningless. Images are resized to",
            "64 x 64; audio is truncated to the first second, and texts to 64 tokens. Training covered all pairs of",
            "colour and shape; generalisation to unseen combinations was not tested.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the fusion model that ships with mmbeam.", allow_abbrev=False)
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="directory for the model")
    parser.add_argument("--overwrite", action="store_true", help="discard any earlier training in --output")
    parser.add_argument(
        "--evaluate", type=int, default=EVALUATION_SAMPLES, metavar="N", help="number of held-out scenes"
    )
    parser.add_argument("--fusion", help=", ".join(FUSIONS))
    parser.add_argument("--generator", help=", ".join(GENERATOR_KINDS))
    for name, kind in (("steps", int), ("seed", int), ("batch-size", int), ("warmup-steps", int)):
        parser.add_argument(f"--{name}", type=kind, metavar="N")
    for name in ("learning-rate", "weight-decay", "dropout", "modality-dropout", "label-smoothing"):
        parser.add_argument(f"--{name}", type=float, metavar="X")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    values = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    names = {"fusion": "fusion", "generator": "generator_kind"}
    model = {field: values.pop(name) for name, field in names.items() if name in values}
    count, overwrite = values.pop("evaluate"), values.pop("overwrite")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = shipped_options(values.pop("output"), model=model, **values)
    train_shipped(options, overwrite=overwrite, reporter=TrainingLine(sys.stderr), count=count)


if __name__ == "__main__":
    main()
