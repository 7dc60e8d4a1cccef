"""EmbeddingGemma 2: texts, pictures and sounds in one space, through one model.

A picture or a sound becomes a sequence of tokens between its two marks, and begin and end of a text around
them, as EmbeddingGemma2Processor lays it out; it is pooled like a text, the way modules.json says (the mean
over all tokens, at unit length). A default prompt is put before texts alone, as sentence-transformers does
it. Of a sound longer than 30 s, which the reference cuts, the vector is the mean of the vectors of the
windows of 30 s that cover it. A checkpoint without a tower (its config is null) encodes what it has. Video
is not here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import AutoModel

from mmbeam.models.encoders.base import Encoded, EncoderSpec
from mmbeam.models.encoders.sentence import SentenceRecipe
from mmbeam.models.encoders.text import TextEncoder, read_recipe, text_limit
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import read_gemma_recipe, read_image_recipe, read_pooled_recipe
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary
from mmbeam.ops.audio import to_rate
from mmbeam.ops.image import Patches, PooledPatching, patch_positions, preprocess_patches
from mmbeam.ops.log_mel import gemma_log_mel, gemma_windows
from mmbeam.types import ImageHWC, Modality, Waveform

INPUTS = frozenset(("text", "image", "audio", "video", "message"))  # of the kinds that modality_config names
MAX_TOKENS = 8192  # of a text: the context that the model was made for; config.json names its positions
AT_ONCE = 8  # pictures of 2520 patches, or windows of 30 s: enough to fill a GPU
SUBSAMPLING = 4  # frames of sound to one token: two convolutions of stride 2


class EmbeddingGemma2Encoder(TextEncoder):
    """Text, picture and sound vectors of an EmbeddingGemma2Model."""

    model_types: ClassVar[tuple[str, ...]] = ("embedding_gemma2",)

    def __init__(self, spec: EncoderSpec, model: Any, recipe: SentenceRecipe, tokenizer: TextTokenizer) -> None:
        super().__init__(spec, model, recipe, tokenizer)
        directory = Path(spec.directory)
        self.image_recipe = read_image_recipe(directory) if "image" in spec.dims else None
        self.audio_recipe = read_gemma_recipe(directory) if "audio" in spec.dims else None
        self.ends = tokenizer.encode([""], 2)[0]  # of a text: its begin, and its end where the tokenizer sets one

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration, modules.json, and the processor files of the towers there are."""
        full, recipe = read_config(directory), read_recipe(directory, INPUTS)
        check_vocabulary(directory)
        token_width = full.text_config.embedding_dim
        limit = text_limit(directory, full.text_config, recipe.max_tokens)
        modalities: list[Modality] = ["text"]
        image_side, rate = None, None
        if full.vision_config is not None:
            modalities.append("image")
            image_side = read_pooled_recipe(directory, full.vision_config).shorter_side
        if full.audio_config is not None:
            modalities.append("audio")
            rate = read_gemma_recipe(directory).sampling_rate
        return EncoderSpec(
            family=full.model_type,
            directory=str(directory),
            dims=dict.fromkeys(modalities, recipe.width(token_width)),
            token_dims=dict.fromkeys(modalities, token_width),
            sampling_rate=rate,
            image_side=image_side,
            max_text_tokens=min(limit, MAX_TOKENS),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the weights of text model and towers; pixels and spectrograms stay in float32 whatever the dtype."""
        directory = Path(spec.directory)
        model = load_pretrained(AutoModel, directory, device, dtype)
        return cls(spec, model, read_recipe(directory, INPUTS), TextTokenizer(directory))

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode pictures of any sizes, uint8 [H, W, 3]; tokens are those of the picture, its marks, and both ends."""
        assert self.image_recipe is not None
        parts = []
        for first in range(0, len(images), AT_ONCE):
            some = images[first : first + AT_ONCE]
            patches = preprocess_patches(some, self.image_recipe, self.device, torch.float32, self.pixel_filter)
            more = {"pixel_values": patches.pixels_BND, "image_position_ids": patch_positions(patches)}
            parts.append(self._encode(self._image_ids(patches), tokens, 0, **more))
        return _joined(parts, [1] * len(images))

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode sounds; tokens are as of pictures, 40 ms each, window after window."""
        assert self.audio_recipe is not None
        sounds = to_rate(waves, rates, self.audio_recipe.sampling_rate, self.device)
        windows = [gemma_windows(sound, self.audio_recipe) for sound in sounds]
        flat = [window for of_sound in windows for window in of_sound]
        parts = []
        for first in range(0, len(flat), AT_ONCE):
            some = flat[first : first + AT_ONCE]
            mel_BTM, mask_BT = gemma_log_mel(some, self.audio_recipe)
            more = {"input_features": mel_BTM, "input_features_mask": mask_BT}
            parts.append(self._encode(self._audio_ids([len(window) for window in some]), tokens, 0, **more))
        return _joined(parts, [len(of_sound) for of_sound in windows])

    def _image_ids(self, patches: Patches) -> list[list[int]]:
        assert self.image_recipe is not None
        assert isinstance(self.image_recipe.size, PooledPatching)
        config, group = self.model.config, self.image_recipe.size.pooling**2
        counts = [down * across // group for down, across in patches.shapes]
        return [self._layout(config.boi_token_id, config.image_token_id, config.eoi_token_id, n) for n in counts]

    def _audio_ids(self, lengths: Sequence[int]) -> list[list[int]]:
        assert self.audio_recipe is not None
        config = self.model.config
        counts = [-(-self.audio_recipe.frames(length) // SUBSAMPLING) for length in lengths]
        return [self._layout(config.boa_token_id, config.audio_token_id, config.eoa_token_index, n) for n in counts]

    def _layout(self, begin: int, placeholder: int, end: int, count: int) -> list[int]:
        """`count` placeholders between their marks, in what the tokenizer puts around a text."""
        before, after = self.ends[:1], self.ends[1:]
        return [*before, begin, *[placeholder] * count, end, *after]


def _joined(parts: Sequence[Encoded], counts: Sequence[int]) -> Encoded:
    """One vector for each sample of `counts` sequences: the mean of theirs; its tokens are all of theirs."""
    vectors = torch.split(torch.cat([part.pooled for part in parts]), list(counts))
    pooled = torch.stack([of_sample.mean(0) for of_sample in vectors])
    tokens = iter([tokens for part in parts for tokens in part.tokens or ()])
    if parts[0].tokens is None:
        return Encoded(pooled=pooled)
    return Encoded(pooled=pooled, tokens=[torch.cat([next(tokens) for _ in range(count)]) for count in counts])
