"""Text to text with any encoder and decoder: T5, BART, mBART, Marian, Pegasus ..., and EncoderDecoder (BERT to BERT).

A text that is longer than the encoder's positions is cut at its end, as their pipelines do; a dialogue, whose end
is what matters, is a failure then. What a task is called in front of the text its configuration says (T5). Models
of many languages are told theirs by tokens: M2M100, NLLB and mBART at both ends, Marian in front of the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from mmbeam.config import Task
from mmbeam.errors import LimitError, UsageError
from mmbeam.models.generators.languages import code_of, find_language, name_of
from mmbeam.models.generators.pretrained import PretrainedGenerator
from mmbeam.models.generators.prompts import PromptTokenizer
from mmbeam.models.loading import read_config, read_json
from mmbeam.models.tokenizing import pad
from mmbeam.prompts.ask import GeneratorSpec, Instruction, Request
from mmbeam.prompts.turns import one_speaker, write_dialogue

MAX_TOKENS = 4096  # of a text, where neither positions nor the tokenizer name a limit
# What models call the number of their positions; LED's halves differ.
_POSITIONS = {
    "encoder": ("max_encoder_position_embeddings", "max_position_embeddings"),
    "decoder": ("max_decoder_position_embeddings", "max_position_embeddings"),
}
# What models of one purpose are for; of any other the weights alone know.
_TASKS: Mapping[str, tuple[Task, ...]] = {
    "blenderbot": ("dialogue",),
    "blenderbot-small": ("dialogue",),
    "fsmt": ("translate",),
    "m2m_100": ("translate",),
    "marian": ("translate",),
    "mbart": ("translate", "summarize"),
    "nllb-moe": ("translate",),
    "pegasus": ("summarize",),
    "pegasus_x": ("summarize",),
}
_ANY: tuple[Task, ...] = ("summarize", "translate", "dialogue")


class Seq2SeqGenerator(PretrainedGenerator):
    """An encoder that reads the sample's text, and a decoder that writes another one."""

    model_class = AutoModelForSeq2SeqLM

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.prefixes = Prefixes(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("text",),
            required=("text",),
            tasks=_TASKS.get(parsed.model_type, _ANY),
            takes_prompt=True,
            max_text_tokens=_text_limit(directory, parsed),
            max_new_tokens=_new_tokens(parsed),
        )

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        directory = Path(spec.directory)
        tokenizer, prefixes = cls.read_tokenizer(directory), Prefixes(directory)
        if spec.family == "marian":  # it is made for what it reads
            super().check(spec, replace(instruction, language=None if tokenizer.languages else instruction.language))
        if tokenizer.languages:
            for language in (instruction.language, instruction.source_language):
                if language is not None:
                    _known(tokenizer, language)
            if (
                instruction.language is None
                and instruction.task == "translate"
                and not _has_target(directory, tokenizer)
            ):
                raise UsageError(f"--language: a {spec.family} writes several: {_some(tokenizer.languages)}")
        elif instruction.task == "translate" and instruction.prompt is None and prefixes.translate:
            prefixes.of(instruction.task, instruction.language, instruction.source_language)
        else:
            super().check(spec, instruction)

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(self._source(request)) for request in requests]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        ids_BL, mask_BL = pad([self._source(request) for request in requests], self.tokenizer.pad_id, self.device)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if any(request.language for request in requests) and self.tokenizer.languages and not self._in_front:
            inputs["decoder_input_ids"] = self._begun(requests)
        return inputs

    @property
    def _in_front(self) -> bool:
        """Whether the language wanted stands in front of the text, and not in front of the translation."""
        return self.spec.family == "marian"

    def _source(self, request: Request) -> list[int]:
        """Ids of what the encoder reads."""
        assert self.spec.max_text_tokens is not None
        limit, wanted, source = self.spec.max_text_tokens, request.language, request.source_language
        if request.turns:
            return self._dialogue(request, limit)
        text = request.prompt
        if text is None:
            text = self.prefixes.of(request.task, wanted, source) + (request.text or "")
        else:
            _whole("prompt", self.tokenizer.encode([text], MAX_TOKENS)[0], limit)
        if self._in_front:
            front = [_known(self.tokenizer, wanted)] if wanted else []
            if text.startswith(">>"):  # behind a space a text that spells a language's token, ">>deu<<", is words
                text = f" {text}"
            return front + self.tokenizer.encode([text], limit - len(front))[0]
        if source is not None and self.tokenizer.languages:
            return self.tokenizer.encode_from(text, limit, _known(self.tokenizer, source))
        return self.tokenizer.encode([text], limit)[0]

    def _dialogue(self, request: Request, limit: int) -> list[int]:
        if self.tokenizer.template is not None:
            ids = self.tokenizer.prompt((), request)
        else:
            texts = [turn._replace(text=one_speaker(turn.text)) for turn in request.turns]
            [ids] = self.tokenizer.encode([write_dialogue(texts)], MAX_TOKENS)
        return _whole("dialogue", ids, limit)

    def _begun(self, requests: Sequence[Request]) -> torch.Tensor:
        """The decoder's start token and the language's, which mBART, M2M100 and NLLB go on from. [B, 2]"""
        start = self.model.generation_config.decoder_start_token_id
        wanted = [_known(self.tokenizer, request.language or "") for request in requests]
        return torch.tensor([[start, language] for language in wanted], device=self.device)


