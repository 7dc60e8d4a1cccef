"""Encoders of transformers as sources of a fusion model: their configuration, their weights, their preprocessing.

What is read from a checkpoint is kept in the fusion model's own files: once saved, it needs the checkpoint
no more. Encoders that take anything else than pictures of one shape, spectrograms of one length, waveforms or
tokens are not for this; their vectors can be computed before, with `mmbeam embed`, and be a source of kind
"features".
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel, AutoTokenizer

from mmbeam.errors import ModelError
from mmbeam.models.encoders.audio import check_layers, receptive_field
from mmbeam.models.fusion.audio import AST, MAX_WAVEFORM, AudioRecipe, Preparation, WaveformRecipe, audio_inputs
from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig
from mmbeam.models.fusion.encoders import HALVES, PretrainedEncoder, encoder_of, output_width
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import (
    read_ast_recipe,
    read_clap_recipe,
    read_image_recipe,
    read_wave_recipe,
    read_whisper_recipe,
)
from mmbeam.models.tokenizing import check_vocabulary, text_limit
from mmbeam.ops.image import Patching
from mmbeam.types import Modality

INPUTS: Mapping[Modality, str] = {"image": "pixel_values", "audio": "input_features", "text": "input_ids"}
SOUNDS: Mapping[str, Callable[[Path], AudioRecipe]] = {  # by the configuration's model_type
    "whisper": read_whisper_recipe,
    "clap_audio_model": read_clap_recipe,
    AST: read_ast_recipe,
}
WAVES = ("wav2vec2", "hubert", "wavlm")  # they hear the waveform itself
PARTS: Mapping[Modality, str] = {"image": "vision", "audio": "audio", "text": "text"}  # of a joint model
NOT_OF_THE_ENCODER = ("transformers_version", "architectures", "dtype", "_name_or_path")
UNUSED = r"(^|\.)(pooler\.|masked_spec_embed$)"  # weights that a checkpoint may lack
ELSE = "compute its vectors with `mmbeam embed`, and train on those"


def read_source(directory: Path, modality: Modality, *, frozen: bool = True, max_tokens: int = 64) -> dict[str, Any]:
    """The source that a checkpoint's encoder of `modality` is: its tower, if it is a joint model such as CLIP.

    Texts are cut to `max_tokens`, or what the encoder takes if that is less. Reads configuration files
    alone. Raises ModelError if there is no such encoder, or it takes another input.
    """
    config = _own_config(directory, modality)
    model = {name: value for name, value in config.to_diff_dict().items() if name not in NOT_OF_THE_ENCODER}
    source: dict[str, Any] = {"modality": modality, "kind": "pretrained", "model": model, "frozen": frozen}
    if modality == "text":
        source["max_tokens"] = min(max_tokens, text_limit(directory, config))
    elif config.model_type in WAVES:
        check_layers(directory, config)
        source["max_tokens"] = MAX_WAVEFORM
    tower = _on_meta(directory, model).model
    _check_input(directory, modality, config.model_type, tower.main_input_name)
    return {**source, "width": output_width(tower)}


def _own_config(directory: Path, modality: Modality) -> Any:
    """The configuration of a checkpoint's encoder, or of the one of its encoders that is of `modality`."""
    full, own = read_config(directory), f"{PARTS[modality]}_config"
    if hasattr(full, own) or not any(hasattr(full, f"{part}_config") for part in PARTS.values()):
        return getattr(full, own, full)
    raise ModelError(f"{directory}: {full.model_type} has no {modality} encoder")


def _check_input(directory: Path, modality: Modality, model_type: str, reads: str) -> None:
    expected = "input_values" if modality == "audio" and model_type in (AST, *WAVES) else INPUTS[modality]
    if reads != expected:
        way = f"; {ELSE}" if modality == "audio" and reads == "input_values" else ""
        raise ModelError(f"{directory}: {model_type} reads {reads}, not {expected}{way}")


