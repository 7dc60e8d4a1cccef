"""The registry of encoder families, by the model_type of a model's configuration.

To add a family: write a subclass of base.Encoder, in a module of this package, and add it to FAMILIES.
"""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mmbeam.errors import ModelError, did_you_mean
from mmbeam.models.encoders.base import Encoder, EncoderSpec
from mmbeam.models.loading import check_weights, quiet_transformers, read_json
from mmbeam.models.recipes import RecipeError
from mmbeam.ops.image import apply_filter

logger = logging.getLogger(__name__)

# model_type: module.class, imported on first use.
FAMILIES: Mapping[str, str] = {
    "mmbeam-fusion": "fusion.FusionEncoder",
    "clip": "joint.ClipEncoder",
    "metaclip_2": "joint.ClipEncoder",
    "siglip": "joint.SiglipEncoder",
    "siglip2": "joint.Siglip2Encoder",
    "embedding_gemma2": "embedding_gemma2.EmbeddingGemma2Encoder",
    "blip": "joint.BlipEncoder",
    "vit": "vision.VisionEncoder",
    "dinov2": "vision.VisionEncoder",
    "dinov2_with_registers": "vision.VisionEncoder",
    "dinov3_vit": "vision.VisionEncoder",
    "dinov3_convnext": "vision.VisionEncoder",
    "resnet": "vision.VisionEncoder",
    "convnext": "vision.VisionEncoder",
    "convnextv2": "vision.VisionEncoder",
    "videomae": "video.VideoEncoder",
    "timesformer": "video.VideoEncoder",
    "vivit": "video.VideoEncoder",
    "vjepa2": "video.VideoEncoder",
    "xclip": "video.XClipEncoder",
    "clap": "joint.ClapEncoder",
    "whisper": "audio.WhisperEncoder",
    "audio-spectrogram-transformer": "audio.AstEncoder",
    "wav2vec2": "audio.SpeechEncoder",
    "hubert": "audio.SpeechEncoder",
    "wavlm": "audio.SpeechEncoder",
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
    "word-vectors": "word_vectors.WordVectorsEncoder",
    "sentence-transformers": "text.TextEncoder",
    "open_clip": "packages.OpenClipEncoder",
    "timm": "packages.TimmEncoder",
}
# Classes that do what a family cannot: by default with transformers' own processors.
GENERIC: Mapping[str, str] = {"sentence-transformers": "packages.SentencePackageEncoder"}

READS_MODULES_JSON = ("embedding_gemma2",)  # families whose checkpoints have modules.json too and that read it


def family_of(model_type: str | None, is_generic: bool = False) -> type[Encoder]:
    """Return the class that serves models of this type, or with `is_generic` the one of types without a family.

    Raises ModelError for a type that neither a family nor AutoModel of the installed transformers knows.
    """
    is_generic = is_generic or (model_type not in FAMILIES and model_type in MODEL_MAPPING_NAMES)
    if not is_generic and (model_type is None or model_type not in FAMILIES):
        guess = did_you_mean(model_type or "", FAMILIES) or did_you_mean(model_type or "", MODEL_MAPPING_NAMES)
        raise ModelError(
            f"unsupported model_type {model_type!r} for embedding; expected one that AutoModel of transformers "
            f"{transformers.__version__} loads{guess}. Code in a checkpoint is never run"
        )
    path = GENERIC.get(str(model_type), "auto.AutoEncoder") if is_generic else FAMILIES[str(model_type)]
    module, _, name = path.rpartition(".")
    family: type[Encoder] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return family


def describe(directory: Path, package: str | None = None) -> EncoderSpec:
    """Return the spec of a model from the configuration files in `directory`, without loading weights.

    `package` is the one whose files these are, "open_clip" or "timm", if it is not transformers.

    A directory with modules.json is a sentence-transformers model, whatever model it wraps (but for
    READS_MODULES_JSON). One with neither modules.json nor config.json has word vectors (word_vectors.py).
    Raises ModelError if files are missing, weights are pickled, or the family is unsupported.
    """
    quiet_transformers()
    config = read_json(directory, "config.json", required=False)
    model_type = config.get("model_type") if (directory / "config.json").exists() else "word-vectors"
    if (directory / "modules.json").is_file() and model_type not in READS_MODULES_JSON:
        model_type = "sentence-transformers"
    model_type = package or model_type
    try:
        family = family_of(model_type)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from None
    if (
        config and package is None
    ):  # a sentence-transformers model may have its weights in a folder that modules.json names
        check_weights(directory)
    try:
        spec = family.describe(directory, config)
    except RecipeError as error:  # the checkpoint's own processor does what the family's kernels cannot
        try:
            spec = family_of(model_type, is_generic=True).describe(directory, config)
        except ModelError as second_error:
            logger.info("%s: nor by its own processor: %s", directory, second_error)
            raise error from None
        if "image" not in spec.dims and model_type not in GENERIC:
            raise
        by = (
            "it runs by the package"
            if model_type in GENERIC
            else "images are preprocessed by the checkpoint's own processor"
        )
        spec = replace(spec, notes=(f"{error}; {by}", *spec.notes), is_generic=True)
    return replace(spec, family=str(model_type))


def load(
    spec: EncoderSpec,
    device: torch.device,
    dtype: torch.dtype,
    image_filter: tuple[str, float] | None = None,
) -> Encoder:
    """Return the encoder with its weights on `device`.

    `image_filter`, ("median", size) or ("gaussian", sigma), is applied to images before their preprocessing.
    """
    encoder = family_of(spec.family, spec.is_generic).load(spec, device, dtype)
    if image_filter is not None:
        name, value = image_filter
        encoder.pixel_filter = partial(apply_filter, name=name, value=value)
    return encoder
