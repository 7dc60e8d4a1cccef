"""Images by the text-to-image pipelines of diffusers: latent diffusion with any of their schedulers."""

import copy
import importlib
import importlib.util
import inspect
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image

from mmbeam.config import Synthesis
from mmbeam.errors import ModelError, SampleError
from mmbeam.models.loading import check_component, read_json
from mmbeam.models.synthesizers.base import Encoded, Prompt, Synthesizer, SynthesizerSpec

DEFAULT_QUALITY = 95
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # of a pipeline's components; others are code of its own


class DiffusionSynthesizer(Synthesizer):
    """A pipeline of diffusers. Each sample has a generator on the CPU, so every device draws the same noise."""

    pipeline: Any
    counter: Any  # a copy of its first tokenizer, None if it has none
    counting: Lock

    @classmethod
    def describe(cls, directory: Path, synthesis: Synthesis) -> SynthesizerSpec:
        """Read model_index.json; raise ModelError for a pipeline that takes more than a text, or has its own code."""
        if importlib.util.find_spec("diffusers") is None:
            raise ModelError(f"{directory}: needs the package diffusers; run `pip install 'mmbeam[diffusers]'`")
        index = read_json(directory, "model_index.json")
        name = index.get("_class_name")
        diffusers = importlib.import_module("diffusers")
        pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
        parameters = inspect.signature(pipeline.__call__).parameters if inspect.isclass(pipeline) else {}
        if not {"prompt", "generator", "output_type"} <= set(parameters) or "image" in parameters:
            raise ModelError(
                f"{directory}/model_index.json: expected a text-to-image pipeline of diffusers, found {name!r}"
            )
        for component, value in index.items():
            library = value[0] if isinstance(value, list) and value else None
            if library is not None and library not in _LIBRARIES:
                raise ModelError(
                    f"{directory}/model_index.json: {component} needs code of {library!r}, which is not run; expected "
                    "classes of diffusers and transformers"
                )
        for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
            check_component(folder)
        limit = read_json(directory, "tokenizer/tokenizer_config.json", required=False).get("model_max_length")
        return SynthesizerSpec(
            family=str(name),
            directory=str(directory),
            synthesis=replace(
                synthesis,
                format=synthesis.format or "png",
                quality=synthesis.quality or (DEFAULT_QUALITY if synthesis.format in ("jpg", "webp") else None),
            ),
            max_tokens=int(limit) if isinstance(limit, int) and limit < 1 << 20 else None,
        )

    @classmethod
    def load(cls, spec: SynthesizerSpec, device: torch.device, dtype: torch.dtype) -> "DiffusionSynthesizer":
        """Load the pipeline: safetensors only, without its own code."""
        diffusers = importlib.import_module("diffusers")
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        model = cls(spec, device, dtype)
        try:
            model.pipeline = getattr(diffusers, spec.family).from_pretrained(
                spec.directory,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                low_cpu_mem_usage=False,  # True needs the package accelerate
            )
        except Exception as error:  # diffusers raises errors of many types
            raise ModelError(f"{spec.directory}: {type(error).__name__}: {error}") from error
        model.pipeline.set_progress_bar_config(disable=True)
        model.pipeline.to(device)
        # Truncation and padding are states of a tokenizer, and the pipeline sets them while other threads count.
        model.counter, model.counting = copy.deepcopy(getattr(model.pipeline, "tokenizer", None)), Lock()
        return model

    def num_tokens(self, text: str) -> int:
        """Return the number of tokens by the pipeline's first tokenizer."""
        if self.counter is None:
            return len(text)
        with self.counting:
            return len(self.counter(text, truncation=False, verbose=False).input_ids)

    def compute(self, prompts: Sequence[Prompt]) -> list[Any]:
        """Return an image [height, width, 3] of uint8 for each prompt, or why it has none."""
        synthesis = self.spec.synthesis
        chosen = {"num_inference_steps": synthesis.steps, "guidance_scale": synthesis.guidance}
        result = self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts],
            output_type="pt",
            **{name: value for name, value in chosen.items() if value is not None},
        )
        pixels_BCHW = result.images.float()
        is_finite = pixels_BCHW.isfinite().all(dim=(1, 2, 3)).tolist()
        pixels_BHWC = (pixels_BCHW.nan_to_num().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        flags = getattr(result, "nsfw_content_detected", None) or [False] * len(prompts)
        made: list[Any] = []
        for finite, flagged, pixels_HWC in zip(is_finite, flags, pixels_BHWC, strict=True):
            if not finite:
                made.append(FloatingPointError("the pixels are not finite; a wider `dtype` may help"))
            elif flagged:
                made.append(SampleError("the pipeline's safety checker has rejected the image"))
            else:
                made.append(pixels_HWC)
        return made

    def encode(self, made: Any) -> Encoded:
        """Return the image as a file of the chosen format."""
        synthesis, buffer = self.spec.synthesis, io.BytesIO()
        options = {} if synthesis.quality is None else {"quality": synthesis.quality}
        Image.fromarray(made).save(buffer, "jpeg" if synthesis.format == "jpg" else synthesis.format, **options)
        return Encoded(buffer.getvalue())
