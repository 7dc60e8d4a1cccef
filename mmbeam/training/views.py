"""The same sources seen another way: for pairs of a source with itself, which learn that both are the same.

Pictures and spectrograms are moved a little, made lighter or darker, and grainy; of texts some tokens are
hidden, of features some numbers. What is asked for by a caption (left and right, say) stays.

Shapes: B batch, then what a source has: C channels, H height, W width; T frames and M mel bins, or the other
way round; T tokens.
"""

from collections.abc import Iterable, Mapping

import torch

from mmbeam.models.fusion.audio import time_axis
from mmbeam.models.fusion.configuration import MASK, SourceConfig

SHIFT = 1 / 16  # of the height of a picture, and of its width; of the length of a sound
CONTRAST, BRIGHTNESS, GRAIN = 0.2, 0.2, 0.05  # of values that go from -1 to about 1
HIDDEN = 0.15  # share of a text's tokens, or of a feature's numbers
Inputs = Mapping[str, torch.Tensor]


def make_views(
    sources: Mapping[str, SourceConfig], names: Iterable[str], inputs: Inputs, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """For each of `names` that any sample has, its values and mask as another view; random by `generator`.

    Another view of "fused" is one of every source; a caption has none.
    """
    asked = set(names)
    views: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        if asked & {name, "fused"} and inputs[name + MASK].any():
            views |= _view(name, source, inputs[name], inputs[name + MASK], generator)
    return views


def _view(
    name: str, source: SourceConfig, values: torch.Tensor, mask: torch.Tensor, generator: torch.Generator | None
) -> dict[str, torch.Tensor]:
    if source.kind == "features":
        values = values * (_random(values.shape, values, generator) >= HIDDEN)
    elif source.modality == "text":
        mask = _hide(mask, source.kind == "pretrained", generator)
    else:
        axes = (-2, -1) if source.modality == "image" else (time_axis(source, values),)
        for axis in axes if values.dim() > 2 else ():  # a waveform stays where its mask is
            values = _move(values, axis, generator)
        values = _jitter(values, source.kind == "pretrained", generator)
    return {name: values, name + MASK: mask}


def _random(shape: Iterable[int], like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=generator, device=like.device)


def _hide(mask_BT: torch.Tensor, framed: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Fewer tokens; a text all of whose tokens would be hidden stays whole.

    Where it is `framed` by special tokens, the first and the last stay: a causal encoder reads nothing without.
    """
    kept = _random(mask_BT.shape, mask_BT, generator) >= HIDDEN
    if framed:
        places = mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
        kept |= (places == 1) | (places == places.amax(1, keepdim=True))
    left = mask_BT & kept
    return torch.where(left.any(1, keepdim=True), left, mask_BT)


def _move(values: torch.Tensor, axis: int, generator: torch.Generator | None) -> torch.Tensor:
    """Each sample shifted by itself along the axis; what comes in at the edge repeats the edge."""
    batch, length = len(values), values.shape[axis]
    shifts = ((2 * _random((batch, 1), values, generator) - 1) * length * SHIFT).round().long()
    places = (torch.arange(length, device=values.device) + shifts).clamp(0, length - 1)
    shape = [batch, *[1] * (values.dim() - 1)]
    shape[axis] = length
    return values.gather(axis, places.view(shape).expand_as(values))


def _jitter(values: torch.Tensor, scaled: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Contrast, brightness and grain; where a pretrained encoder has its own scale, relative to that of the batch."""
    centre, unit = (values.mean(), values.std()) if scaled else (0.0, 1.0)
    gain, offset = (2 * _random((2, len(values), *[1] * (values.dim() - 1)), values, generator) - 1).unbind(0)
    grain = 2 * _random(values.shape, values, generator) - 1
    return values + (values - centre) * CONTRAST * gain + unit * (BRIGHTNESS * offset + GRAIN * grain)