def _whole(kind: str, ids: list[int], limit: int) -> list[int]:
    """The ids, of what means something else without its end: LimitError if they are more than the encoder reads."""
    if len(ids) > limit:
        raise LimitError(f"a {kind} of {len(ids):,} tokens; expected at most {limit:,}")
    return ids


class Prefixes:
    """What is written in front of a text to say what to do with it: T5's, by its configuration or as it was trained."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory, "config.json")
        named = config.get("task_specific_params") or {}
        self._named = {task: str(of["prefix"]) for task, of in named.items() if isinstance(of, dict) and "prefix" in of}
        self._translations = [prefix for task, prefix in self._named.items() if task.startswith("translation_")]
        self._is_t5 = config.get("model_type") == "t5"

    @property
    def translate(self) -> bool:
        """Whether a translation is asked for so."""
        return self._is_t5 or bool(self._translations)

    def of(self, task: Task, language: str | None = None, source: str | None = None) -> str:
        """The prefix; "" if a text needs none. Raises UsageError for a translation into nobody knows what."""
        if task == "summarize":
            return self._named.get("summarization", "summarize: " if self._is_t5 else "")
        if task != "translate" or not self.translate:
            return ""
        if language is None:
            if len(self._translations) != 1:
                raise UsageError("--language: name the language to translate into, --language German")
            return self._translations[0]
        source = source or "English"
        words = f"translate {name_of(source)} to {name_of(language)}: "
        return self._named.get(f"translation_{code_of(source)}_to_{code_of(language)}", words)


def _known(tokenizer: PromptTokenizer, language: str) -> int:
    """The token of a language. Raises UsageError naming those that there are."""
    found = find_language(tokenizer.languages, language)
    if found is None:
        near = get_close_matches(language, tokenizer.languages, n=5, cutoff=0.3)
        raise UsageError(f"--language {language}: the model has {_some([*near, *tokenizer.languages])}")
    return tokenizer.languages[found]


def _some(languages: Sequence[str] | Mapping[str, int]) -> str:
    names = list(dict.fromkeys(languages))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _has_target(directory: Path, tokenizer: PromptTokenizer) -> bool:
    """Whether a checkpoint of many languages was made to write one: its first token is that language's."""
    files = [read_json(directory, name, required=False) for name in ("generation_config.json", "config.json")]
    first = {found.get(name) for found in files for name in ("forced_bos_token_id", "decoder_start_token_id")}
    return not first.isdisjoint(tokenizer.languages.values())


def _positions(config: Any, half: str) -> int | None:
    """The positions of the encoder or the decoder; None if they are relative."""
    own = getattr(config, half, config)  # EncoderDecoder has a configuration for each
    found = [getattr(own, name, None) for name in _POSITIONS[half]]
    return next((int(limit) for limit in found if limit), None)


def _new_tokens(config: Any) -> int | None:
    """What the decoder's positions hold behind its start token and a language's."""
    positions = _positions(config, "decoder")
    return None if positions is None else positions - 1


def _text_limit(directory: Path, config: Any) -> int:
    named = read_json(directory, "tokenizer_config.json", required=False).get("model_max_length")
    limits = (named, _positions(config, "encoder"), MAX_TOKENS)
    return int(min(limit for limit in limits if limit is not None and 0 < limit <= MAX_TOKENS))
