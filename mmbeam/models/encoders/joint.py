"""Encoders with a text tower and another tower whose vectors lie in one space.

- CLIP (Radford et al., 2021, arXiv:2103.00020) and MetaCLIP 2 (Chuang et al., 2025, arXiv:2507.22062), which is CLIP
  with a tokenizer for 300 languages. (Checkpoints of the first MetaCLIP are CLIP models.)
- SigLIP (Zhai et al., 2023, arXiv:2303.15343) and SigLIP 2 (Tschannen et al., 2025, arXiv:2502.14786).
- BLIP (Li et al., 2022, arXiv:2201.12086) as an encoder; its captions are in models/generators/blip.py.
- CLAP (Wu et al., 2022, arXiv:2211.06687), with or without feature fusion.

Pooled vectors are the outputs of the model's get_image_features, get_audio_features and get_text_features; tokens are
the towers' last hidden states.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec, TransformersEncoder, encode_windows
from mmbeam.models.encoders.vision import VisionEncoder
from mmbeam.models.loading import load_pretrained, read_config, read_json
from mmbeam.models.recipes import (
    OwnPixels,
    check_image_size,
    check_patch_size,
    notes_of,
    read_clap_recipe,
    read_image_recipe,
    read_pixels,
)
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, pad, text_limit, unpad
from mmbeam.names import Modality
from mmbeam.ops.audio import to_rate
from mmbeam.ops.image import ImageRecipe, preprocess_patches
from mmbeam.ops.log_mel import ClapRecipe, clap_features, clap_windows
from mmbeam.types import ImageHWC, Waveform

CLAP_WINDOWS_PER_BATCH = 8  # minimum number of windows per forward pass; a batch of N > 8 clips uses N
BLIP_RETRIEVAL = "BlipForImageTextRetrieval"
BLIP_IMAGES_ONLY = ("BlipForConditionalGeneration", "BlipForQuestionAnswering")


class JointEncoder(TransformersEncoder):
    """The text tower that all families here have."""

    # True: pad texts to the maximum length, as the model was trained; False: pad to the longest text of the batch.
    pads_to_max_length: ClassVar[bool] = False

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made, padded as the model was trained, with a mask only if it was trained so."""
        side = self.tokenizer.padding_side
        length = self.max_text_tokens if self.pads_to_max_length else None
        ids_BL, mask_BL = pad(token_ids, self.tokenizer.pad_id, self.device, length, side, self.vocabulary)
        masks = {"attention_mask": mask_BL} if "attention_mask" in self.tokenizer.inputs else {}
        hidden_BLD, pooled_BD = self._text_tower(ids_BL, **masks)
        kept = unpad(hidden_BLD, [len(ids) for ids in token_ids], side) if tokens else None
        return Encoded(pooled=pooled_BD, tokens=kept)

    def _text_tower(self, ids_BL: torch.Tensor, **masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden states and the pooled vectors."""
        output = self.model.get_text_features(input_ids=ids_BL, **masks)
        return output.last_hidden_state, output.pooler_output


class ImageTextEncoder(JointEncoder):
    """An image tower and a text tower."""

    recipe: ImageRecipe | OwnPixels
    read_recipe = staticmethod(read_pixels)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the files of the image processor and the tokenizer."""
        parsed, recipe = read_config(directory), cls.read_recipe(directory)
        cls._check(directory, parsed, recipe)
        check_vocabulary(directory)
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims=cls._dims(parsed),
            token_dims={"image": parsed.vision_config.hidden_size, "text": parsed.text_config.hidden_size},
            image_side=recipe.shorter_side,
            max_text_tokens=parsed.text_config.max_position_embeddings,
            notes=notes_of(recipe),
        )

    @classmethod
    def _check(cls, directory: Path, config: Any, recipe: Any) -> None:
        """Raise ModelError if the model cannot encode the image processor's output."""
        check_image_size(directory, config.vision_config.image_size, recipe)

    @classmethod
    def _dims(cls, config: Any) -> dict[Modality, int]:
        return {"image": config.projection_dim, "text": config.projection_dim}

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3]. CLIP's and BLIP's tokens begin with the class token."""
        hidden_BLD, pooled_BD = self._image_tower(self.pixels(images))
        return Encoded(pooled=pooled_BD, tokens=list(hidden_BLD) if tokens else None)

    def _image_tower(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden states and the pooled vectors."""
        output = self.model.get_image_features(pixel_values=pixels_BCHW)
        return output.last_hidden_state, output.pooler_output


