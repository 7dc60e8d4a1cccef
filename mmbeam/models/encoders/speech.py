"""wav2vec 2.0, HuBERT and WavLM as sources of sound vectors: convolutions over the waveform, then a transformer.

They name no pooled vector. Here it is the mean over the frames (20 ms each) of the last hidden states,
as in SUPERB (Yang et al., 2021, arXiv:2105.01051). A sound longer than 30 s is heard in pieces of equal
length, the mean is over all of its frames; one shorter than the first frame (25 ms) ends in silence.

A sound's vector never depends on the sounds beside it. Padding would change it where the convolutions
normalise over time (feat_extract_norm "group": the base models, which know no mask), so they see sounds
of one length at a time, unpadded; only the transformer's batch is padded, and masked.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import read_wave_recipe
from mmbeam.ops.audio import WaveRecipe, standardize, to_rate
from mmbeam.types import Waveform

PIECE_SECONDS = 30  # of sound heard at once: attention costs the square of it
SAMPLES_AT_ONCE = 1 << 20  # through the convolutions: a minute at 16 kHz, 430 MB after the first in float32
FRAMES_AT_ONCE = 12_000  # through the transformer, padding included: four minutes

# Layers that are not used here or that would let padding through, by the option that adds them.
UNSUPPORTED = ("add_adapter", "conv_pos_batch_norm")


class SpeechEncoder(Encoder):
    """Audio vectors of a Wav2Vec2Model, HubertModel or WavLMModel."""

    model_types: ClassVar[tuple[str, ...]] = ()  # the registry names them

    def __init__(self, spec: EncoderSpec, model: Any, recipe: WaveRecipe) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe
        self.shortest = receptive_field(model.config.conv_kernel, model.config.conv_stride)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the feature extractor's file."""
        full = read_config(directory)
        check_layers(directory, full)
        return EncoderSpec(
            family=full.model_type,
            directory=str(directory),
            dims={"audio": full.hidden_size},
            token_dims={"audio": full.hidden_size},
            sampling_rate=read_wave_recipe(directory).sampling_rate,
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the model's weights; a head for transcription or classification is left out."""
        directory = Path(spec.directory)
        model = load_pretrained(AutoModel, directory, device, dtype, ignore_missing=(r"(^|\.)masked_spec_embed$",))
        return cls(spec, model, read_wave_recipe(directory))

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode sounds; tokens are the frames, 20 ms each."""
        sounds = to_rate(waves, rates, self.recipe.sampling_rate, self.device)
        pieces = [self._pieces(sound) for sound in sounds]
        features = self._convolve([piece for of_sound in pieces for piece in of_sound])
        hidden = iter(self._transform(features))
        frames = [torch.cat([next(hidden).float() for _ in of_sound]) for of_sound in pieces]
        pooled = torch.stack([of_sound.mean(0) for of_sound in frames])
        return Encoded(pooled=pooled, tokens=frames if tokens else None)

    def _pieces(self, wave_N: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.recipe.normalize:
            wave_N = standardize(wave_N)
        wave_N = functional.pad(wave_N, (0, max(0, self.shortest - len(wave_N))))
        count = -(-len(wave_N) // (PIECE_SECONDS * self.recipe.sampling_rate))
        return torch.tensor_split(wave_N, count)

    def _convolve(self, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The transformer's input for each piece, [T, D]."""
        groups: dict[int, list[int]] = {}
        for position, piece in enumerate(pieces):
            groups.setdefault(len(piece), []).append(position)
        done: dict[int, torch.Tensor] = {}
        for length, positions in groups.items():
            step = max(1, SAMPLES_AT_ONCE // length)
            for first in range(0, len(positions), step):
                some = positions[first : first + step]
                waves_BN = torch.stack([pieces[position] for position in some]).to(self.dtype)
                done.update(zip(some, self._project(self.model.feature_extractor(waves_BN)), strict=True))
        return [done[position] for position in range(len(pieces))]

    def _project(self, maps_BCT: torch.Tensor) -> torch.Tensor:
        projected = self.model.feature_projection(maps_BCT.transpose(1, 2))
        projected_BTD: torch.Tensor = projected if isinstance(projected, torch.Tensor) else projected[0]  # HuBERT's
        return projected_BTD

    def _transform(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The last hidden states of each piece, [T, D]; like lengths run together."""
        order = sorted(range(len(features)), key=lambda position: -len(features[position]))
        done: dict[int, torch.Tensor] = {}
        while len(done) < len(order):
            longest = len(features[order[len(done)]])
            some = order[len(done) : len(done) + max(1, FRAMES_AT_ONCE // longest)]
            batch_BTD = pad_sequence([features[position] for position in some], batch_first=True)
            lengths = torch.tensor([len(features[position]) for position in some], device=self.device)
            mask_BT = torch.arange(longest, device=self.device) < lengths[:, None]
            hidden_BTD = self.model.encoder(batch_BTD, attention_mask=mask_BT).last_hidden_state
            done.update((place, row[: len(features[place])]) for place, row in zip(some, hidden_BTD, strict=True))
        return [done[position] for position in range(len(features))]


def check_layers(directory: Path, config: Any) -> None:
    """Raise ModelError for a model with layers that are not used, or that would let padding through."""
    for option in UNSUPPORTED:
        if getattr(config, option, False):
            raise ModelError(f"{directory}/config.json: {option} is true; expected a model without that layer")


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that the convolutions need for their first frame."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples
