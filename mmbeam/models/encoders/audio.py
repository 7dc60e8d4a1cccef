"""Audio encoders without a text tower: AST, Whisper's encoder, and wav2vec 2.0, HuBERT and WavLM.

Audio clips longer than the model's window, which the reference feature extractors truncate, are encoded whole, in
several windows. The vector of a clip never depends on the other clips of its batch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec, TransformersEncoder, encode_windows
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import (
    check_layers,
    read_ast_recipe,
    read_wave_recipe,
    read_whisper_recipe,
    receptive_field,
)
from mmbeam.ops.audio import WaveRecipe, standardize, to_rate
from mmbeam.ops.log_mel import (
    AST_RATE,
    AstRecipe,
    WhisperRecipe,
    ast_log_mel,
    ast_windows,
    whisper_log_mel,
    whisper_windows,
)
from mmbeam.ops.transfer import to_device
from mmbeam.types import Waveform

AST_WINDOWS_PER_BATCH = 16  # of 10 s: computing their spectrograms takes 300 MB
WHISPER_WINDOWS_PER_BATCH = 8  # minimum number of windows per forward pass; a batch of N > 8 clips uses N
WHISPER_STRIDE = 2  # mel frames per frame of Whisper's encoder: the stride of its second convolution

SPEECH_PIECE_SECONDS = 30  # the longest piece that wav2vec 2.0 encodes: attention costs the square of the length
# Audio samples per batch of the convolutions: a minute at 16 kHz; the first layer's output takes 430 MB in float32.
SPEECH_SAMPLES_PER_BATCH = 1 << 20
SPEECH_FRAMES_PER_BATCH = 12_000  # through the transformer, padding included: four minutes


def _spec(directory: Path, config: Any, width: int, sampling_rate: int) -> EncoderSpec:
    return EncoderSpec(
        family=config.model_type,
        directory=str(directory),
        dims={"audio": width},
        token_dims={"audio": width},
        sampling_rate=sampling_rate,
    )


def _check_frames(directory: Path, expected: tuple[int, int], actual: tuple[int, int]) -> None:
    """Raise ModelError unless config.json and the feature extractor have the same mel bins and frames."""
    if actual != expected:
        raise ModelError(
            f"{directory}: config.json expects {expected[0]} mel bins and {expected[1]} frames, the feature extractor "
            f"makes {actual[0]} and {actual[1]}; use the files of one model"
        )


class AstEncoder(TransformersEncoder):
    """AST, the Audio Spectrogram Transformer (Gong et al., 2021, arXiv:2104.01778).

    The vector is the model's pooler_output, the mean of its class and distillation tokens. For a clip longer than
    the window of 10 s, the vector is the mean over the evenly spread windows that cover it.
    """

    recipe: AstRecipe
    read_recipe = staticmethod(read_ast_recipe)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the feature extractor's file."""
        parsed, recipe = read_config(directory), read_ast_recipe(directory)
        _check_frames(directory, (parsed.num_mel_bins, parsed.max_length), (recipe.n_mels, recipe.n_frames))
        return _spec(directory, parsed, parsed.hidden_size, AST_RATE)

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode audio clips; tokens are class token, distillation token and patches, window after window."""

        def encode(windows: list[torch.Tensor]) -> Encoded:
            output = self.model(ast_log_mel(windows, self.recipe).to(self.dtype))
            return Encoded(pooled=output.pooler_output, tokens=list(output.last_hidden_state) if tokens else None)

        windows = [ast_windows(clip, self.recipe) for clip in to_rate(waves, rates, AST_RATE, self.device)]
        return encode_windows(windows, AST_WINDOWS_PER_BATCH, encode)


class WhisperEncoder(TransformersEncoder):
    """The encoder half of Whisper (Radford et al., 2022, arXiv:2212.04356).

    Whisper defines no pooled vector. Here it is the mean over the encoder's frames of 20 ms that contain audio, without
    the frames of the padding up to 30 s. A longer clip is encoded in consecutive windows of 30 s; the mean is
    over all of its frames. Vectors are compared by cosine, as is usual for mean-pooled features.
    """

    recipe: WhisperRecipe
    read_recipe = staticmethod(read_whisper_recipe)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the feature extractor's file."""
        parsed, recipe = read_config(directory), read_whisper_recipe(directory)
        expected = (parsed.num_mel_bins, parsed.max_source_positions * WHISPER_STRIDE)
        _check_frames(directory, expected, (recipe.n_mels, recipe.n_samples // recipe.hop_length))
        return _spec(directory, parsed, parsed.d_model, recipe.sampling_rate)

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights of the encoder half; the spectrogram stays in float32."""
        directory = Path(spec.directory)
        model = load_pretrained(AutoModel, directory, torch.device("cpu"), dtype, ignore_missing=(r"^decoder\.",))
        return cls(spec, model.get_encoder().to(device), read_whisper_recipe(directory))

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode audio clips; tokens are the frames that contain audio, 20 ms each."""
        clips = to_rate(waves, rates, self.recipe.sampling_rate, self.device)
        windows = [
            (position, window, self._frames(len(clip) - index * self.recipe.n_samples))
            for position, clip in enumerate(clips)
            for index, window in enumerate(whisper_windows(clip, self.recipe))
        ]
        sums_BD = torch.zeros(len(clips), self.spec.dims["audio"], device=self.device)
        frames: list[list[torch.Tensor]] = [[] for _ in clips]
        step = max(len(clips), WHISPER_WINDOWS_PER_BATCH)
        for first in range(0, len(windows), step):
            batch = windows[first : first + step]
            mel_BMT = whisper_log_mel(torch.stack([window for _, window, _ in batch]), self.recipe)
            hidden_BLD = self.model(mel_BMT.to(self.dtype)).last_hidden_state
            for (position, _, count), hidden_LD in zip(batch, hidden_BLD, strict=True):
                sums_BD[position] += hidden_LD[:count].float().sum(0)
                if tokens:
                    frames[position].append(hidden_LD[:count].float())
        counts_B = to_device([self._frames(len(clip)) for clip in clips], self.device)
        pooled_BD = sums_BD / counts_B[:, None]
        return Encoded(pooled=pooled_BD, tokens=[torch.cat(of_clip) for of_clip in frames] if tokens else None)

    def _frames(self, samples: int) -> int:
        """Return how many of the encoder's frames begin within the first `samples` samples."""
        return -(-samples // (self.recipe.hop_length * WHISPER_STRIDE))


class SpeechEncoder(TransformersEncoder):
    """wav2vec 2.0, HuBERT and WavLM: convolutions over the waveform, then a transformer.

    They define no pooled vector. Here it is the mean over the frames (20 ms each) of the last hidden states, as in
    SUPERB (Yang et al., 2021, arXiv:2105.01051). A clip longer than 30 s is encoded in pieces of equal length, and the
    mean is over all of its frames. A clip shorter than the first frame (25 ms) is padded with silence.

    The convolutions get unpadded clips of one length at a time, because padding would change the result where they
    normalise over time (feat_extract_norm "group": the base models, which have no mask). Only the transformer's batch
    is padded, and masked.
    """

    recipe: WaveRecipe
    read_recipe = staticmethod(read_wave_recipe)
    optional_weights = (r"(^|\.)masked_spec_embed$",)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the feature extractor's file."""
        parsed = read_config(directory)
        check_layers(directory, parsed)
        return _spec(directory, parsed, parsed.hidden_size, read_wave_recipe(directory).sampling_rate)

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode audio clips; tokens are the frames, 20 ms each."""
        clips = to_rate(waves, rates, self.recipe.sampling_rate, self.device)
        pieces = [self._pieces(clip) for clip in clips]
        hidden = iter(self._transform(self._convolve([piece for of_clip in pieces for piece in of_clip])))
        frames = [torch.cat([next(hidden).float() for _ in of_clip]) for of_clip in pieces]
        pooled_BD = torch.stack([of_clip.mean(0) for of_clip in frames])
        return Encoded(pooled=pooled_BD, tokens=frames if tokens else None)

    def _pieces(self, wave_N: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.recipe.normalize:
            wave_N = standardize(wave_N)
        shortest = receptive_field(self.model.config.conv_kernel, self.model.config.conv_stride)
        wave_N = functional.pad(wave_N, (0, max(0, shortest - len(wave_N))))
        return torch.tensor_split(wave_N, -(-len(wave_N) // (SPEECH_PIECE_SECONDS * self.recipe.sampling_rate)))

    def _convolve(self, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the transformer's input for each piece, [T, D]."""
        groups: dict[int, list[int]] = {}
        for position, piece in enumerate(pieces):
            groups.setdefault(len(piece), []).append(position)
        features: dict[int, torch.Tensor] = {}
        for length, positions in groups.items():
            step = max(1, SPEECH_SAMPLES_PER_BATCH // length)
            for first in range(0, len(positions), step):
                batch = positions[first : first + step]
                waves_BN = torch.stack([pieces[position] for position in batch]).to(self.dtype)
                maps_BCT = self.model.feature_extractor(waves_BN)
                projected = self.model.feature_projection(maps_BCT.transpose(1, 2))
                features_BTD = projected if isinstance(projected, torch.Tensor) else projected[0]  # HuBERT: a tensor
                features.update(zip(batch, features_BTD, strict=True))
        return [features[position] for position in range(len(pieces))]

    def _transform(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the last hidden states of each piece, [T, D]; pieces of similar length run together."""
        order = sorted(range(len(features)), key=lambda position: -len(features[position]))
        hidden: dict[int, torch.Tensor] = {}
        while len(hidden) < len(order):
            longest = len(features[order[len(hidden)]])
            batch = order[len(hidden) : len(hidden) + max(1, SPEECH_FRAMES_PER_BATCH // longest)]
            batch_BTD = pad_sequence([features[position] for position in batch], batch_first=True)
            lengths_B = to_device([len(features[position]) for position in batch], self.device)
            mask_BT = torch.arange(longest, device=self.device) < lengths_B[:, None]
            hidden_BTD = self.model.encoder(batch_BTD, attention_mask=mask_BT).last_hidden_state
            hidden.update(
                (position, row[: len(features[position])]) for position, row in zip(batch, hidden_BTD, strict=True)
            )
        return [hidden[position] for position in range(len(features))]