class ClipEncoder(ImageTextEncoder):
    """CLIP and MetaCLIP 2. The end token gives a text's vector. The model is causal, so padding has no effect."""


class SiglipEncoder(ImageTextEncoder):
    """SigLIP, and SigLIP 2 at a fixed resolution. The last position, padding or not, gives a text's vector."""

    pads_to_max_length = True

    @classmethod
    def _check(cls, directory: Path, config: Any, recipe: Any) -> None:
        super()._check(directory, config, recipe)
        _check_pooling_head(directory, config)

    @classmethod
    def _dims(cls, config: Any) -> dict[Modality, int]:
        return {"image": config.vision_config.hidden_size, "text": config.text_config.projection_size}


class Siglip2Encoder(SiglipEncoder):
    """SigLIP 2 NaFlex: images keep their aspect ratio and become rows of patches with a mask.

    The image processor's file sets the number of patches. (transformers' Siglip2Processor ignores that file and takes
    256 patches of 16 pixels.)
    """

    recipe: ImageRecipe
    read_recipe = staticmethod(read_image_recipe)

    @classmethod
    def _check(cls, directory: Path, config: Any, recipe: Any) -> None:
        check_patch_size(directory, config.vision_config.patch_size, recipe)
        _check_pooling_head(directory, config)

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3]; tokens are the image's patches, without padding."""
        patches = preprocess_patches(images, self.recipe, self.device, self.dtype, self.pixel_filter)
        output = self.model.get_image_features(
            pixel_values=patches.pixels_BND,
            pixel_attention_mask=patches.mask_BN,
            spatial_shapes=torch.tensor(patches.shapes),  # left on the CPU: the model reads it number by number
        )
        kept = unpad(output.last_hidden_state, [down * across for down, across in patches.shapes]) if tokens else None
        return Encoded(pooled=output.pooler_output, tokens=kept)


def _check_pooling_head(directory: Path, config: Any) -> None:
    if not config.vision_config.vision_use_head:
        raise ModelError(f"{directory}/config.json: vision_use_head is false; without it there is no pooled vector")


