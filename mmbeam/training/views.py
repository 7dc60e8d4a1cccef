"""The same sources seen another way: for pairs of a source with itself, which learn that both are the same.

Pictures and spectrograms are moved a little, made lighter or darker, and grainy; of texts some tokens are
hidden, of features some numbers. What is asked for by a caption (left and right, say) stays.
"""

from collections.abc import Iterable, Mapping

import torch

from mmbeam.models.fusion import SourceConfig
from mmbeam.models.fusion.modeling import MASK

SHIFT = 1 / 16  # of the height of a picture, and of its width; of the length of a sound
CONTRAST, BRIGHTNESS, GRAIN = 0.2, 0.2, 0.05  # of values that go from -1 to about 1
HIDDEN = 0.15  # share of a text's tokens, or of a feature's numbers
Inputs = Mapping[str, torch.Tensor]


def make_views(
    sources: Mapping[str, SourceConfig], names: Iterable[str], inputs: Inputs, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """For each of `names` that any sample has, its values and mask as another view; random by `generator`."""
    views: dict[str, torch.Tensor] = {}
    for name in names:
        values, mask = inputs[name], inputs[name + MASK]
        if not mask.any():
            continue
        source = sources[name]
        if source.kind == "features":
            values = values * (_random(values.shape, values, generator) >= HIDDEN)
        elif source.modality == "text":
            mask = _hide(mask, generator)
        else:
            values = _jitter(_move(values, source.modality == "image", generator), generator)
        views |= {name: values, name + MASK: mask}
    return views


def _random(shape: Iterable[int], like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=generator, device=like.device)


def _hide(mask_BT: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Fewer tokens; a text all of whose tokens would be hidden stays whole."""
    left = mask_BT & (_random(mask_BT.shape, mask_BT, generator) >= HIDDEN)
    return torch.where(left.any(1, keepdim=True), left, mask_BT)


def _move(values_BCHW: torch.Tensor, sideways: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Each grid shifted by itself; what comes in at the edge repeats the edge. A sound moves in time alone."""
    batch, _, height, width = values_BCHW.shape
    sizes = torch.tensor([height, width if sideways else 0], device=values_BCHW.device)
    shifts = ((2 * _random((batch, 2), values_BCHW, generator) - 1) * sizes * SHIFT).round().long()
    rows = (torch.arange(height, device=sizes.device) + shifts[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=sizes.device) + shifts[:, 1:]).clamp(0, width - 1)
    number = torch.arange(batch, device=sizes.device)[:, None, None]
    moved = values_BCHW.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)


def _jitter(values_BCHW: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    gain, offset = (2 * _random((2, len(values_BCHW), 1, 1, 1), values_BCHW, generator) - 1).unbind(0)
    grain = 2 * _random(values_BCHW.shape, values_BCHW, generator) - 1
    return values_BCHW * (1 + CONTRAST * gain) + BRIGHTNESS * offset + GRAIN * grain
