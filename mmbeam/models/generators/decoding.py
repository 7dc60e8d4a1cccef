"""Token ids from a model of transformers, by greedy decoding, beam search or sampling, with their log-probabilities.

The family supplies the model's inputs and turns ids into text. The tokens of a sample do not depend on the other
samples of its batch, their order or the padding.
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
    """The tokens generated for one sample."""

    token_ids: tuple[int, ...]  # an end-of-text token included
    num_tokens: int  # without it
    logprob: float  # sum over token_ids, under the model itself
    filtered_logprob: float | None = None  # the same after the logits processors, at temperature 1


@torch.inference_mode()
def decode(
    model: Any,
    inputs: Mapping[str, Any],
    decoding: Decoding,
    seeds: Sequence[int],
    with_filtered: bool = False,
    **options: Any,
) -> list[GeneratedTokens]:
    """Generate tokens for each row of a batch; `seeds` start the rows' random streams if tokens are sampled.

    `model` has GenerationMixin: an encoder-decoder, or a decoder whose prompts are padded on the left, as input_ids or
    inputs_embeds. `inputs` and `options` are arguments of its `generate`, logits processors among them. The
    model's generation_config applies, for example suppressed tokens and repetition penalties.

    The log-probability is that of the model's own distribution, before processors, temperature and top-p. It is
    recorded at each step; for beam search, `score` computes it afterwards. Either way, the logits [T, B, V] are not
    kept. `with_filtered` also records the one after the processors, except for beam search.
    """
    recorder = _SampleAndRecord(decoding, seeds, with_filtered)
    processors = LogitsProcessorList([*options.pop("logits_processor", ()), recorder])
    # A beam search repeats the encoder's outputs in place, hence the copy.
    arguments = {name: copy(value) if isinstance(value, ModelOutput) else value for name, value in inputs.items()}
    with _raw_logits(recorder, model):
        ids_BL = model.generate(
            **arguments,
            **options,
            do_sample=False,  # `recorder` samples
            num_beams=decoding.num_beams,
            num_return_sequences=1,
            max_new_tokens=decoding.limit,
            return_dict_in_generate=False,
            logits_processor=processors,
        )
    assert recorder.prompt_BP is not None
    eos = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = frozenset() if eos is None else frozenset(torch.as_tensor(eos).reshape(-1).tolist())
    rows: list[list[int]] = []
    for row in ids_BL[:, recorder.prompt_BP.shape[1] :].tolist():
        length = next((number for number, token in enumerate(row, 1) if token in ends), len(row))
        rows.append(row[:length])
    if decoding.num_beams > 1:
        logprobs = score(model, inputs, rows, recorder.prompt_BP[:: decoding.num_beams])
    else:
        logprobs = recorder.sequence_logprobs(ids_BL, [len(row) for row in rows])
    filtered = recorder.filtered_logprobs([len(row) for row in rows])
    return [
        GeneratedTokens(
            token_ids=tuple(row),
            num_tokens=len(row) - (row[-1] in ends),
            logprob=logprob,
            filtered_logprob=filtered_logprob,
        )
        for row, logprob, filtered_logprob in zip(rows, logprobs, filtered, strict=True)
    ]


class _SampleAndRecord(LogitsProcessor):
    """The last logits processor of `generate`. At each step, sample the token and record its log-probability.

    A token is sampled by inverting the cumulative probabilities at a uniform number. Each row has its own stream of
    numbers, one per step.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int], with_filtered: bool = False) -> None:
        self.prompt_BP: torch.Tensor | None = None  # the beginning of the output; one row per beam
        self.logits_BV: torch.Tensor | None = None  # this step's, as the model computed them
        self._is_recording = decoding.num_beams == 1
        self._logprobs_BV: torch.Tensor | None = None  # of the last step, whose token is not yet known
        self._chosen_B: list[torch.Tensor] = []  # the log-probability of each step's token
        self._has_filtered = with_filtered and self._is_recording
        self._filtered_BV: torch.Tensor | None = None  # as _logprobs_BV, after the processors
        self._filtered_B: list[torch.Tensor] = []
        self._warpers = LogitsProcessorList()
        if decoding.temperature is not None:
            self._warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(decoding.top_p)))
        self._uniform_TB: torch.Tensor | None = None
        if decoding.is_sampled:
            streams = [torch.Generator().manual_seed(seed) for seed in seeds]
            uniform_BT = [torch.rand(decoding.limit, generator=stream, dtype=torch.float64) for stream in streams]
            self._uniform_TB = torch.stack(uniform_BT, dim=1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.prompt_BP is None:
            self.prompt_BP = input_ids
        logits_BV = scores if self.logits_BV is None else self.logits_BV
        self.logits_BV = None
        if self._is_recording:
            self._record(input_ids)
            self._logprobs_BV = logits_BV.float().log_softmax(-1)
            self._filtered_BV = scores.float().log_softmax(-1) if self._has_filtered else None
        if self._uniform_TB is None:
            return scores
        return torch.full_like(scores, -math.inf).scatter(1, self._sample(input_ids, scores), 0.0)

    def _record(self, ids_BL: torch.Tensor) -> None:
        """Keep the log-probability of the last token of `ids_BL`."""
        if self._logprobs_BV is not None:
            self._chosen_B.append(self._logprobs_BV.gather(1, ids_BL[:, -1:]).squeeze(1))
        if self._filtered_BV is not None:
            self._filtered_B.append(self._filtered_BV.gather(1, ids_BL[:, -1:]).squeeze(1))

    def _sample(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """Sample a token of each row, by its probability after temperature and top-p. Returns [B, 1]."""
        assert self._uniform_TB is not None
        uniform_B1 = self._uniform_TB[len(self._chosen_B)].to(scores_BV.device)[:, None]
        cumulative_BV = self._warpers(input_ids, scores_BV).double().softmax(-1).cumsum(-1)
        sampled_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
        return sampled_B1.clamp(max=scores_BV.shape[-1] - 1)  # past the end only if a logit is NaN

    def sequence_logprobs(self, ids_BL: torch.Tensor, lengths: Sequence[int]) -> list[float]:
        """Return the log-probability of each row's first `lengths` tokens. `ids_BL` is the output of `generate`.

        Call it once, at the end: it records the last token.
        """
        self._record(ids_BL)
        rows = torch.stack(self._chosen_B, dim=1).tolist()
        return [math.fsum(row[:length]) for row, length in zip(rows, lengths, strict=True)]

    def filtered_logprobs(self, lengths: Sequence[int]) -> list[float | None]:
        """Return the log-probability after the processors of each row's first tokens; call `sequence_logprobs` first.

        None if it was not recorded.
        """
        if not self._has_filtered:
            return [None] * len(lengths)
        rows = torch.stack(self._filtered_B, dim=1).tolist()
        return [math.fsum(row[:length]) for row, length in zip(rows, lengths, strict=True)]


@contextmanager
def _raw_logits(recorder: _SampleAndRecord, model: Any) -> Iterator[None]:
    """Set `recorder.logits_BV` at each step of `generate`, before the model's own processors change the logits.

    `output_logits` would keep them all, [T, B, V]. Some models delegate generation to a language model inside them, so
    every module with GenerationMixin has a hook.
    """

    def hook(module: Any, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor):
            recorder.logits_BV = logits[:, -1]

    generating: list[Any] = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    with ExitStack() as hooks:
        for module in generating:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


@torch.inference_mode()
def score(
    model: Any, inputs: Mapping[str, Any], token_ids: Sequence[Sequence[int]], prompt_BP: torch.Tensor | None = None
) -> list[float]:
    """Return the log-probability of each row's `token_ids` given `inputs`, in one teacher-forced pass.

    `prompt_BP` is the beginning of an encoder-decoder's output; it defaults to the `decoder_input_ids` of `inputs`, or
    to the model's decoder start token.
    """
    ids_BT, mask_BT = pad(token_ids, 0, model.device, length=max(1, *map(len, token_ids)))
    if model.config.is_encoder_decoder:
        if prompt_BP is None:
            prompt_BP = inputs.get("decoder_input_ids")
        if prompt_BP is None:
            prompt_BP = torch.full_like(ids_BT[:, :1], model.generation_config.decoder_start_token_id)
        ids_BL = torch.cat([prompt_BP, ids_BT[:, :-1]], dim=1)
        logits_BTV = model(**{**inputs, "decoder_input_ids": ids_BL}).logits[:, prompt_BP.shape[1] - 1 :]
    else:
        logits_BTV = _continued_logits(model, inputs, ids_BT, mask_BT)
    logprobs: list[float] = []
    for row, row_TV, ids_T in zip(token_ids, logits_BTV, ids_BT, strict=True):
        logits_TV = row_TV[: len(row)].float()
        chosen_T = logits_TV.gather(1, ids_T[: len(row), None]).squeeze(1)
        logprobs.append(math.fsum((chosen_T - logits_TV.logsumexp(-1)).tolist()))
    return logprobs


def _continued_logits(
    model: Any, inputs: Mapping[str, Any], ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> torch.Tensor:
    """Return a decoder's logits [B, T, V] of tokens that continue the prompts.

    `generate` prepares the inputs, positions among them; a custom decoding method then makes a single forward pass.
    """
    prompt = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    shape, count = prompt.shape[:2], ids_BT.shape[1]
    arguments = {"attention_mask": torch.ones(shape, dtype=torch.int64, device=ids_BT.device), **inputs}
    continuations: Mapping[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "inputs_embeds": model.get_input_embeddings()(ids_BT) if "inputs_embeds" in inputs else None,
    }
    for name, value in arguments.items():
        if name in continuations:
            arguments[name] = torch.cat([value, continuations[name].to(value.dtype)], dim=1)
        elif isinstance(value, torch.Tensor) and value.shape == shape:  # token_type_ids: words are of type 0
            kind = int(model.config.model_type == "paligemma")  # there, 0 is the prompt and 1 the answer
            arguments[name] = torch.cat([value, torch.full_like(ids_BT, kind, dtype=value.dtype)], dim=1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = count + 1
    logits_BLV: torch.Tensor = model.generate(**arguments, max_new_tokens=1, custom_generate=_forward)
    return logits_BLV[:, -count - 1 : -1]


def _forward(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """A decoding method for `generate` that returns the logits of one forward pass, without a cache."""
    for name in ("logits_processor", "stopping_criteria", "generation_config", "past_key_values"):
        arguments.pop(name, None)
    arguments["use_cache"] = False
    prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **arguments)
    logits: torch.Tensor = model(**prepared).logits
    return logits
