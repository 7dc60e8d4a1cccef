"""The families of generators: which module serves a model, by its configuration's model_type.

To add a family: write a module with a subclass of base.Generator, called as the model_type is; docs/families.md
shows how. Nothing else changes; a line is added here for a type that is served by a module of another name.
What has no family of its own and is text to text alone, transformers' lists say.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto import modeling_auto

from mmbeam.config import Engine
from mmbeam.errors import ModelError
from mmbeam.models.generators.base import Generator
from mmbeam.models.loading import check_weights, quiet_transformers, read_json
from mmbeam.prompts.ask import Decoding, GeneratorSpec, Instruction

# model_type: module.class, imported when first needed.
FAMILIES: Mapping[str, str] = {
    "blip": "blip.BlipGenerator",
    "blip-2": "blip2.Blip2Generator",
    "florence2": "florence2.Florence2Generator",
    "gemma3": "gemma3.Gemma3Generator",
    "gemma4": "gemma4.Gemma4Generator",
    "idefics3": "smolvlm.SmolVlmGenerator",
    "mmbeam-fusion": "fusion.FusionGenerator",
    "qwen2_5_omni": "qwen_omni.QwenOmniGenerator",
    "qwen2_5_omni_thinker": "qwen_omni.QwenOmniGenerator",
    "qwen2_5_vl": "qwen_vl.QwenVlGenerator",
    "qwen2_audio": "qwen2_audio.Qwen2AudioGenerator",
    "qwen2_vl": "qwen_vl.QwenVlGenerator",
    "qwen3_vl": "qwen_vl.QwenVlGenerator",
    "qwen3_vl_moe": "qwen_vl.QwenVlGenerator",
    "smolvlm": "smolvlm.SmolVlmGenerator",
    "vision-encoder-decoder": "vision_encoder_decoder.VisionEncoderDecoderGenerator",
    "voxtral": "voxtral.VoxtralGenerator",
    "whisper": "whisper.WhisperGenerator",
}
# Text to text: any class of these lists, of the model types that take nothing but text.
TEXT_FAMILIES: Mapping[str, Mapping[str, str]] = {
    "seq2seq.Seq2SeqGenerator": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal.CausalGenerator": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
_NOT_TEXT = (
    *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    *("moshi", "musicgen", "musicgen_melody", "seamless_m4t", "seamless_m4t_v2"),
)


def family_of(model_type: str | None, architecture: str | None = None) -> type[Generator]:
    """The class that serves models of this type, and architecture, if known; ModelError if there is none."""
    model_type = model_type or ""
    path = FAMILIES.get(model_type) or _in_its_file(model_type) or _text_family(model_type, architecture)
    if path is None:
        raise ModelError(
            f"no generator for model_type {model_type!r} with architecture {architecture!r}; there are "
            f"{', '.join(sorted(FAMILIES))}, and of models of text alone those that transformers has as "
            "...ForConditionalGeneration, ...ForCausalLM or ...LMHeadModel. "
            "A new family is one file, mmbeam/models/generators/<model_type>.py: a subclass of "
            "mmbeam.models.generators.base.Generator that describes the model, says what goes into it and what that "
            "weighs (docs/families.md)"
        )
    module, _, name = path.rpartition(".")
    family: type[Generator] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return family


def _in_its_file(model_type: str) -> str | None:
    """The class that says it serves the type, in the module that is called like it, with _ for -."""
    module = model_type.replace("-", "_")
    if not module.isidentifier() or importlib.util.find_spec(f"{__name__}.{module}") is None:
        return None
    found = vars(importlib.import_module(f"{__name__}.{module}"))
    classes = [each for each in found.values() if isinstance(each, type) and issubclass(each, Generator)]
    return next((f"{module}.{each.__name__}" for each in classes if model_type in each.model_types), None)


def _text_family(model_type: str, architecture: str | None) -> str | None:
    """Of a BART there are an encoder-decoder and a decoder: the architecture decides, or else the first of them."""
    if model_type in _NOT_TEXT:
        return None
    found = {path: classes[model_type] for path, classes in TEXT_FAMILIES.items() if model_type in classes}
    return next((path for path, name in found.items() if architecture in (None, name)), None)


def describe(directory: Path) -> GeneratorSpec:
    """What is known of the model in `directory` before its weights are loaded.

    Raises ModelError if files are missing, weights are pickled, or the family is unknown.
    """
    quiet_transformers()
    config = read_json(directory, "config.json")
    try:
        family = family_of(config.get("model_type"), _architecture(config))
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from None
    check_weights(directory)
    return replace(family.describe(directory, config), family=str(config["model_type"]))


def load(spec: GeneratorSpec, device: torch.device, dtype: torch.dtype, engine: Engine = "transformers") -> Generator:
    """The generator with its weights on `device`. For what the engines raise see their modules."""
    if engine == "vllm":
        loaded: Generator = _vllm().load(_family(spec), spec, device, dtype)
        return loaded
    return _family(spec).load(spec, device, dtype)


def check_instruction(spec: GeneratorSpec, instruction: Instruction) -> None:
    """Raise UsageError for languages that the model cannot be asked for."""
    _family(spec).check(spec, instruction)


def check_engine(engine: Engine, spec: GeneratorSpec, decoding: Decoding, device: str, explain: bool) -> None:
    """Raise UsageError for what the engine cannot do with the model; nothing is looked for on this machine."""
    if engine == "vllm":
        _vllm().check(_family(spec), spec, decoding, device, explain)


def _family(spec: GeneratorSpec) -> type[Generator]:
    return family_of(spec.family, _architecture(read_json(Path(spec.directory), "config.json")))


def _vllm() -> Any:
    """Its module, which knows the families and so comes after them."""
    return importlib.import_module(f"{__name__}.vllm")


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The class whose weights a checkpoint holds, if its configuration says so."""
    found = config.get("architectures") or [None]
    return None if found[0] is None else str(found[0])
