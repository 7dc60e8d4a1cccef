"""Video encoders: VideoMAE, TimeSformer, ViViT, V-JEPA 2, and X-CLIP with its text tower.

A video is the fixed number of frames that the configuration states, preprocessed by the checkpoint's own processor. Its
vector is what the model's classifier reads: the class token (TimeSformer, ViViT, VideoMAE without mean pooling), or the
mean of all tokens (VideoMAE, V-JEPA 2). That of X-CLIP is `get_video_features`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoVideoProcessor
from transformers.utils import is_torchvision_available

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, EncoderSpec, TransformersEncoder
from mmbeam.models.encoders.joint import JointEncoder
from mmbeam.models.loading import read_config
from mmbeam.models.recipes import read_pixels
from mmbeam.names import Modality
from mmbeam.types import ImageHWC

_FRAMES = {"vjepa2": "frames_per_clip"}  # name in the configuration, where it is not num_frames


class VideoEncoder(TransformersEncoder):
    """Vectors of a video by a backbone that reads its frames together."""

    optional_weights = (r"(^|\.)pooler\.",)

    @staticmethod
    def read_recipe(directory: Path) -> Any:
        """Return the checkpoint's video processor. Raises ModelError if it cannot be loaded."""
        if not is_torchvision_available():
            raise ModelError(f"{directory}: its video processor needs torchvision; pip install torchvision")
        try:
            return AutoVideoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises errors of many types
            raise ModelError(f"{directory}: its video processor cannot be loaded: {error}") from error

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the video processor's file."""
        parsed = read_config(directory)
        cls.read_recipe(directory)
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={"video": parsed.hidden_size},
            token_dims={"video": parsed.hidden_size},
            frames=getattr(parsed, _FRAMES.get(parsed.model_type, "num_frames")),
        )

    def prepare(self, modality: Modality, values: Sequence[Any]) -> Any:
        """Return the pixels of each video, [frames, 3, height, width], by the checkpoint's own processor."""
        if modality != "video":
            return super().prepare(modality, values)
        videos = [self._video_pixels(self._filtered(frames)) for frames in values]
        return torch.stack(videos).to(self.device, self.dtype)

    def _filtered(self, frames: Sequence[ImageHWC]) -> list[ImageHWC]:
        if self.pixel_filter is None:
            return list(frames)
        pixels = (torch.from_numpy(frame.copy()).permute(2, 0, 1)[None] for frame in frames)
        return [self.pixel_filter(image)[0].permute(1, 2, 0).contiguous().numpy() for image in pixels]

    def _video_pixels(self, frames: list[ImageHWC]) -> torch.Tensor:
        made = self.recipe(
            [np.stack(frames)], input_data_format="channels_last", do_sample_frames=False, return_tensors="pt"
        )
        [pixels] = made["pixel_values"] if "pixel_values" in made else made["pixel_values_videos"]
        return cast(torch.Tensor, pixels)

    @torch.inference_mode()
    def encode_video(self, videos: Any, tokens: bool = False) -> Encoded:
        """Encode what `prepare` made of videos. Tokens are the last hidden states, in the model's order."""
        if self.spec.family == "vjepa2":
            hidden = self.model.get_vision_features(videos)
        else:
            hidden = self.model(videos).last_hidden_state
        is_mean = self.spec.family == "vjepa2" or getattr(self.model.config, "use_mean_pooling", False)
        return Encoded(pooled=hidden.mean(1) if is_mean else hidden[:, 0], tokens=list(hidden) if tokens else None)


class XClipEncoder(JointEncoder):
    """Vectors of videos and texts in X-CLIP's joint space, without the prompts that depend on a pair of both."""

    read_recipe = staticmethod(read_pixels)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the image processor's file."""
        parsed = read_config(directory)
        cls.read_recipe(directory)
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={"text": parsed.projection_dim, "video": parsed.projection_dim},
            token_dims={"text": parsed.text_config.hidden_size, "video": parsed.vision_config.hidden_size},
            frames=parsed.vision_config.num_frames,
            max_text_tokens=parsed.text_config.max_position_embeddings,
        )

    def prepare(self, modality: Modality, values: Sequence[Any]) -> Any:
        """Return the pixels of the videos, [videos, frames, 3, height, width]."""
        if modality != "video":
            return None
        pixels = self.pixels([frame for frames in values for frame in frames])
        return pixels.reshape(len(values), -1, *pixels.shape[1:])

    @torch.inference_mode()
    def encode_video(self, videos: Any, tokens: bool = False) -> Encoded:
        """Encode the pixels of videos. Tokens are those of all frames, in order."""
        output = self.model.get_video_features(videos)
        hidden = output.last_hidden_state.unflatten(0, (len(videos), -1)).flatten(1, 2)
        return Encoded(pooled=output.pooler_output, tokens=list(hidden) if tokens else None)
