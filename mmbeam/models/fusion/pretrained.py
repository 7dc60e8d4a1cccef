"""An encoder of transformers inside a fusion model. What a checkpoint brings is read by towers.py."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel

from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig

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
