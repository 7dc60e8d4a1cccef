"""The encoders of a fusion model: from the input of one source to a sequence of tokens of the model's width.

An encoder is called with the samples that have the source; `scatter_rows` puts the result back into the batch.

Shapes: B batch, T tokens, D hidden size, C channels, H height (frames of audio), W width (mel bins), P values
of a patch.
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

Tokens = tuple[torch.Tensor, torch.Tensor]  # [B, T, D], and bool [B, T]: False is padding

# Class by model_type, for text, vision and audio towers whose configuration AutoModel does not map to an encoder class.
TOWER_CLASSES: Mapping[str, str] = {
    "siglip_text_model": "SiglipTextModel",
    "siglip2_text_model": "Siglip2TextModel",
    "blip_text_model": "BlipTextModel",
    "metaclip_2_text_model": "MetaClip2TextModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "clap_text_model": "ClapTextModel",
    "clap_audio_model": "ClapAudioModel",
    "blip_vision_model": "BlipVisionModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def build_encoder(source: SourceConfig, config: FusionConfig) -> nn.Module:
    """Return the encoder of a source. It maps the input, and for sequences its mask, to Tokens."""
    if source.kind == "features":
        return FeatureEncoder(source, config)
    if source.kind == "pretrained":
        return PretrainedEncoder(source, config)
    if source.modality == "text":
        return TokenEncoder(source, config)
    return GridConv(source, config) if source.kind == "conv" else PatchEncoder(source, config)


def transformer(config: FusionConfig, layers: int) -> nn.TransformerEncoder:
    """Return pre-norm self-attention layers (Xiong et al., 2020, arXiv:2002.04745)."""
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


def feed_forward(config: FusionConfig) -> nn.Sequential:
    """Return a pre-norm feed-forward block, without its residual connection."""
    return nn.Sequential(
        nn.LayerNorm(config.hidden_size),
        nn.Linear(config.hidden_size, config.ffn_size),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.ffn_size, config.hidden_size),
    )


def build_mixer(source: SourceConfig, config: FusionConfig) -> nn.Module:
    """Return the layers that contextualise tokens [B, T, D], given their mask, by the kind of the source."""
    if source.kind == "transformer":
        return SelfAttention(source, config)
    if source.kind == "lstm":
        return BiLstm(source, config)
    layer = TextConv if source.kind == "conv" else Mlp
    return Stack([layer(config) for _ in range(source.layers)])


class SelfAttention(nn.Module):
    """Self-attention layers that ignore padding."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.layers = transformer(config, source.layers)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, T, D] to [B, T, D]."""
        mixed: torch.Tensor = self.layers(tokens, src_key_padding_mask=~mask)
        return mixed


class Stack(nn.Module):
    """Layers that take a mask, applied in order."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, T, D] to [B, T, D]."""
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return tokens


class Mlp(nn.Module):
    """A residual multi-layer perceptron, applied to each token independently."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.net = feed_forward(config)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map tokens [B, T, D] to [B, T, D]."""
        mixed: torch.Tensor = self.net(tokens)
        return tokens + mixed


class TextConv(nn.Module):
    """A residual convolution along a sequence, three tokens wide; padding counts as zeros."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, T, D] to [B, T, D]."""
        masked = self.norm(tokens) * mask[..., None]
        mixed = self.conv(masked.transpose(1, 2)).transpose(1, 2)
        out: torch.Tensor = tokens + self.dropout(F.gelu(mixed))
        return out


def run_rnn(rnn: nn.Module, states: Any) -> Any:
    """Return the outputs of an LSTM or GRU for states [B, T, D], padded or packed. Under autocast, in float32.

    Autocast to bfloat16 would run cuDNN's RNNs in float16, whose gradients underflow without a scaler.
    """
    device = next(rnn.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return rnn(states)[0]
    with torch.autocast(device, enabled=False):
        return rnn(states.float())[0]


class BiLstm(nn.Module):
    """A bidirectional LSTM followed by multi-head self-attention."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.lstm = nn.LSTM(width, width // 2, source.layers, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, T, D] to [B, T, D]."""
        lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            tokens * mask[..., None], lengths.cpu(), batch_first=True, enforce_sorted=False
        )  # without packing, the backward direction would start in the padding
        states, _ = nn.utils.rnn.pad_packed_sequence(
            run_rnn(self.lstm, packed), batch_first=True, total_length=mask.shape[1]
        )
        attended, _ = self.attention(states, states, states, key_padding_mask=~mask, need_weights=False)
        out: torch.Tensor = self.norm(states + attended)
        return out


class TokenEncoder(nn.Module):
    """Contextualises token embeddings, which come from the embedding table of the model."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.positions = nn.Embedding(source.max_tokens, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mixer = build_mixer(source, config)

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """Encode token embeddings [B, T, D]."""
        positions = self.positions(torch.arange(embeddings.shape[1], device=embeddings.device))
        return self.mixer(self.norm(embeddings + positions), mask), mask


class PatchEncoder(nn.Module):
    """A grid cut into a sequence of patches, as in ViT (Dosovitskiy et al., 2021, arXiv:2010.11929)."""

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
        """Encode a grid, one token per patch."""
        patches_BPT = F.unfold(grid_BCHW, self.patch, stride=self.patch)
        tokens = self.norm(self.project(patches_BPT.transpose(1, 2)) + self.positions)
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return self.mixer(tokens, mask), mask


class GridConv(nn.Module):
    """Stages of residual convolutions (He et al., 2016, arXiv:1512.03385), each of which halves height and width.

    The first stage is a convolution without a residual block, because one would destroy shapes of a few pixels.
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
        """Encode a grid, one token per cell of the last stage."""
        for stage in self.stages:
            grid_BCHW = stage(grid_BCHW)
        tokens = self.norm(self.project(grid_BCHW.flatten(2).transpose(1, 2)) + self.positions)
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)


