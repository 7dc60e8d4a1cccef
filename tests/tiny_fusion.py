"""Tiny fusion models with random weights, and inputs for them."""

from collections.abc import Mapping
from typing import Any

import torch

from mmbeam.models.fusion import FusionConfig, FusionModel
from mmbeam.models.fusion.configuration import MASK
from mmbeam.models.placement import compute_on_one_thread
from mmbeam.names import FUSION_MODALITIES

compute_on_one_thread()
KINDS = ("conv", "mlp", "lstm", "transformer")  # of the model's own encoders
VOCABULARY, BATCH, TOKENS, SIDE = 40, 4, 6, 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "ffn_size": 64,
    "fusion_layers": 1,
    "fused_tokens": 3,
    "generator_layers": 1,
    "max_target_positions": 32,
    "embedding_dim": 16,
    "dropout": 0.1,
}


def media(kind: str = "conv", text: str | None = None) -> dict[str, Any]:
    """Return image, audio and text sources with encoders of this kind, or `text` for the text."""
    grid = {"kind": kind, "channels": [4, 8, 8], "layers": 1}
    return {
        "image": {"modality": "image", "shape": [3, SIDE, SIDE], "patch": [8, 8], **grid},
        "audio": {"modality": "audio", "shape": [1, SIDE, SIDE], "patch": [4, SIDE], **grid},
        "text": {"modality": "text", "kind": text or kind, "layers": 1, "max_tokens": 16},
    }


def tiny_config(sources: Mapping[str, Any] | None = None, **options: Any) -> FusionConfig:
    return FusionConfig(sources=dict(sources or media(text="transformer")), **(SIZES | options))


def tiny_model(sources: Mapping[str, Any] | None = None, **options: Any) -> FusionModel:
    """Return a model in eval mode with large random weights, so that inputs matter and texts vary."""
    torch.manual_seed(1)
    model: FusionModel = FusionModel(tiny_config(sources, **options)).eval()
    for name, value in model.named_parameters():
        if value.dim() > 1 and "space" not in name:
            torch.nn.init.normal_(value.data, std=1.5 * value[0].numel() ** -0.5)
        elif value.dim() == 1:  # zero biases would hide errors
            value.data += 0.2 * torch.randn_like(value)
    return model


def tiny_inputs(model: FusionModel, batch: int = BATCH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs with every source for every sample; sequences have different lengths."""
    torch.manual_seed(seed)
    lengths = torch.arange(batch) % (TOKENS - 1) + 2
    sequence = torch.arange(TOKENS) < lengths[:, None]
    inputs: dict[str, torch.Tensor] = {}
    for name, source in model.sources.items():
        mask = torch.ones(batch, dtype=torch.bool)
        if source.kind == "features":
            values = torch.randn(batch, *((TOKENS,) if source.tokens else ()), source.width)
            mask = sequence if source.tokens else mask
        elif source.modality == "text":
            values, mask = torch.randint(3, VOCABULARY, (batch, TOKENS)).where(sequence, 0), sequence
        else:
            values = torch.randn(batch, *source.shape)
        inputs |= {name: values, name + MASK: mask}
    return inputs


def tiny_labels(batch: int = BATCH, seed: int = 0) -> torch.Tensor:
    """Return captions of different lengths with end tokens, padded with -100."""
    torch.manual_seed(seed)
    labels = torch.randint(3, VOCABULARY, (batch, TOKENS))
    for row, label in enumerate(labels):
        length = row % (TOKENS - 2) + 2
        label[length] = 2
        label[length + 1 :] = -100
    return labels


def spoiled(inputs: Mapping[str, torch.Tensor], missing: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs with sources masked in the `missing` rows [B], whose values become random."""
    out = dict(inputs)
    for name, rows in missing.items():
        values, mask = inputs[name].clone(), inputs[name + MASK].clone()
        nonsense = torch.randint(0, VOCABULARY, values.shape)
        values[rows] = float("nan") if values.is_floating_point() else nonsense[rows]
        mask[rows] = False
        out |= {name: values, name + MASK: mask}
    return out


def only(inputs: Mapping[str, torch.Tensor], row: int, names: Any = FUSION_MODALITIES) -> dict[str, torch.Tensor]:
    """Return one row as a batch with these sources only, without the padding of sequences."""
    single: dict[str, torch.Tensor] = {}
    for name in names:
        values, mask = inputs[name][row : row + 1], inputs[name + MASK][row : row + 1]
        if mask.dim() > 1:
            values, mask = values[:, : int(mask.sum())], mask[:, : int(mask.sum())]
        single |= {name: values, name + MASK: mask}
    return single
