"""Text to text with any encoder-decoder: T5, BART, mBART, Marian, Pegasus ..., and EncoderDecoder (BERT to BERT).

A text longer than the encoder's positions is truncated, as in transformers' pipelines; a dialogue or a prompt that is
longer becomes a failure, because its end must not be lost. The configuration (T5) may name a prefix for each task.
Multilingual models read languages as tokens: M2M100, NLLB and mBART before the text and before the translation, Marian
before the text.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import AutoModelForSeq2SeqLM

from mmbeam.errors import LimitError, UsageError
from mmbeam.models.generators.base import unsupported_language
from mmbeam.models.generators.pretrained import PretrainedGenerator
from mmbeam.models.generators.prompts import PromptTokenizer, find_language, language_code, language_name
from mmbeam.models.loading import read_config, read_json
from mmbeam.models.tokenizing import pad
from mmbeam.names import Task
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import GeneratorSpec, Instruction, Request
from mmbeam.prompts.turns import one_speaker, write_dialogue

MAX_TOKENS = 4096  # of a text, if neither positions nor the tokenizer have a limit
# The tasks of model types that serve one purpose; any other model may support all of _ANY.
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
    """An encoder that reads the sample's text, and a decoder that writes a text."""

    model_class = AutoModelForSeq2SeqLM

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.prefixes = Prefixes(Path(spec.directory))
        # Marian reads the target language before the text; the others' decoders begin with it.
        self.has_language_in_source = spec.family == "marian"

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and tokenizer files."""
        parsed = read_config(directory)
        written = read_json(directory, "tokenizer_config.json", required=False).get("model_max_length")
        limits = (written, _positions(parsed, "encoder"), MAX_TOKENS)
        positions = _positions(parsed, "decoder")
        return cls.make_spec(
            directory,
            modalities=("text",),
            required=("text",),
            tasks=_TASKS.get(parsed.model_type, _ANY),
            takes_prompt=True,
            max_text_tokens=int(min(limit for limit in limits if limit is not None and 0 < limit <= MAX_TOKENS)),
            max_new_tokens=None if positions is None else positions - 1,  # besides the start token
        )

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        """Raise UsageError for an unsupported language, and for a missing language that the model requires."""
        directory = Path(spec.directory)
        tokenizer, prefixes = cls.read_tokenizer(directory), Prefixes(directory)
        is_translation = instruction.task == "translate"
        if spec.family == "marian" and instruction.source_language is not None:  # each has one source language
            raise unsupported_language(spec, "source_language", instruction.source_language)
        if tokenizer.languages:
            if instruction.language is not None:
                _language_id(tokenizer, instruction.language)
            if instruction.source_language is not None:
                _language_id(tokenizer, instruction.source_language, "source_language")
            if instruction.language is None and is_translation and not _has_target(directory, tokenizer):
                raise UsageError(f"`language`: {spec.family} requires one of {_shortened(tokenizer.languages)}")
        elif is_translation and instruction.template is None and prefixes.has_translation:
            prefixes.prefix(instruction.task, instruction.language, instruction.source_language)
        else:
            super().check(spec, instruction)

    def encode_prompt(self, request: Request) -> list[int]:
        """Return the ids that the encoder reads. Raises LimitError for a dialogue or a prompt that does not fit."""
        assert self.spec.max_text_tokens is not None
        limit, language, source = self.spec.max_text_tokens, request.language, request.source_language
        if request.turns:
            if self.tokenizer.template is not None:
                ids = self.tokenizer.encode_prompt((), request)
            else:
                turns = [turn._replace(text=one_speaker(turn.text)) for turn in request.turns]
                [ids] = self.tokenizer.encode([write_dialogue(turns)], MAX_TOKENS)
            return _within(limit, "dialogue", ids)
        if request.prompt is not None:
            text = request.prompt
            _within(limit, "prompt", self.tokenizer.encode([text], MAX_TOKENS)[0])
        else:
            text = self.prefixes.prefix(request.task, language, source) + (request.text or "")
        if self.has_language_in_source:
            front = [_language_id(self.tokenizer, language)] if language else []
            if text.startswith(">>"):  # prepend a space, or a text like ">>deu<< ..." is read as a language token
                text = f" {text}"
            return front + self.tokenizer.encode([text], limit - len(front))[0]
        if source is not None and self.tokenizer.languages:
            return self.tokenizer.encode_from(text, limit, _language_id(self.tokenizer, source))
        return self.tokenizer.encode([text], limit)[0]

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the padded texts, and the decoders' first tokens for mBART, M2M100 and NLLB."""
        prompts = self.prompts(requests)
        ids_BL, mask_BL = pad(prompts, self.tokenizer.pad_id, self.device, vocabulary=self.vocabulary)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if (
            not self.has_language_in_source
            and self.tokenizer.languages
            and any(request.language for request in requests)
        ):
            start = self.model.generation_config.decoder_start_token_id
            starts = [[start, _language_id(self.tokenizer, request.language or "")] for request in requests]
            inputs["decoder_input_ids"] = to_device(starts, self.device)
        return inputs


