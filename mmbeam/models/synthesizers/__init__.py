"""The registry of synthesizers, models that make images or sounds of texts: pipelines of diffusers, and VITS.

To add a family: write a subclass of base.Synthesizer in a module of this package, and choose it in `_synthesizer`.
"""

import importlib
import math
from pathlib import Path

import torch

from mmbeam.config import Synthesis
from mmbeam.errors import UsageError
from mmbeam.models.loading import quiet_transformers, read_json
from mmbeam.models.synthesizers.base import Synthesizer, SynthesizerSpec
from mmbeam.names import FORMATS_OF_SYNTHESIS, SynthesisModality

SPEECH = ("VitsModel",)
SAMPLING_RATES = range(4_000, 192_001)  # Hz; libsndfile writes no FLAC above 655,350


def describe(directory: Path, synthesis: Synthesis) -> SynthesizerSpec:
    """Return the spec of a model from the configuration files in `directory`, without loading weights.

    Raises UsageError for a modality that the model cannot make or contradictory options, ModelError if files are
    missing or unusable.
    """
    quiet_transformers()
    formats = FORMATS_OF_SYNTHESIS[synthesis.modality]
    if synthesis.format is not None and synthesis.format not in formats:
        raise UsageError(
            f"`format` {synthesis.format}: expected one of {', '.join(formats)} for `modality` {synthesis.modality}"
        )
    if synthesis.quality is not None and synthesis.format not in ("jpg", "webp"):
        raise UsageError("`quality` needs `format` jpg or webp")
    if synthesis.sampling_rate is not None and synthesis.modality != "audio":
        raise UsageError("`sample_rate` needs `modality` audio")
    if synthesis.sampling_rate is not None and synthesis.sampling_rate not in SAMPLING_RATES:
        low, high = SAMPLING_RATES[0], SAMPLING_RATES[-1]
        raise UsageError(f"`sample_rate` {synthesis.sampling_rate}: expected {low} to {high} Hz")
    if synthesis.guidance is not None and not math.isfinite(synthesis.guidance):
        raise UsageError(f"`guidance` {synthesis.guidance}: expected a finite number")
    modality, cls = _synthesizer(directory)
    if modality != synthesis.modality:
        raise UsageError(f"`modality` {synthesis.modality}: {directory} makes {modality}")
    if modality == "audio" and (synthesis.steps, synthesis.guidance) != (None, None):
        raise UsageError("`steps` and `guidance` need `modality` image")
    return cls.describe(directory, synthesis)


def load(spec: SynthesizerSpec, device: torch.device, dtype: torch.dtype) -> Synthesizer:
    """Return the synthesizer with its weights on `device`."""
    _, cls = _synthesizer(Path(spec.directory))
    return cls.load(spec, device, dtype)


def _synthesizer(directory: Path) -> tuple[SynthesisModality, type[Synthesizer]]:
    """Return what the model in `directory` makes, and the class that runs it. Raises UsageError."""
    if read_json(directory, "model_index.json", required=False):
        cls: type[Synthesizer] = importlib.import_module(f"{__name__}.diffusion").DiffusionSynthesizer
        return "image", cls
    names = read_json(directory, "config.json", required=False).get("architectures") or [""]
    if names[0] in SPEECH:
        cls = importlib.import_module(f"{__name__}.speech").SpeechSynthesizer
        return "audio", cls
    raise UsageError(
        f"`model` {directory}: expected a pipeline of diffusers (model_index.json) for images, or "
        f"{' or '.join(SPEECH)} of transformers for sounds, found {names[0] or 'neither'}"
    )
