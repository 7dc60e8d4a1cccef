"""EmbeddingGemma 2: texts, images and audio in one space, through one model.

An image or an audio clip becomes a sequence of tokens between its begin and end marks, inside the tokens that begin and
end a text, as EmbeddingGemma2Processor lays it out. It is pooled like a text, as modules.json states (the mean over all
tokens, at unit length). A default prompt is put before texts only, as in sentence-transformers. The reference truncates
a clip at 30 s; here the vector of a longer clip is the mean over the windows of 30 s that cover it. A checkpoint
without a tower (its config is null) encodes the remaining modalities. Video is unsupported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec, encode_windows
from mmbeam.models.encoders.sentence import SentenceRecipe, read_sentence_recipe
from mmbeam.models.encoders.text import TextEncoder
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import read_gemma_recipe, read_image_recipe, read_pooled_recipe
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, text_limit
from mmbeam.names import Modality
from mmbeam.ops.audio import to_rate
from mmbeam.ops.image import PooledPatching, patch_positions, preprocess_patches
from mmbeam.ops.log_mel import gemma_log_mel, gemma_windows
from mmbeam.types import ImageHWC, Waveform

INPUTS = frozenset(("text", "image", "audio", "video", "message"))  # the kinds that modality_config may name
MAX_TOKENS = 8192  # of a text: the context that the model was made for; config.json has the size of its position table
BATCH_SIZE = 8  # images of 2520 patches, or windows of 30 s: enough to fill a GPU
SUBSAMPLING = 4  # audio frames per token: two convolutions of stride 2


class EmbeddingGemma2Encoder(TextEncoder):
    """Text, image and audio vectors of an EmbeddingGemma2Model."""

    def __init__(self, spec: EncoderSpec, model: Any, recipe: SentenceRecipe, tokenizer: TextTokenizer) -> None:
        super().__init__(spec, model, recipe, tokenizer)
        directory = Path(spec.directory)
        self.image_recipe = read_image_recipe(directory) if "image" in spec.dims else None
        self.audio_recipe = read_gemma_recipe(directory) if "audio" in spec.dims else None
        empty = tokenizer.encode([""], 2)[0]  # the token that begins a text, and the one that ends it if there is one
        self.begin, self.end = empty[:1], empty[1:]

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration, modules.json, and the processor files of the towers that the checkpoint has."""
        parsed, recipe = read_config(directory), read_sentence_recipe(directory, INPUTS)
        check_vocabulary(directory)
        token_width = parsed.text_config.embedding_dim
        limit = text_limit(directory, parsed.text_config, recipe.max_tokens)
        modalities: list[Modality] = ["text"]
        image_side, rate = None, None
        if parsed.vision_config is not None:
            modalities.append("image")
            image_side = read_pooled_recipe(directory, parsed.vision_config).shorter_side
        if parsed.audio_config is not None:
            modalities.append("audio")
            rate = read_gemma_recipe(directory).sampling_rate
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims=dict.fromkeys(modalities, recipe.width(token_width)),
            token_dims=dict.fromkeys(modalities, token_width),
            sampling_rate=rate,
            image_side=image_side,
            max_text_tokens=min(limit, MAX_TOKENS),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights of text model and towers; pixels and spectrograms stay in float32."""
        directory = Path(spec.directory)
        model = load_pretrained(AutoModel, directory, device, dtype)
        return cls(spec, model, read_sentence_recipe(directory, INPUTS), TextTokenizer(directory))

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3]; tokens include the marks and the begin and end tokens."""
        recipe, config = self.image_recipe, self.model.config
        assert recipe is not None
        assert isinstance(recipe.size, PooledPatching)
        patches_per_token = recipe.size.pooling**2

        def encode(batch: list[ImageHWC]) -> Encoded:
            patches = preprocess_patches(batch, recipe, self.device, torch.float32, self.pixel_filter)
            counts = [down * across // patches_per_token for down, across in patches.shapes]
            ids = self._layout(config.boi_token_id, config.image_token_id, config.eoi_token_id, counts)
            positions = patch_positions(patches)
            return self._encode(ids, tokens, 0, pixel_values=patches.pixels_BND, image_position_ids=positions)

        return encode_windows([[image] for image in images], BATCH_SIZE, encode)

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode audio clips, window after window; tokens of 40 ms, the marks, and the begin and end tokens."""
        recipe, config = self.audio_recipe, self.model.config
        assert recipe is not None

        def encode(windows: list[torch.Tensor]) -> Encoded:
            mel_BTM, mask_BT = gemma_log_mel(windows, recipe)
            counts = [-(-recipe.frames(len(window)) // SUBSAMPLING) for window in windows]
            ids = self._layout(config.boa_token_id, config.audio_token_id, config.eoa_token_index, counts)
            return self._encode(ids, tokens, 0, input_features=mel_BTM, input_features_mask=mask_BT)

        clips = to_rate(waves, rates, recipe.sampling_rate, self.device)
        return encode_windows([gemma_windows(clip, recipe) for clip in clips], BATCH_SIZE, encode)

    def _layout(self, first: int, placeholder: int, last: int, counts: Sequence[int]) -> list[list[int]]:
        """Return a sequence per count: begin token, first mark, `count` placeholders, last mark, end token."""
        return [[*self.begin, first, *[placeholder] * count, last, *self.end] for count in counts]
