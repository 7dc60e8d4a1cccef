"""The registry of generators: the family that serves a model, by its configuration's model_type.

To add a family, write a module with a subclass of base.Generator, named as the model_type is (docs/families.md), and
change nothing else; a type that a module of another name serves needs a line in FAMILIES. Models without
a family are found in the lists of transformers: text to text, and any other with its own processor (auto.py).
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from mmbeam.errors import ModelError, did_you_mean
from mmbeam.models.generators.base import Generator
from mmbeam.models.loading import check_weights, quiet_transformers, read_json
from mmbeam.names import Engine
from mmbeam.prompts.ask import Decoding, GeneratorSpec, Instruction, VideoInput

# model_type: module.class, imported when first needed.
FAMILIES: Mapping[str, str] = {
    "blip": "blip.BlipGenerator",
    "blip-2": "blip.Blip2Generator",
    "florence2": "florence2.Florence2Generator",
    "gemma3": "gemma.Gemma3Generator",
    "gemma4": "gemma.Gemma4Generator",
    "idefics3": "smolvlm.SmolVlmGenerator",
    "mmbeam-fusion": "fusion.FusionGenerator",
    "qwen2_5_omni": "qwen.QwenOmniGenerator",
    "qwen2_5_omni_thinker": "qwen.QwenOmniGenerator",
    "qwen2_5_vl": "qwen.QwenVlGenerator",
    "qwen2_audio": "qwen.Qwen2AudioGenerator",
    "qwen2_vl": "qwen.QwenVlGenerator",
    "qwen3_vl": "qwen.QwenVlGenerator",
    "qwen3_vl_moe": "qwen.QwenVlGenerator",
    "smolvlm": "smolvlm.SmolVlmGenerator",
    "vision-encoder-decoder": "vision_encoder_decoder.VisionEncoderDecoderGenerator",
    "voxtral": "voxtral.VoxtralGenerator",
    "whisper": "whisper.WhisperGenerator",
}
# Checkpoints without a family, of model types in these lists.
GENERIC = frozenset(
    (
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
)
# Text to text: any class in these lists, of model types that take text only.
TEXT_FAMILIES: Mapping[str, Mapping[str, str]] = {
    "seq2seq.Seq2SeqGenerator": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "pretrained.CausalGenerator": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
_NOT_TEXT = (
    *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    *("moshi", "musicgen", "musicgen_melody", "seamless_m4t", "seamless_m4t_v2"),
)


def family_of(model_type: str | None, architecture: str | None = None) -> type[Generator]:
    """Return the class for a model_type and an architecture, if known. Raises ModelError for an unsupported one."""
    model_type = model_type or ""
    is_ctc = architecture is not None and architecture == modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES.get(model_type)
    path = "ctc.CtcGenerator" if is_ctc else FAMILIES.get(model_type) or _family_of_module(model_type)
    path = path or _text_family(model_type, architecture)
    path = path or ("auto.AutoGenerator" if model_type in GENERIC else None)
    if path is None:
        suffix = f" with architecture {architecture!r}" if architecture else ""
        raise ModelError(
            f"unsupported model_type {model_type!r}{suffix} for generation{did_you_mean(model_type, FAMILIES)}; "
            "expected one that AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, "
            "AutoModelForCTC, AutoModelForSeq2SeqLM or AutoModelForCausalLM of transformers "
            f"{transformers.__version__} loads. "
            "A new family is one file, mmbeam/models/generators/<model_type>.py: a subclass of "
            "mmbeam.models.generators.base.Generator that describes the model, makes its inputs and weighs them "
            "(docs/families.md)"
        )
    module, _, name = path.rpartition(".")
    family: type[Generator] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return family


def _family_of_module(model_type: str) -> str | None:
    """Return the class that names the type in its model_types, in the module of the type's name, with _ for -."""
    module = model_type.replace("-", "_")
    if not module.isidentifier() or importlib.util.find_spec(f"{__name__}.{module}") is None:
        return None
    for value in vars(importlib.import_module(f"{__name__}.{module}")).values():
        if isinstance(value, type) and issubclass(value, Generator) and model_type in value.model_types:
            return f"{module}.{value.__name__}"
    return None


def _text_family(model_type: str, architecture: str | None) -> str | None:
    """Return the class for a text-only type. BART is in both lists: the architecture decides, or else the order."""
    if model_type in _NOT_TEXT:
        return None
    for path, classes in TEXT_FAMILIES.items():
        if model_type in classes and architecture in (None, classes[model_type]):
            return path
    return None


def describe(directory: Path, video: bool = False) -> GeneratorSpec:
    """Return the spec of a model from the files in `directory`, without its weights.

    With `video`, samples may have videos. A model whose own processor takes videos then runs by it (auto.py), and one
    that takes several images receives the frames; others receive the middle frame. The spec's notes say so.

    Raises ModelError if files are missing, weights are pickled, or the family is unknown.
    """
    quiet_transformers()
    config = read_json(directory, "config.json")
    try:
        family = family_of(config.get("model_type"), _architecture(config))
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from None
    check_weights(directory)
    spec = replace(family.describe(directory, config), family=str(config["model_type"]))
    return _with_video(spec, directory, config) if video and "image" in spec.modalities else spec


def _with_video(spec: GeneratorSpec, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
    if spec.columns:  # it takes features
        return spec
    how: VideoInput = "middle"
    if spec.family in GENERIC:
        auto = importlib.import_module(f"{__name__}.auto")
        how = auto.video_input(directory, spec.family)
        if how != "middle":
            spec = replace(auto.AutoGenerator.describe(directory, config), family=spec.family)
    ways = {
        "video": "videos are passed to the model by the checkpoint's own processor",
        "images": "the frames of a video are passed to the model as several images",
        "middle": "the model takes one image: of a video, its middle frame",
    }
    media = tuple(modality for modality in spec.modalities if modality != "text")
    modalities = (*media, "video", *(modality for modality in spec.modalities if modality == "text"))
    return replace(spec, modalities=modalities, video=how, notes=(*spec.notes, ways[how]))


def load(spec: GeneratorSpec, device: torch.device, dtype: torch.dtype, engine: Engine = "transformers") -> Generator:
    """Return the generator with its weights on `device`. The modules of the engines list the errors."""
    if engine == "vllm":
        generator: Generator = _vllm().load(_family(spec), spec, device, dtype)
        return generator
    return _family(spec).load(spec, device, dtype)


def check_instruction(spec: GeneratorSpec, instruction: Instruction) -> None:
    """Raise UsageError for languages that the model does not support."""
    _family(spec).check(spec, instruction)


def check_engine(engine: Engine, spec: GeneratorSpec, decoding: Decoding, device: str, explain: bool) -> None:
    """Raise UsageError if the engine does not support the model or an option. It does not look at this machine."""
    if engine == "vllm":
        _vllm().check(_family(spec), spec, decoding, device, explain)


def _family(spec: GeneratorSpec) -> type[Generator]:
    if spec.video in ("video", "images"):
        auto: type[Generator] = importlib.import_module(f"{__name__}.auto").AutoGenerator
        return auto
    return family_of(spec.family, _architecture(read_json(Path(spec.directory), "config.json")))


def _vllm() -> Any:
    return importlib.import_module(f"{__name__}.vllm")  # a module above this one


def _architecture(config: Mapping[str, Any]) -> str | None:
    """Return the class of a checkpoint's weights, if its configuration names it."""
    names = config.get("architectures") or [None]
    return None if names[0] is None else str(names[0])