def _on_meta(directory: Path, model: Mapping[str, Any]) -> PretrainedEncoder:
    """The encoder without weights, to ask and to try."""
    try:
        with torch.device("meta"):
            return PretrainedEncoder(SourceConfig(modality="text", kind="pretrained", model=model), FusionConfig())
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{directory}: no encoder of {model['model_type']} can be made alone; {ELSE}") from error


def read_preprocessing(directory: Path, source: SourceConfig) -> Preparation:
    """What the checkpoint's own files say is done to the input of `source`, as `read_source` describes it.

    Raises ModelError naming what is missing, unknown, or does not fit the encoder.
    """
    if source.modality == "text":
        return _read_tokenizer(directory, source.max_tokens)
    if source.modality == "image":
        recipe = read_image_recipe(directory)
        size = recipe.crop or recipe.size
        if size is None or isinstance(size, int | Patching):
            raise ModelError(f"{directory}: its pictures differ in shape; {ELSE}")
        _try(directory, source, torch.zeros(1, 3, *size))
        return recipe
    model_type = (source.model or {})["model_type"]
    if model_type in WAVES:
        config = read_config(directory)
        shortest = receptive_field(config.conv_kernel, config.conv_stride)
        return WaveformRecipe(**asdict(read_wave_recipe(directory)), shortest=shortest)
    sound = SOUNDS.get(model_type, read_whisper_recipe)(directory)
    _try(directory, source, audio_inputs([torch.zeros(sound.n_samples)], sound))
    return sound


def _try(directory: Path, source: SourceConfig, values: torch.Tensor) -> None:
    """Raise ModelError unless the encoder takes inputs of this shape; one that looks at values cannot be tried."""
    encoder = _on_meta(directory, source.model or {}).eval()
    try:
        with torch.inference_mode():
            encoder.read(values.to("meta"), torch.ones(1, dtype=torch.bool, device="meta"))
    except NotImplementedError:
        return
    except Exception as error:  # each encoder has its own way to say so
        raise ModelError(
            f"{directory}: its encoder does not take {list(values.shape[1:])}, as its files prepare: {error}"
        ) from error


def _read_tokenizer(directory: Path, max_tokens: int) -> Tokenizer:
    """A model that was trained without a mask, as SigLIP was, reads as many tokens of every text."""
    check_vocabulary(directory)
    try:
        made: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"{directory}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    if not made.is_fast:
        raise ModelError(f"{directory}: its {type(made).__name__} can be no part of another model's files; {ELSE}")
    tokenizer: Tokenizer = made.backend_tokenizer
    tokenizer.no_padding()
    if "attention_mask" not in made.model_input_names:
        tokenizer.enable_padding(length=max_tokens, pad_id=made.pad_token_id, pad_token=made.pad_token)
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # as FusionProcessor has it
    return tokenizer


def load_weights(encoder: nn.Module, modality: Modality, directory: Path) -> None:
    """Copy the weights of a checkpoint (safetensors only) into the PretrainedEncoder of a source.

    Raises ModelError if the checkpoint's architecture differs.
    """
    config, part = read_config(directory), PARTS[modality]
    family = getattr(transformers, HALVES[config.model_type]) if config.model_type in HALVES else AutoModel
    tower = f"{part}_model"
    if (config.model_type, part) == ("blip", "text"):
        family, tower = transformers.BlipForImageTextRetrieval, "text_encoder"
    unused = (UNUSED, rf"^(?!{tower}\.)") if hasattr(config, f"{part}_config") else (UNUSED,)
    model: Any = encoder.model
    full = load_pretrained(family, directory, torch.device("cpu"), torch.float32, ignore_missing=unused)
    try:
        model.load_state_dict(encoder_of(getattr(full, tower, full)).state_dict())
    except RuntimeError as error:
        raise ModelError(f"{directory}: its weights do not fit the {modality} encoder of the model: {error}") from error
