"""The encoders of a fusion model: one source's input to a sequence of tokens of the model's width.

Each takes only samples that have the input; who calls sees to the others. Shapes: B batch, T tokens,
D hidden size, C channels, H height (frames of a sound), W width (its mel bins), P values of a patch.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel

from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig

Tokens = tuple[torch.Tensor, torch.Tensor]  # [B, T, D], and bool [B, T]: which of them are real


def build_encoder(source: SourceConfig, config: FusionConfig) -> nn.Module:
    """The encoder of a source: called with its input (and, for sequences, its mask), it gives Tokens."""
    if source.kind == "features":
        return FeatureEncoder(source, config)
    if source.kind == "pretrained":
        return PretrainedEncoder(source, config)
    if source.modality == "text":
        return TokenEncoder(source, config)
    return GridConv(source, config) if source.kind == "conv" else PatchEncoder(source, config)


def transformer(config: FusionConfig, layers: int) -> nn.TransformerEncoder:
    """Layers of self-attention, normalised before each part (Xiong et al., 2020, arXiv:2002.04745)."""
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.ffn_size,
        config.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    norm = nn.LayerNorm(config.hidden_size)
    return nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)


def build_mixer(source: SourceConfig, config: FusionConfig) -> nn.Module:
    """What gives D-wide tokens [B, T, D] their context, called with them and their mask: by the source's kind."""
    if source.kind == "transformer":
        return SelfAttention(source, config)
    if source.kind == "lstm":
        return BiLstm(source, config)
    layer = TextConv if source.kind == "conv" else Mlp
    return Stack([layer(config) for _ in range(source.layers)])


class SelfAttention(nn.Module):
    """Layers of self-attention that see no padding."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.layers = transformer(config, source.layers)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.layers(tokens, src_key_padding_mask=~mask)
        return mixed


class Stack(nn.Module):
    """Layers one after another."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return tokens


class Mlp(nn.Module):
    """A residual multi-layer perceptron on each token by itself."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.net = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.ffn_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ffn_size, width),
        )

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        mixed: torch.Tensor = self.net(tokens)
        return tokens + mixed


class TextConv(nn.Module):
    """A residual convolution along a sequence, three tokens wide, which meets zeros where the padding is."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = self.norm(tokens) * mask[..., None]
        mixed = self.conv(seen.transpose(1, 2)).transpose(1, 2)
        out: torch.Tensor = tokens + self.dropout(F.gelu(mixed))
        return out


class BiLstm(nn.Module):
    """A bidirectional LSTM, then multi-head attention of its states to each other."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.lstm = nn.LSTM(width, width // 2, source.layers, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            tokens * mask[..., None], lengths.cpu(), batch_first=True, enforce_sorted=False
        )  # or the way back would begin in the padding
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=mask.shape[1])
        attended, _ = self.attention(states, states, states, key_padding_mask=~mask, need_weights=False)
        out: torch.Tensor = self.norm(states + attended)
        return out


class TokenEncoder(nn.Module):
    """Token ids, embedded by the model's one table of words, to tokens in context."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.positions = nn.Embedding(source.max_tokens, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mixer = build_mixer(source, config)

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """Of the embedded words [B, T, D]."""
        places = self.positions(torch.arange(words.shape[1], device=words.device))
        return self.mixer(self.norm(words + places), mask), mask


class PatchEncoder(nn.Module):
    """A grid cut into patches that are read as a sequence, as in ViT (Dosovitskiy et al., 2021, arXiv:2010.11929)."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        channels, height, width = source.shape
        self.patch = source.patch
        count = (height // source.patch[0]) * (width // source.patch[1])
        self.project = nn.Linear(channels * source.patch[0] * source.patch[1], config.hidden_size)
        self.positions = nn.Parameter(0.02 * torch.randn(count, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mixer = build_mixer(source, config)

    def forward(self, grid_BCHW: torch.Tensor) -> Tokens:
        patches_BPT = F.unfold(grid_BCHW, self.patch, stride=self.patch)
        tokens = self.norm(self.project(patches_BPT.transpose(1, 2)) + self.positions)
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return self.mixer(tokens, mask), mask


class GridConv(nn.Module):
    """Stages of residual convolutions (He et al., 2016, arXiv:1512.03385), each of half the sides of the one before.

    The first stage is a mere convolution, fine enough that a shape of a few pixels keeps its form.
    """

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        channels, height, width = source.shape
        widths = [channels, *source.channels]
        self.stages = nn.ModuleList(
            ConvStage(before, after, residual=number > 0) for number, (before, after) in enumerate(pairwise(widths))
        )
        shrink = 2 ** len(source.channels)
        self.project = nn.Linear(widths[-1], config.hidden_size)
        self.positions = nn.Parameter(0.02 * torch.randn((height // shrink) * (width // shrink), config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, grid_BCHW: torch.Tensor) -> Tokens:
        for stage in self.stages:
            grid_BCHW = stage(grid_BCHW)
        tokens = self.norm(self.project(grid_BCHW.flatten(2).transpose(1, 2)) + self.positions)
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)


class ConvStage(nn.Module):
    """Halve the sides, then one residual block."""

    def __init__(self, before: int, after: int, residual: bool) -> None:
        super().__init__()
        self.shrink = nn.Sequential(
            nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )
        self.block = _block(after) if residual else None

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        grid = self.shrink(grid)
        return grid if self.block is None else F.relu(grid + self.block(grid))


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )


class FeatureEncoder(nn.Module):
    """Vectors that some encoder made before: a token each."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.LayerNorm(source.width), nn.Linear(source.width, config.hidden_size), Mlp(config)
        )
        self.positions = nn.Embedding(source.max_tokens, config.hidden_size) if source.tokens else None

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """Of [B, width] with mask [B], or [B, T, width] with mask [B, T]."""
        if vectors.dim() == 2:
            vectors, mask = vectors[:, None], mask[:, None]
        tokens = self.project(vectors.masked_fill(~mask[..., None], 0))  # padding may be anything, not a number even
        if self.positions is not None:
            tokens = tokens + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return tokens, mask


