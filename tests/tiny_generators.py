"""Tiny generators saved as checkpoints: fusion models with random weights, and samples for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import shards
from tiny_fusion import media, tiny_config, tiny_model

from mmbeam.models.fusion import FusionProcessor
from mmbeam.types import Audio, Sample

TEXT = "a red circle and a low tone says yes no blue square high chirp left right"


def save_fusion(directory: Path, sources: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Save a fusion model whose random captions depend on every source, and return its directory."""
    sources = media(text="transformer") if sources is None else sources
    parsed = tiny_config(sources).parsed_sources()
    processor = FusionProcessor.fit(parsed, [TEXT] * 3, vocab_size=300)
    tiny_model(sources, vocab_size=processor.vocab_size, **options).save_pretrained(directory)
    processor.save(directory)
    return directory


def features(**columns: tuple[str, int, bool]) -> dict[str, Any]:
    """The sources of a model that reads columns, each with its modality, width, and whether it has tokens."""
    return {
        name: {"modality": modality, "kind": "features", "width": width, "tokens": tokens}
        for name, (modality, width, tokens) in columns.items()
    }


def make_sample(index: int, without: str = "") -> Sample:
    """A sample with an image of one of three sizes, audio and text, except those named in `without`."""
    wave = shards.natural_sound(index, 0.25 * (1 + index % 3), 8000)
    made: dict[str, Any] = {
        "image": shards.natural_image(index, 40 + 8 * (index % 3), 48),
        "audio": Audio(waves={8000: wave}, seconds=len(wave) / 8000),
        "text": " ".join(np.random.default_rng(index).choice(TEXT.split(), index % 7 + 1)),
    }
    kept = {name: value for name, value in made.items() if name not in without.split()}
    return Sample(key=str(index), shard="s.tar", offset=index * 512, present=frozenset(kept), **kept)  # type: ignore[arg-type]