class BlipEncoder(ImageTextEncoder):
    """BLIP. What a checkpoint encodes depends on its task, which config.json's `architectures` names.

    - BlipForImageTextRetrieval (blip-itm-*): images and texts; the projected class tokens of the two towers, which its
      forward computes with use_itm_head=False.
    - BlipForConditionalGeneration and BlipForQuestionAnswering (captions, answers): images only; `load` returns a
      VisionEncoder of the vision tower.

    A BlipModel is unsupported: its projections are not the layers that BLIP was trained with.
    """

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the files of the image processor and, for retrieval, the tokenizer."""
        if _blip_architecture(directory, config) == BLIP_RETRIEVAL:
            return super().describe(directory, config)
        parsed, recipe = read_config(directory), read_pixels(directory)
        cls._check(directory, parsed, recipe)
        width = parsed.vision_config.hidden_size
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={"image": width},
            token_dims={"image": width},
            image_side=recipe.shorter_side,
            notes=notes_of(recipe),
        )

    @classmethod
    def _dims(cls, config: Any) -> dict[Modality, int]:
        return {"image": config.image_text_hidden_size, "text": config.image_text_hidden_size}

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights; for captions or answers, the vision tower only."""
        directory = Path(spec.directory)
        architecture = _blip_architecture(directory, read_json(directory, "config.json"))
        model = load_pretrained(getattr(transformers, architecture), directory, torch.device("cpu"), dtype)
        recipe = read_pixels(directory)
        if architecture == BLIP_RETRIEVAL:
            return cls(spec, model.to(device), recipe, TextTokenizer(directory))
        return VisionEncoder(spec, model.vision_model.to(device), recipe)

    def _image_tower(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BLD = self.model.vision_model(pixels_BCHW).last_hidden_state
        return hidden_BLD, self.model.vision_proj(hidden_BLD[:, 0])

    def _text_tower(self, ids_BL: torch.Tensor, **masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BLD = self.model.text_encoder(input_ids=ids_BL, **masks).last_hidden_state
        return hidden_BLD, self.model.text_proj(hidden_BLD[:, 0])


def _blip_architecture(directory: Path, config: Mapping[str, Any]) -> str:
    """Return the name of the class whose weights the checkpoint holds."""
    architecture = (config.get("architectures") or [None])[0]
    supported = (BLIP_RETRIEVAL, *BLIP_IMAGES_ONLY)
    if architecture not in supported:
        raise ModelError(f"{directory}/config.json: architectures is {architecture}; expected {', '.join(supported)}")
    return str(architecture)


class ClapEncoder(JointEncoder):
    """CLAP: audio and texts; its vectors are unit vectors.

    The reference takes a random window of an audio clip longer than the model's window of 10 s. Here such a clip is
    encoded whole, by the fixed rules of ops/log_mel.py; with "rand_trunc" its vector is the mean of its windows'
    vectors.
    """

    recipe: ClapRecipe
    read_recipe = staticmethod(read_clap_recipe)

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights. The batch norm of the features keeps float32: bfloat16 has steps of 0.5 at -100 dB."""
        encoder = super().load(spec, device, dtype)
        assert isinstance(encoder, ClapEncoder)
        norm = encoder.model.audio_model.audio_encoder.batch_norm.float()
        norm.register_forward_hook(lambda _, __, output: output.to(dtype))
        return encoder

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the files of the feature extractor and the tokenizer."""
        parsed, recipe = read_config(directory), read_clap_recipe(directory)
        audio, text = parsed.audio_config, parsed.text_config
        if audio.enable_fusion != (recipe.truncation == "fusion"):
            raise ModelError(
                f"{directory}: config.json has enable_fusion {audio.enable_fusion}, but the feature extractor's "
                f"truncation is {recipe.truncation!r}; a fusion model needs 'fusion', any other 'rand_trunc'"
            )
        if audio.num_mel_bins != recipe.n_mels:
            raise ModelError(
                f"{directory}: config.json expects {audio.num_mel_bins} mel bins, the feature extractor makes "
                f"{recipe.n_mels}; use the files of one model"
            )
        check_vocabulary(directory)
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={"audio": parsed.projection_dim, "text": parsed.projection_dim},
            token_dims={
                "audio": audio.patch_embeds_hidden_size * 2 ** (len(audio.depths) - 1),
                "text": text.hidden_size,
            },
            sampling_rate=recipe.sampling_rate,
            max_text_tokens=text_limit(directory, text),
        )

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode audio clips; tokens are the last stage's cells, by frequency then time, window after window."""

        def encode(windows: list[torch.Tensor]) -> Encoded:
            features_BCTM, is_longer_B1 = clap_features(windows, self.recipe)
            output = self.model.get_audio_features(features_BCTM, is_longer=is_longer_B1)
            cells_BLD = output.last_hidden_state.flatten(2).transpose(1, 2)
            return Encoded(pooled=output.pooler_output, tokens=list(cells_BLD) if tokens else None)

        clips = to_rate(waves, rates, self.recipe.sampling_rate, self.device)
        windows = [clap_windows(clip, self.recipe) for clip in clips]
        return encode_windows(windows, max(len(waves), CLAP_WINDOWS_PER_BATCH), encode)