class Prefixes:
    """The prefix of a text that names its task, for T5: from its configuration, or as it was trained."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory, "config.json")
        params = config.get("task_specific_params") or {}
        self._by_task = {
            task: str(options["prefix"])
            for task, options in params.items()
            if isinstance(options, dict) and "prefix" in options
        }
        self._translations = [prefix for task, prefix in self._by_task.items() if task.startswith("translation_")]
        self._is_t5 = config.get("model_type") == "t5"

    @property
    def has_translation(self) -> bool:
        """Whether a prefix names the languages of a translation."""
        return self._is_t5 or bool(self._translations)

    def prefix(self, task: Task, language: str | None = None, source: str | None = None) -> str:
        """Return the prefix, or "". Raises UsageError for a translation whose target language is unknown."""
        if task == "summarize":
            return self._by_task.get("summarization", "summarize: " if self._is_t5 else "")
        if task != "translate" or not self.has_translation:
            return ""
        if language is None:
            if len(self._translations) != 1:
                raise UsageError("`language`: required for translation, such as German")
            return self._translations[0]
        source = source or "English"
        words = f"translate {language_name(source)} to {language_name(language)}: "
        return self._by_task.get(f"translation_{language_code(source)}_to_{language_code(language)}", words)


def _within(limit: int, kind: str, ids: list[int]) -> list[int]:
    """Return the ids. Raises LimitError if there are more than `limit`: truncation would change the meaning."""
    if len(ids) > limit:
        raise LimitError(f"a {kind} of {len(ids):,} tokens; expected at most {limit:,}")
    return ids


def _language_id(tokenizer: PromptTokenizer, language: str, argument: str = "language") -> int:
    """Return the token of a language. Raises UsageError that names `argument` and the supported languages."""
    name = find_language(tokenizer.languages, language)
    if name is None:
        near = get_close_matches(language, tokenizer.languages, n=5, cutoff=0.3)
        raise UsageError(f"`{argument}` {language}: expected one of {_shortened([*near, *tokenizer.languages])}")
    return tokenizer.languages[name]


def _shortened(languages: Sequence[str] | Mapping[str, int]) -> str:
    names = list(dict.fromkeys(languages))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _has_target(directory: Path, tokenizer: PromptTokenizer) -> bool:
    """Whether a multilingual checkpoint has a fixed target language: the first token of its texts."""
    files = [read_json(directory, name, required=False) for name in ("generation_config.json", "config.json")]
    first = {options.get(name) for options in files for name in ("forced_bos_token_id", "decoder_start_token_id")}
    return not first.isdisjoint(tokenizer.languages.values())


def _positions(config: Any, half: str) -> int | None:
    """Return the positions of the "encoder" or "decoder"; None if they are relative. LED's halves differ."""
    part = getattr(config, half, config)  # an EncoderDecoder has a configuration for each
    limits = [getattr(part, name, None) for name in (f"max_{half}_position_embeddings", "max_position_embeddings")]
    return next((int(limit) for limit in limits if limit), None)
