"""Encoders of transformers as sources of a fusion model: their configuration, their weights, their preprocessing.

What is read from a checkpoint is kept in the fusion model's own files: once saved, it needs the checkpoint
no more. Encoders that take anything else than pictures, Whisper's spectrograms or tokens are not for this;
their vectors can be computed before, with `mmbeam embed`, and be a source of kind "features".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from mmbeam.errors import ModelError
from mmbeam.models.audio_recipe import read_whisper_recipe
from mmbeam.models.encoders.text import text_limit
from mmbeam.models.fusion.configuration import SourceConfig
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.pretrained import HALVES, build_tower, encoder_of
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.models.image_recipe import read_image_recipe
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.tokenizing import check_vocabulary
from mmbeam.ops.image import Patching
from mmbeam.types import Modality

INPUTS: Mapping[Modality, str] = {"image": "pixel_values", "audio": "input_features", "text": "input_ids"}
PARTS: Mapping[Modality, str] = {"image": "vision", "audio": "audio", "text": "text"}  # of a joint model
NOT_OF_THE_ENCODER = ("transformers_version", "architectures", "dtype", "_name_or_path")
UNUSED = r"(^|\.)pooler\."  # weights that a checkpoint may lack
ELSE = "compute its vectors with `mmbeam embed`, and train on those"


def read_source(directory: Path, modality: Modality, *, frozen: bool = True, max_tokens: int = 64) -> dict[str, Any]:
    """The source that a checkpoint's encoder of `modality` is: its tower, if it is a joint model such as CLIP.

    Texts are cut to `max_tokens`, or what the encoder takes if that is less. Reads configuration files
    alone. Raises ModelError if there is no such encoder, or it takes another input.
    """
    config = _own_config(read_config(directory), modality)
    model = {name: value for name, value in config.to_diff_dict().items() if name not in NOT_OF_THE_ENCODER}
    source: dict[str, Any] = {"modality": modality, "kind": "pretrained", "model": model, "frozen": frozen}
    if modality == "text":
        source["max_tokens"] = min(max_tokens, text_limit(directory, config))
    reads = _on_meta(directory, model).main_input_name
    if reads != INPUTS[modality]:
        raise ModelError(f"{directory}: {config.model_type} reads {reads}, not {INPUTS[modality]}; {ELSE}")
    return source


def _own_config(full: Any, modality: Modality) -> Any:
    return getattr(full, f"{PARTS[modality]}_config", full)


def _on_meta(directory: Path, model: Mapping[str, Any]) -> Any:
    """The encoder without weights, to ask and to try."""
    try:
        with torch.device("meta"):
            return build_tower(model).eval()
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{directory}: no encoder of {model['model_type']} can be made alone; {ELSE}") from error


def read_preprocessing(processor: FusionProcessor, name: str, directory: Path) -> None:
    """Give `processor` what the checkpoint's own files say is done to the input of the source `name`.

    Raises ModelError naming what is missing, unknown, or does not fit the encoder.
    """
    source = processor.sources[name]
    if source.modality == "text":
        processor.tokenizers[name] = _read_tokenizer(directory)
    elif source.modality == "image":
        recipe = read_image_recipe(directory)
        size = recipe.crop or recipe.size
        if size is None or isinstance(size, int | Patching):
            raise ModelError(f"{directory}: its pictures differ in shape; {ELSE}")
        _try(directory, source, (3, *size))
        processor.images[name] = recipe
    else:
        sound = read_whisper_recipe(directory)
        _try(directory, source, (sound.n_mels, sound.n_samples // sound.hop_length))
        processor.sounds[name] = sound


def _try(directory: Path, source: SourceConfig, shape: tuple[int, ...]) -> None:
    """Raise ModelError unless the encoder takes inputs of this shape."""
    tower = _on_meta(directory, source.model or {})
    try:
        with torch.inference_mode():
            tower(torch.zeros(1, *shape, device="meta"))
    except Exception as error:  # each encoder has its own way to say so
        raise ModelError(
            f"{directory}: its encoder does not take {list(shape)}, as its files prepare: {error}"
        ) from error


def _read_tokenizer(directory: Path) -> Tokenizer:
    check_vocabulary(directory)
    try:
        made: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"{directory}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    if not made.is_fast:
        raise ModelError(f"{directory}: its {type(made).__name__} can be no part of another model's files; {ELSE}")
    tokenizer: Tokenizer = made.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # as FusionProcessor has it
    return tokenizer


def load_weights(model: FusionModel, name: str, directory: Path) -> None:
    """Put the checkpoint's weights (safetensors only) into the encoder of the source `name`.

    Raises ModelError if they are of another configuration.
    """
    config, part = read_config(directory), PARTS[model.sources[name].modality]
    family = getattr(transformers, HALVES[config.model_type]) if config.model_type in HALVES else AutoModel
    unused = (UNUSED, rf"^(?!{part}_model\.)") if hasattr(config, f"{part}_config") else (UNUSED,)
    full = load_pretrained(family, directory, torch.device("cpu"), torch.float32, ignore_missing=unused)
    encoder: Any = model.encoders[name]
    try:
        encoder.model.load_state_dict(encoder_of(getattr(full, f"{part}_model", full)).state_dict())
    except RuntimeError as error:
        raise ModelError(f"{directory}: its weights are not those of source {name}: {error}") from error
