"""An encoder of transformers inside a fusion model. What a checkpoint brings is read by towers.py."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from mmbeam.models.fusion.configuration import FusionConfig, SourceConfig

# Halves of models that AutoModel does not make by themselves: the class by its configuration's model_type.
HALVES: Mapping[str, str] = {
    "siglip_text_model": "SiglipTextModel",
    "metaclip_2_text_model": "MetaClip2TextModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "clap_text_model": "ClapTextModel",
    "blip_vision_model": "BlipVisionModel",
    **{"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"},
}


class PretrainedEncoder(nn.Module):
    """Any encoder of transformers with a last_hidden_state; frozen, it also stays in eval mode."""

    def __init__(self, source: SourceConfig, config: FusionConfig) -> None:
        super().__init__()
        self.model = build_tower(source.model or {})
        self.input_name = self.model.main_input_name
        self.frozen = source.frozen
        self.project = nn.Linear(_output_width(self.model), config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.train()

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """As of any module; `from_pretrained` ends with it, and forgets by then what was to have no gradient."""
        super().train(mode)
        if self.frozen:
            self.model.eval().requires_grad_(False)
        return self

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        masks = {} if mask is None or mask.dim() < 2 else {"attention_mask": mask.long()}
        states = self.model(**{self.input_name: inputs}, **masks).last_hidden_state
        if states.dim() == 4:  # [B, C, H, W] of a convolutional one
            states = states.flatten(2).transpose(1, 2)
        tokens: torch.Tensor = self.norm(self.project(states))
        real = mask if masks and mask is not None else tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return tokens, real


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


def _output_width(model: Any) -> int:
    """Of last_hidden_state: a convolutional one names the widths of its stages, the others their hidden size."""
    widths = getattr(model.config, "hidden_sizes", None)
    return int(widths[-1] if widths else model.config.hidden_size)
