"""Zero-shot classification: labels of the user's own, by any encoder that embeds them in one space with the samples.

A label becomes a text by each template; its vector is the normalised mean of the texts' normalised vectors, computed
once per process. Scores are the softmax over the labels of the cosine times the model's logit scale, or the sigmoid of
each, with its bias, for SigLIP.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from mmbeam.config import Labelling
from mmbeam.errors import ModelError, UsageError
from mmbeam.models import encoders
from mmbeam.models.encoders.base import Encoder, EncoderSpec
from mmbeam.models.labellers.base import LabellerSpec, ScoreLabeller, defaults
from mmbeam.names import Modality
from mmbeam.ops.audio import upload_waves
from mmbeam.ops.image import PixelFilter, upload_images
from mmbeam.ops.transfer import to_host

TOP_K = 5
TEMPLATES: Mapping[Modality, str] = {  # those of transformers' pipelines
    "image": "This is a photo of {}.",
    "audio": "This is a sound of {}.",
}
DEFAULT_SCALE = 100.0  # CLIP's, for a model without one of its own
LABELS_PER_BATCH = 256


class ZeroShotClassifier(ScoreLabeller):
    """An encoder of texts and of other modalities."""

    def __init__(self, spec: LabellerSpec, encoder: Encoder) -> None:
        super().__init__(spec, encoder.device, encoder.dtype)
        self.encoder = encoder
        self.labels = {modality: self._encode_labels(modality) for modality in spec.modalities}  # [D, C]

    @staticmethod
    def is_joint(directory: Path) -> bool:
        """Return whether a checkpoint embeds texts and another modality."""
        try:
            dims = encoders.describe(directory).dims
        except ModelError:
            return False
        return "text" in dims and not dims.keys().isdisjoint(TEMPLATES)

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the encoder's files. Raises UsageError for labels or templates that say nothing."""
        if not labelling.labels:
            raise UsageError("`task` zero-shot needs `labels` to look for")
        encoder = encoders.describe(directory)
        for template in labelling.templates or ():
            if template.count("{}") != 1:
                raise UsageError(f"`templates` {template!r}: expected one {{}}, which stands for the label")
        modalities = tuple(modality for modality in TEMPLATES if modality in encoder.dims)
        return LabellerSpec(
            family=encoder.family,
            directory=str(directory),
            labelling=defaults(labelling, top_k=TOP_K),
            modalities=modalities,
            classes=labelling.labels,
            sampling_rate=encoder.sampling_rate,
            image_side=encoder.image_side,
            notes=encoder.notes,
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "ZeroShotClassifier":
        """Load the weights, and compute the vectors of the labels."""
        encoder_spec: EncoderSpec = encoders.describe(Path(spec.directory))
        return cls(spec, encoders.load(encoder_spec, device, dtype))

    @property
    def pixel_filter(self) -> PixelFilter | None:
        """The encoder's filter of images."""
        return self.encoder.pixel_filter

    @pixel_filter.setter
    def pixel_filter(self, pixel_filter: PixelFilter | None) -> None:
        if pixel_filter is not None:
            self.encoder.pixel_filter = pixel_filter

    @torch.inference_mode()
    def _encode_labels(self, modality: Modality) -> torch.Tensor:
        labels = self.spec.classes
        means_CD = torch.zeros(len(labels), 1)
        for template in self.spec.labelling.templates or (TEMPLATES[modality],):
            before, after = template.split("{}")
            ids = self.encoder.tokenize([before + label + after for label in labels])
            parts = [
                self.encoder.encode_text(ids[first : first + LABELS_PER_BATCH]).pooled.float()
                for first in range(0, len(ids), LABELS_PER_BATCH)
            ]
            means_CD = means_CD.to(self.device) + F.normalize(torch.cat(parts), dim=-1)
        return F.normalize(means_CD, dim=-1).T

    def prepare(self, modality: Modality, items: Sequence[Any]) -> Any:
        """Return the values, on a GPU also as one copy in its memory; or what a processor makes of them."""
        return upload(self.encoder, modality, items)

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> torch.Tensor:
        """Return the scores of samples, [B, C]."""
        if modality == "image":
            vectors_BD = self.encoder.encode_image(inputs).pooled
        else:
            waves, rates = inputs
            vectors_BD = self.encoder.encode_audio(waves, rates).pooled
        cosines_BC = F.normalize(vectors_BD.float(), dim=-1) @ self.labels[modality]
        model = cast(Any, self.encoder).model
        scale, bias = self._scale(modality), getattr(model, "logit_bias", None)
        if bias is not None:  # SigLIP
            return to_host((cosines_BC * scale + bias.float()).sigmoid())
        return to_host((cosines_BC * scale).softmax(-1))

    def _scale(self, modality: Modality) -> torch.Tensor | float:
        """Return the factor of a cosine."""
        model = cast(Any, self.encoder).model
        for name in ("logit_scale", "logit_scale_a" if modality == "audio" else ""):
            scale = getattr(model, name, None) if name else None
            if isinstance(scale, torch.Tensor):
                return scale.float().exp()
        space = getattr(model, "space", None)  # of the fusion model
        if space is not None:
            return float(space.scale.exp())
        temperature = getattr(model, "temperature", None)  # ALIGN
        if isinstance(temperature, torch.Tensor):
            return 1 / temperature.float()
        return DEFAULT_SCALE


def upload(encoder: Encoder, modality: Modality, items: Sequence[Any]) -> Any:
    """Return what the encoder takes of images or clips: on a GPU one copy in its memory, or what a processor makes."""
    prepared = encoder.prepare(modality, items)
    if prepared is not None:
        return prepared
    on_cpu = encoder.device.type == "cpu"
    if modality == "audio":
        waves, rates = [wave for wave, _ in items], [rate for _, rate in items]
        return (waves if on_cpu else upload_waves(waves, rates, encoder.device)), rates
    return items if on_cpu else upload_images(items, encoder.device)
