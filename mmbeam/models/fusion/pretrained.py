"""Encoders of transformers as sources of a fusion model: their configuration, weights and preprocessing.

All of it is saved with the fusion model, which then no longer needs the checkpoint. Supported inputs are images
of one shape, spectrograms of one length, waveforms, and tokens. For any other encoder, compute vectors with
`mmbeam embed` and use a source of kind "features".
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel

from mmbeam.errors import ModelError
from mmbeam.models.fusion.audio import AST, MAX_WAVEFORM, AudioRecipe, Preparation, WaveformRecipe, audio_inputs
from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig
from mmbeam.models.fusion.encoders import TOWER_CLASSES, PretrainedEncoder, output_width, tower_of
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import (
    check_layers,
    read_ast_recipe,
    read_clap_recipe,
    read_image_recipe,
    read_wave_recipe,
    read_whisper_recipe,
    receptive_field,
)
from mmbeam.models.tokenizing import load_tokenizer, text_limit
from mmbeam.names import Modality
from mmbeam.ops.image import Patching

INPUTS: Mapping[Modality, str] = {"image": "pixel_values", "audio": "input_features", "text": "input_ids"}
AUDIO_READERS: Mapping[str, Callable[[Path], AudioRecipe]] = {  # by model_type
    "whisper": read_whisper_recipe,
    "clap_audio_model": read_clap_recipe,
    AST: read_ast_recipe,
}
WAVEFORM_MODELS = ("wav2vec2", "hubert", "wavlm")  # by model_type; their input is the waveform
PARTS: Mapping[Modality, str] = {"image": "vision", "audio": "audio", "text": "text"}  # of a joint model
IGNORED_FIELDS = ("transformers_version", "architectures", "dtype", "_name_or_path")  # of a configuration
UNUSED = r"(^|\.)(pooler\.|masked_spec_embed$)"  # weights that a checkpoint may lack
ADVICE = "compute its vectors with `mmbeam embed`, and train on those"


def read_source(directory: Path, modality: Modality, *, frozen: bool = True, max_tokens: int = 64) -> dict[str, Any]:
    """Return the source for a checkpoint's encoder of `modality`, which may be one tower of a model such as CLIP.

    Texts are truncated to `max_tokens`, or to the encoder's maximum if that is less. Only configuration files are
    read. Raises ModelError if there is no such encoder, or its input is not supported.
    """
    full, part = read_config(directory), f"{PARTS[modality]}_config"
    if not hasattr(full, part) and any(hasattr(full, f"{name}_config") for name in PARTS.values()):
        raise ModelError(f"{directory}: expected a model with an encoder for {modality}, found {full.model_type}")
    config = getattr(full, part, full)
    model = {name: value for name, value in config.to_diff_dict().items() if name not in IGNORED_FIELDS}
    source: dict[str, Any] = {"modality": modality, "kind": "pretrained", "model": model, "frozen": frozen}
    if modality == "text":
        source["max_tokens"] = min(max_tokens, text_limit(directory, config))
    elif config.model_type in WAVEFORM_MODELS:
        check_layers(directory, config)
        source["max_tokens"] = MAX_WAVEFORM
    tower = _on_meta(directory, model).model
    takes_values = modality == "audio" and config.model_type in (AST, *WAVEFORM_MODELS)
    expected, actual = "input_values" if takes_values else INPUTS[modality], tower.main_input_name
    if actual != expected:
        advice = f"; {ADVICE}" if modality == "audio" and actual == "input_values" else ""
        raise ModelError(f"{directory}: {config.model_type} takes {actual}, expected {expected}{advice}")
    return {**source, "width": output_width(tower)}


def _on_meta(directory: Path, model: Mapping[str, Any]) -> PretrainedEncoder:
    """Return the encoder without weights."""
    try:
        with torch.device("meta"):
            return PretrainedEncoder(SourceConfig(modality="text", kind="pretrained", model=model), FusionConfig())
    except Exception as error:  # transformers has no common base of errors
        raise ModelError(
            f"{directory}: {model['model_type']} cannot be built as an encoder of its own; {ADVICE}"
        ) from error


def read_preprocessing(directory: Path, source: SourceConfig) -> Preparation:
    """Return the preprocessing of a source that `read_source` returned, from the checkpoint's files.

    Raises ModelError naming what is missing, unknown, or does not fit the encoder.
    """
    if source.modality == "text":
        return _read_tokenizer(directory, source.max_tokens)
    if source.modality == "image":
        recipe = read_image_recipe(directory)
        size = recipe.crop or recipe.size
        if size is None or isinstance(size, int | Patching):
            raise ModelError(f"{directory}: the preprocessed images differ in shape; {ADVICE}")
        _try(directory, source, torch.zeros(1, 3, *size))
        return recipe
    model_type = (source.model or {})["model_type"]
    if model_type in WAVEFORM_MODELS:
        config = read_config(directory)
        shortest = receptive_field(config.conv_kernel, config.conv_stride)
        return WaveformRecipe(**asdict(read_wave_recipe(directory)), shortest=shortest)
    audio = AUDIO_READERS.get(model_type, read_whisper_recipe)(directory)
    _try(directory, source, audio_inputs([torch.zeros(audio.n_samples)], audio))
    return audio


def _try(directory: Path, source: SourceConfig, values: torch.Tensor) -> None:
    """Raise ModelError unless the encoder takes inputs of this shape. An encoder that reads values is not tried."""
    encoder = _on_meta(directory, source.model or {}).eval()
    try:
        with torch.inference_mode():
            encoder.hidden_states(values.to("meta"), torch.ones(1, dtype=torch.bool, device="meta"))
    except NotImplementedError:
        return
    except Exception as error:  # the error depends on the encoder
        raise ModelError(
            f"{directory}: the encoder does not take {list(values.shape[1:])}, the output of its preprocessing: {error}"
        ) from error


def _read_tokenizer(directory: Path, max_tokens: int) -> Tokenizer:
    """Return the tokenizer. For a model trained without attention masks, such as SigLIP, it pads to `max_tokens`."""
    loaded = load_tokenizer(directory)
    if not loaded.is_fast:
        raise ModelError(
            f"{directory}: expected a tokenizer with tokenizer.json, found {type(loaded).__name__}; {ADVICE}"
        )
    tokenizer: Tokenizer = loaded.backend_tokenizer
    tokenizer.no_padding()
    if "attention_mask" not in loaded.model_input_names:
        tokenizer.enable_padding(length=max_tokens, pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # as in FusionProcessor
    return tokenizer


def load_weights(encoder: nn.Module, modality: Modality, directory: Path) -> None:
    """Copy the weights of a checkpoint (safetensors only) into the PretrainedEncoder of a source.

    Raises ModelError if the checkpoint's architecture differs.
    """
    config, part = read_config(directory), PARTS[modality]
    name = TOWER_CLASSES.get(config.model_type)
    family = AutoModel if name is None else getattr(transformers, name)
    tower = f"{part}_model"
    if (config.model_type, part) == ("blip", "text"):
        family, tower = transformers.BlipForImageTextRetrieval, "text_encoder"
    unused = (UNUSED, rf"^(?!{tower}\.)") if hasattr(config, f"{part}_config") else (UNUSED,)
    model: Any = encoder.model
    full = load_pretrained(family, directory, torch.device("cpu"), torch.float32, ignore_missing=unused)
    try:
        model.load_state_dict(tower_of(getattr(full, tower, full)).state_dict())
    except RuntimeError as error:
        raise ModelError(f"{directory}: its weights do not fit the {modality} encoder of the model: {error}") from error