# Halves of models that AutoModel does not make by themselves: the class by its configuration's model_type.
HALVES: Mapping[str, str] = {
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
    "blip_text_model": "BlipTextModel",
    "metaclip_2_text_model": "MetaClip2TextModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "clap_text_model": "ClapTextModel",
    "clap_audio_model": "ClapAudioModel",
    "blip_vision_model": "BlipVisionModel",
    **{"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"},
}


class PretrainedEncoder(nn.Module):
    """Any encoder of transformers with a last_hidden_state; frozen, it also stays in eval mode."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.model = build_tower(source.model or {})
        self.input_name = self.model.main_input_name
        self.takes_is_longer = "is_longer" in inspect.signature(self.model.forward).parameters  # CLAP's, of sounds
        self.hears_waves = hasattr(self.model, "feature_extractor")  # wav2vec 2.0 and its like
        self.frozen = source.frozen
        self.project = nn.Linear(output_width(self.model), config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.train()

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """As of any module; `from_pretrained` ends with it, and forgets by then what was to have no gradient."""
        super().train(mode)
        if self.frozen:
            self.model.eval().requires_grad_(False)
        return self

    def read(self, inputs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last hidden states [B, T, width], and which of them are real: all but where a mask [B, T] says not."""
        with torch.no_grad() if self.frozen else nullcontext():
            if self.hears_waves:
                return self._read_waves(inputs, mask)
            states = self._states(inputs, mask)
        if states.dim() == 4:  # [B, C, H, W] of a convolutional one
            states = states.flatten(2).transpose(1, 2)
        return states, mask if mask.dim() > 1 else mask.new_ones(states.shape[:2])

    def _states(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        masks = {"attention_mask": mask.long()} if mask.dim() > 1 else {}
        if self.takes_is_longer:
            masks["is_longer"] = mask.new_zeros(len(mask), 1)  # than a window: sounds are cut to one
        states: torch.Tensor = self.model(**{self.input_name: inputs}, **masks).last_hidden_state
        return states

    def _read_waves(self, waves_BN: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The frames of waveforms: padding would change what convolutions make that normalise over time."""
        lengths = mask.sum(1).tolist() if mask.dim() > 1 else [waves_BN.shape[1]] * len(mask)
        maps = [self.model.feature_extractor(wave[None, :n]) for wave, n in zip(waves_BN, lengths, strict=True)]
        projected = [self.model.feature_projection(each.transpose(1, 2)) for each in maps]
        frames = [each[0] if isinstance(each, torch.Tensor) else each[0][0] for each in projected]  # HuBERT's are bare
        counts = torch.tensor([len(each) for each in frames], device=mask.device)
        real = torch.arange(max(map(len, frames)), device=mask.device) < counts[:, None]
        states = self.model.encoder(pad_sequence(frames, batch_first=True), attention_mask=real).last_hidden_state
        return states, real

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was read, as tokens of the model's width."""
        return self.norm(self.project(states)), mask


def build_tower(model: Mapping[str, Any]) -> Any:
    """The encoder of transformers that a configuration describes, with new weights."""
    options = dict(model)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    half = HALVES.get(config.model_type)
    return encoder_of(AutoModel.from_config(config) if half is None else getattr(transformers, half)(config))


def encoder_of(model: Any) -> Any:
    """The part of a model that gives last_hidden_state: without a decoder, and without layers that pool it."""
    if model.config.is_encoder_decoder or type(model).__name__.endswith("T5EncoderModel"):
        model = model.get_encoder()
    if "add_pooling_layer" in inspect.signature(type(model)).parameters:
        model.pooler = None
    return model


def output_width(model: Any) -> int:
    """Of last_hidden_state: a convolutional encoder names the widths of its stages, CLAP's that of the first."""
    config = model.config
    if config.model_type == "clap_audio_model":
        return int(config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1))
    widths = getattr(config, "hidden_sizes", None)
    return int(widths[-1] if widths else config.hidden_size)


def scatter_rows(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """The values of those who are present in their places, zeros in the others."""
    if len(values) == len(present):
        return values
    return values.new_zeros(len(present), *values.shape[1:]).index_put((present,), values)
