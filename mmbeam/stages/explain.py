"""What a generated text rests on: how much less likely it is when a modality is masked."""

import math
from collections.abc import Mapping, Sequence

from mmbeam.models.generators.base import Generator
from mmbeam.names import MODALITIES, Modality
from mmbeam.prompts.ask import Generated, Request

Shares = Mapping[Modality, float]


def shares_of(model: Generator, requests: Sequence[Request], made: Sequence[Generated]) -> list[Shares]:
    """For each text the share of it that rests on each modality present.

    That is the log-probability which the text loses when the modality is masked (a gain counts as nothing),
    over the sum of these losses; all are 0 if the text loses nothing. A modality that is alone has it all.
    """
    columns = {column.name: column.modality for column in model.spec.columns}
    present = [_modalities(request, columns) for request in requests]
    losses: list[dict[Modality, float]] = [dict.fromkeys(found, 1.0) for found in present]
    for modality in model.spec.modalities:
        rows = [row for row, found in enumerate(present) if modality in found and len(found) > 1]
        if rows:
            masked = [requests[row].without(modality, columns) for row in rows]
            for row, logprob in zip(rows, model.score(masked, [made[row] for row in rows]), strict=True):
                losses[row][modality] = max(0.0, made[row].logprob - logprob)
    return [_normalized(loss) for loss in losses]


def _modalities(request: Request, columns: Mapping[str, Modality]) -> list[Modality]:
    found = {modality for modality in MODALITIES if getattr(request, modality) is not None}
    found |= {columns[name] for name in request.features if name in columns}
    return [modality for modality in MODALITIES if modality in found]


def _normalized(losses: Mapping[Modality, float]) -> Shares:
    total = sum(losses.values())
    if not math.isfinite(total):
        raise FloatingPointError(f"the text's log-probability without a modality is not finite: {dict(losses)}")
    return {modality: loss / total if total else 0.0 for modality, loss in losses.items()}
