"""Token ids out of a model of transformers: greedily, by beam search or at random, with their log-probabilities.

What goes into the model, and what the ids spell, is the family's affair. Which token comes next is said
here for each sample by itself: not by what else is in its batch, in which order, or how it is padded.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from mmbeam.models.tokenizing import pad
from mmbeam.prompts.ask import Decoding

# Legend: B batch, P tokens of the prompt, T new tokens, V vocabulary.


@dataclass(frozen=True, kw_only=True)
class GeneratedTokens:
    """The tokens that one sample got."""

    token_ids: tuple[int, ...]  # the end-of-text token included where it came
    num_tokens: int  # without it
    logprob: float  # sum over token_ids, under the model itself


@torch.inference_mode()
def decode(
    model: Any, inputs: Mapping[str, Any], decoding: Decoding, seeds: Sequence[int], **options: Any
) -> list[GeneratedTokens]:
    """Generate for each row of a batch; `seeds` start the rows' random streams, if chance is in `decoding`.

    `model` has GenerationMixin: an encoder-decoder, or a decoder whose prompts are padded on the left,
    as input_ids or inputs_embeds. `inputs` and `options` go to its `generate`; what its own
    generation_config forbids or forces (repetition, tokens suppressed) is obeyed, and so are processors
    of logits among the options.

    The log-probability is of the model's own distribution, before that, temperature or top-p. It is
    noted token by token, for beams in a pass of its own (`score`), so that no [T, B, V] is kept.
    """
    steps = _Steps(decoding, seeds)
    processors = LogitsProcessorList([*options.pop("logits_processor", ()), steps])
    # Encoder outputs are copied, because a beam search repeats what is in them, in place.
    given = {name: copy(value) if isinstance(value, ModelOutput) else value for name, value in inputs.items()}
    with _logits_shown_to(steps, model):
        ids_BL = model.generate(
            **given,
            **options,
            do_sample=False,  # what is drawn at random is drawn by `steps`
            num_beams=decoding.num_beams,
            num_return_sequences=1,
            max_new_tokens=decoding.limit,
            return_dict_in_generate=False,
            logits_processor=processors,
        )
    assert steps.prompt_BP is not None
    ends = _ends(options.get("eos_token_id", model.generation_config.eos_token_id))
    rows = [_until(ends, row) for row in ids_BL[:, steps.prompt_BP.shape[1] :].tolist()]
    if decoding.num_beams > 1:
        logprobs = score(model, inputs, rows, steps.prompt_BP[:: decoding.num_beams])
    else:
        logprobs = steps.sums(ids_BL, [len(row) for row in rows])
    return [
        GeneratedTokens(token_ids=tuple(row), num_tokens=len(row) - (row[-1] in ends), logprob=logprob)
        for row, logprob in zip(rows, logprobs, strict=True)
    ]


def _ends(eos: int | Sequence[int] | torch.Tensor | None) -> frozenset[int]:
    if eos is None:
        return frozenset()
    return frozenset(torch.as_tensor(eos).reshape(-1).tolist())


def _until(ends: frozenset[int], row: list[int]) -> list[int]:
    """The row up to its first end-of-text token, and with it."""
    length = next((number for number, token in enumerate(row, 1) if token in ends), len(row))
    return row[:length]


class _Steps(LogitsProcessor):
    """Sees each step of `generate` last: draws the token if chance is in it, and notes its log-probability.

    A token is drawn where a uniform number falls in the cumulated probabilities; each row has its own
    numbers, one per step, so that its tokens are its own.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        self.prompt_BP: torch.Tensor | None = None  # what the output begins with; for beams one row per beam
        self.logits_BV: torch.Tensor | None = None  # of this step, as they left the model
        self._notes = decoding.num_beams == 1
        self._logprobs_BV: torch.Tensor | None = None  # of this step, until it is known which token it chose
        self._chosen_B: list[torch.Tensor] = []  # the log-probability of each step's token
        self._warp: Any = _warpers(decoding)
        self._uniform_TB: torch.Tensor | None = None
        if decoding.is_sampled:
            self._uniform_TB = torch.stack([_uniform(seed, decoding.limit) for seed in seeds], dim=1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.prompt_BP is None:
            self.prompt_BP = input_ids
        logits_BV, self.logits_BV = (scores if self.logits_BV is None else self.logits_BV), None
        if self._notes:
            self._note(input_ids)
            self._logprobs_BV = logits_BV.float().log_softmax(-1)
        if self._uniform_TB is None:
            return scores
        return torch.full_like(scores, -math.inf).scatter(1, self._draw(input_ids, scores), 0.0)

    def _note(self, ids_BL: torch.Tensor) -> None:
        if self._logprobs_BV is not None:
            self._chosen_B.append(self._logprobs_BV.gather(1, ids_BL[:, -1:]).squeeze(1))

    def _draw(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """A token of each row, by its probability among `scores_BV` after temperature and top-p. [B, 1]"""
        assert self._uniform_TB is not None
        uniform_B1 = self._uniform_TB[len(self._chosen_B)].to(scores_BV.device)[:, None]
        cumulated_BV = self._warp(input_ids, scores_BV).double().softmax(-1).cumsum(-1)
        drawn_B1 = torch.searchsorted(cumulated_BV, uniform_B1 * cumulated_BV[:, -1:], right=True)
        return drawn_B1.clamp(max=scores_BV.shape[-1] - 1)  # past the end only where logits are not a number

    def sums(self, ids_BL: torch.Tensor, lengths: Sequence[int]) -> list[float]:
        """The log-probability of each row's first so many tokens, given all that `generate` made."""
        self._note(ids_BL)
        rows = torch.stack(self._chosen_B, dim=1).tolist()
        return [math.fsum(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def _warpers(decoding: Decoding) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if decoding.temperature is not None:
        warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(float(decoding.top_p)))
    return warpers


def _uniform(seed: int, count: int) -> torch.Tensor:
    """Numbers in [0, 1), float64 [count], the first few the same whatever the count."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def _logits_shown_to(steps: _Steps, model: Any) -> Iterator[None]:
    """While this lasts, `steps` has each step's logits as the model gave them.

    A processor gets them only after `generate`'s own have changed them. Some models hand the generation to
    a language model inside them: whichever generates is heard.
    """

    def show(module: Any, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor):
            steps.logits_BV = logits[:, -1]

    generating: list[Any] = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    with ExitStack() as hooks:
        for module in generating:
            hooks.callback(module.register_forward_hook(show).remove)
        yield


@torch.inference_mode()
def score(
    model: Any, inputs: Mapping[str, Any], token_ids: Sequence[Sequence[int]], prompt_BP: torch.Tensor | None = None
) -> list[float]:
    """The log-probability of each row's `token_ids` after what is in `inputs`: one pass, the tokens given.

    `prompt_BP` is what an encoder-decoder's output begins with; without it the `decoder_input_ids` of
    `inputs`, or the model's decoder start token.
    """
    ids_BT, mask_BT = pad(token_ids, 0, model.device, length=max(1, *map(len, token_ids)))
    if model.config.is_encoder_decoder:
        logits_BTV = _decoder_logits(model, inputs, ids_BT, prompt_BP)
    else:
        logits_BTV = _continued_logits(model, inputs, ids_BT, mask_BT)
    return [
        _sum_of(logits_TV[: len(own)].float(), ids_T[: len(own)])
        for own, logits_TV, ids_T in zip(token_ids, logits_BTV, ids_BT, strict=True)
    ]


def _sum_of(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> float:
    chosen_T = logits_TV.gather(1, ids_T[:, None]).squeeze(1)
    return math.fsum((chosen_T - logits_TV.logsumexp(-1)).tolist())


def _decoder_logits(
    model: Any, inputs: Mapping[str, Any], ids_BT: torch.Tensor, prompt_BP: torch.Tensor | None
) -> torch.Tensor:
    if prompt_BP is None:
        prompt_BP = inputs.get("decoder_input_ids")
    if prompt_BP is None:
        prompt_BP = torch.full_like(ids_BT[:, :1], model.generation_config.decoder_start_token_id)
    given_BL = torch.cat([prompt_BP, ids_BT[:, :-1]], dim=1)
    logits_BLV: torch.Tensor = model(**{**inputs, "decoder_input_ids": given_BL}).logits
    return logits_BLV[:, prompt_BP.shape[1] - 1 :]


def _continued_logits(
    model: Any, inputs: Mapping[str, Any], ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> torch.Tensor:
    """As `generate` would take a prompt that ends in these tokens: the positions are those that it would make."""
    given, new = _continued(model, inputs, ids_BT, mask_BT), ids_BT.shape[1]
    taken = inspect.signature(model.forward).parameters
    if "position_ids" in taken and "position_ids" not in given:
        given["position_ids"] = model._prepare_position_ids_for_generation(_main(given), given)
    if "logits_to_keep" in taken:
        given["logits_to_keep"] = new + 1
    logits_BLV: torch.Tensor = model(**given, use_cache=False).logits
    return logits_BLV[:, -new - 1 : -1]


def _continued(model: Any, inputs: Mapping[str, Any], ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> dict[str, Any]:
    """The inputs with these tokens behind the prompt."""
    batch, prompt = _main(inputs).shape[:2]
    given = {"attention_mask": torch.ones((batch, prompt), dtype=torch.int64, device=ids_BT.device), **inputs}
    behind: Mapping[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "inputs_embeds": model.get_input_embeddings()(ids_BT) if "inputs_embeds" in given else None,
    }
    for name, value in given.items():
        if name in behind:
            given[name] = torch.cat([value, behind[name].to(value.dtype)], dim=1)
        elif isinstance(value, torch.Tensor) and value.shape == (batch, prompt):  # token_type_ids: text is type 0
            given[name] = torch.cat([value, torch.zeros_like(ids_BT, dtype=value.dtype)], dim=1)
    return given


def _main(inputs: Mapping[str, Any]) -> torch.Tensor:
    main: torch.Tensor = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    return main