class ConvStage(nn.Module):
    """A strided convolution that halves height and width, then an optional residual block."""

    def __init__(self, before: int, after: int, residual: bool) -> None:
        super().__init__()
        self.shrink = nn.Sequential(
            nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )
        self.block = None
        if residual:
            self.block = nn.Sequential(
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
            )

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Map a grid [B, C, H, W] to [B, C', H / 2, W / 2]."""
        grid = self.shrink(grid)
        return grid if self.block is None else F.relu(grid + self.block(grid))


class FeatureEncoder(nn.Module):
    """Precomputed vectors, one token each."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.LayerNorm(source.width), nn.Linear(source.width, config.hidden_size), Mlp(config)
        )
        self.positions = nn.Embedding(source.max_tokens, config.hidden_size) if source.tokens else None

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """Encode vectors [B, width] with mask [B], or [B, T, width] with mask [B, T]."""
        if vectors.dim() == 2:
            vectors, mask = vectors[:, None], mask[:, None]
        tokens = self.project(vectors.masked_fill(~mask[..., None], 0))  # padding may be NaN
        if self.positions is not None:
            tokens = tokens + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return tokens, mask


class PretrainedEncoder(nn.Module):
    """An encoder of transformers that returns last_hidden_state. If frozen, it also stays in eval mode."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.model = build_tower(source.model or {})  # a checkpoint key
        self.input_name = self.model.main_input_name
        self.takes_is_longer = "is_longer" in inspect.signature(self.model.forward).parameters  # CLAP's audio encoder
        self.takes_waveforms = hasattr(self.model, "feature_extractor")  # wav2vec 2.0, HuBERT, WavLM
        self.frozen = source.frozen
        self.project = nn.Linear(output_width(self.model), config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.train()

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """Set training mode, and freeze the encoder again if it is frozen: `from_pretrained` resets requires_grad."""
        super().train(mode)
        if self.frozen:
            self.model.eval().requires_grad_(False)
        return self

    def hidden_states(self, inputs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last hidden states [B, T, width] and their mask [B, T]."""
        with torch.no_grad() if self.frozen else nullcontext():
            if self.takes_waveforms:
                return self._states_of_waveforms(inputs, mask)
            masks = {"attention_mask": mask.long()} if mask.dim() > 1 else {}
            if self.takes_is_longer:
                masks["is_longer"] = mask.new_zeros(len(mask), 1)  # False: audio is truncated to one window
            states: torch.Tensor = self.model(**{self.input_name: inputs}, **masks).last_hidden_state
        if states.dim() == 4:  # [B, C, H, W] of a convolutional encoder
            states = states.flatten(2).transpose(1, 2)
        return states, mask if mask.dim() > 1 else mask.new_ones(states.shape[:2])

    def _states_of_waveforms(self, waves_BN: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the convolutions on each waveform by itself: some normalise over time, so padding would change them."""
        lengths = mask.sum(1).tolist() if mask.dim() > 1 else [waves_BN.shape[1]] * len(mask)
        maps = [self.model.feature_extractor(wave[None, :n]) for wave, n in zip(waves_BN, lengths, strict=True)]
        projected = [self.model.feature_projection(frames.transpose(1, 2)) for frames in maps]
        frames = [out[0] if isinstance(out, torch.Tensor) else out[0][0] for out in projected]  # HuBERT: no tuple
        counts = torch.tensor([len(rows) for rows in frames], device=mask.device)
        real = torch.arange(max(map(len, frames)), device=mask.device) < counts[:, None]
        states = self.model.encoder(pad_sequence(frames, batch_first=True), attention_mask=real).last_hidden_state
        return states, real

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """Project the result of `hidden_states` to the model's width."""
        return self.norm(self.project(states)), mask


def build_tower(model: Mapping[str, Any]) -> Any:
    """Return the encoder of transformers that a configuration describes, with new weights."""
    options = dict(model)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    name = TOWER_CLASSES.get(config.model_type)
    return tower_of(AutoModel.from_config(config) if name is None else getattr(transformers, name)(config))


def tower_of(model: Any) -> Any:
    """Return the part of a model that computes last_hidden_state, without a decoder and pooling layers."""
    if model.config.is_encoder_decoder or type(model).__name__.endswith("T5EncoderModel"):
        model = model.get_encoder()
    if "add_pooling_layer" in inspect.signature(type(model)).parameters:
        model.pooler = None
    return model


def output_width(model: Any) -> int:
    """Return the width of last_hidden_state. Convolutional encoders list it by stage; CLAP states the first stage's."""
    config = model.config
    if config.model_type == "clap_audio_model":
        return int(config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1))
    widths = getattr(config, "hidden_sizes", None)
    return int(widths[-1] if widths else config.hidden_size)


def scatter_rows(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return `values` [n, ...] at the n rows that are `present` [B], and zeros elsewhere: [B, ...]."""
    if len(values) == len(present):
        return values
    return values.new_zeros(len(present), *values.shape[1:]).index_put((present,), values)
