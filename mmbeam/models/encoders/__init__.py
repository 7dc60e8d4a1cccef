"""The families of encoders: which module serves a model, by its configuration's model_type.

To add a family: write a module with a subclass of base.Encoder and name it here. Nothing else changes.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoder, EncoderSpec
from mmbeam.models.loading import check_weights, quiet_transformers, read_json
from mmbeam.models.word_vectors import has_word_vectors

# model_type: module.class, imported when first needed.
FAMILIES: Mapping[str, str] = {
    "mmbeam-fusion": "fusion.FusionEncoder",
    "clip": "clip.ClipEncoder",
    "metaclip_2": "clip.MetaClip2Encoder",
    "siglip": "siglip.SiglipEncoder",
    "siglip2": "siglip2.Siglip2Encoder",
    "embedding_gemma2": "embedding_gemma2.EmbeddingGemma2Encoder",
    "blip": "blip.BlipEncoder",
    "vit": "vision.VisionEncoder",
    "dinov2": "vision.VisionEncoder",
    "dinov2_with_registers": "vision.VisionEncoder",
    "dinov3_vit": "vision.VisionEncoder",
    "dinov3_convnext": "vision.VisionEncoder",
    "resnet": "vision.VisionEncoder",
    "convnext": "vision.VisionEncoder",
    "convnextv2": "vision.VisionEncoder",
    "clap": "clap.ClapEncoder",
    "whisper": "whisper.WhisperEncoder",
    "audio-spectrogram-transformer": "ast.AstEncoder",
    "wav2vec2": "speech.SpeechEncoder",
    "hubert": "speech.SpeechEncoder",
    "wavlm": "speech.SpeechEncoder",
    "bert": "text.TextEncoder",
    "roberta": "text.TextEncoder",
    "xlm-roberta": "text.TextEncoder",
    "distilbert": "text.TextEncoder",
    "mpnet": "text.TextEncoder",
    "modernbert": "text.TextEncoder",
    "albert": "text.TextEncoder",
    "deberta-v2": "text.TextEncoder",
    "electra": "text.TextEncoder",
    "t5": "text.TextEncoder",
    "mt5": "text.TextEncoder",
    "umt5": "text.TextEncoder",
    "word-vectors": "words.WordsEncoder",
    "sentence-transformers": "text.TextEncoder",
}

OWN_MODULES = ("embedding_gemma2",)  # families that read modules.json themselves


def family_of(model_type: str | None) -> type[Encoder]:
    """The class that serves models of this type; ModelError if there is none."""
    if model_type is None or model_type not in FAMILIES:
        raise ModelError(
            f"no encoder for model_type {model_type!r}; there are {', '.join(sorted(FAMILIES))}. "
            "A new family is a subclass of mmbeam.models.encoders.base.Encoder, named in FAMILIES"
        )
    module, _, name = FAMILIES[model_type].rpartition(".")
    family: type[Encoder] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return family


def describe(directory: Path) -> EncoderSpec:
    """What is known of the model in `directory` before its weights are loaded.

    A directory with modules.json is a sentence-transformers model, whatever model it wraps (but for
    OWN_MODULES); one of word vectors (word_vectors.py) has neither that nor config.json.
    Raises ModelError if files are missing, weights are pickled, or the family is unknown.
    """
    quiet_transformers()
    sentence, words = (directory / "modules.json").is_file(), has_word_vectors(directory)
    config = read_json(directory, "config.json", required=not (sentence or words))
    sentence = sentence and config.get("model_type") not in OWN_MODULES
    model_type = "sentence-transformers" if sentence else "word-vectors" if words else config.get("model_type")
    try:
        family = family_of(model_type)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from None
    if config:  # of a sentence-transformers model the weights may lie in a folder that modules.json names
        check_weights(directory)
    return replace(family.describe(directory, config), family=str(model_type))


def load(
    spec: EncoderSpec,
    device: torch.device,
    dtype: torch.dtype,
    image_filter: tuple[str, float] | None = None,
) -> Encoder:
    """The encoder with its weights on `device`.

    `image_filter`, ("median", size) or ("gaussian", sigma), is applied to pictures before its preprocessing.
    """
    encoder = family_of(spec.family).load(spec, device, dtype)
    encoder.image_filter = image_filter
    return encoder
