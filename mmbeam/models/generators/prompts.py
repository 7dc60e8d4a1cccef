"""Prompts of language models: a chat turn with images, audio and words, as the checkpoint's template lays it out.

The words of a sample are data. Where they spell one of the model's own tokens ("<|im_end|>", "<image>") they are
tokenized by themselves, as ordinary characters; for all other words the ids equal the reference processor's.
Also here: the names of languages, and the tokens that multilingual models have for them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from mmbeam.errors import ModelError
from mmbeam.models.loading import read_json
from mmbeam.models.tokenizing import TextTokenizer
from mmbeam.names import Task
from mmbeam.prompts.ask import Request
from mmbeam.prompts.turns import Turn, one_speaker, write_dialogue

_MARK = "\ue000{}\ue001"  # stands for a text in a rendered template: private characters, which templates leave alone
_MARKS = re.compile(_MARK.format(r"(\d+)"))
# Punctuation at both ends, such as "<|user|>": words and spaces are ordinary text even if a template contains them.
_TURN_TOKEN = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
_LANGUAGE_TOKEN = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]+")  # "eng_Latn" of NLLB, "en_XX" of mBART
# Prompts of models without a chat template, which continue a text: "TL;DR:" is GPT-2's (section 3.6).
_CONTINUED: Mapping[Task, str] = {"summarize": "{}\n\nTL;DR:", "translate": "{}\n\nThe same in {}:"}


class Placeholder(NamedTuple):
    """What stands for an image or audio in a prompt, before the model's tokens replace it."""

    kind: str  # "image" or "audio", as chat templates name it
    token: str  # what the chat template writes
    bare: str = ""  # what is written without a template; "": the token alone


class Medium(NamedTuple):
    """An image or audio in a prompt."""

    kind: str  # as in Placeholder
    tokens: str  # what replaces the placeholder: the model's tokens for this medium


def language_name(language: str) -> str:
    """Return the English name of a language code: "German" for "de"; anything else unchanged."""
    name = LANGUAGES.get(language.lower())
    return language if name is None else name.title()


def language_code(language: str) -> str:
    """Return the two-letter code of an English language name: "de" for "German"; anything else unchanged."""
    code: str = TO_LANGUAGE_CODE.get(language.lower(), language)
    return code


def find_language(names: Mapping[str, int], language: str) -> str | None:
    """Return the key of `names` for a language: the key itself, its code ("de" for "de_DE"), or its English name."""
    code = language_code(language)
    matches = [name for name in names if name == language] or [
        name for name in names if name == code or name.startswith(f"{code}_")
    ]
    return matches[0] if len(matches) == 1 else None


def task_prompt(request: Request) -> str:
    """Return the words that a chat model is asked: the user's prompt, or the task's for the media of the request.

    For translation and summary, the text is the material. For any other task, a text that is not blank is the prompt,
    and the task's own prompt is not used.
    """
    if request.prompt is not None:
        return request.prompt
    text = request.text or ""
    has_audio, has_image = request.audio is not None, request.image is not None
    is_about_text = request.task in ("translate", "summarize")
    if not is_about_text and (text.strip() or not (has_audio or has_image)):
        return text
    parts = {
        "the image": has_image,
        "the sound": has_audio,
        "the following text": bool(text) or not (has_audio or has_image),
    }
    subject = " and ".join(name for name, is_present in parts.items() if is_present)
    words = "the speech" if has_audio else "the following text" if text else "the text in the image"
    in_language = "" if request.language is None else f" in {language_name(request.language)}"
    source = "" if request.source_language is None else f" from {language_name(request.source_language)}"
    prompts: dict[Task, str] = {
        "transcribe": f"Transcribe the speech{in_language}." if has_audio else "Write down the text in the image.",
        "translate": f"Translate {words}{source} into {language_name(request.language or 'English')}.",
        "summarize": f"Summarize {subject} in one sentence{in_language}.",
    }
    prompt = prompts.get(request.task, f"Describe {subject} in one sentence{in_language}.")
    return f"{prompt}\n\n{text}" if text else prompt


class PromptTokenizer(TextTokenizer):
    """A checkpoint's tokenizer and chat template.

    `reserved` are tokens that the words of a sample are never encoded as. `placeholders` are the tokens that stand for
    media. A model with reserved tokens accepts media, so its chat template expects the content as a list of parts.
    """

    def __init__(self, directory: Path, reserved: Sequence[str] = (), placeholders: Sequence[Placeholder] = ()) -> None:
        super().__init__(directory)
        template = self._tokenizer.chat_template or read_json(directory, "chat_template.json", required=False).get(
            "chat_template"
        )
        self.template: str | None = template.get("default") if isinstance(template, dict) else template
        self.languages: dict[str, int] = self._find_languages()  # tokens of languages, by the checkpoint's names
        self._reserved = tuple(reserved)
        self._placeholders = {placeholder.kind: placeholder for placeholder in placeholders}
        # Some checkpoints do not declare the tokens that begin their turns as special; the template contains them.
        turn_tokens = [
            id
            for id, token in self._tokenizer.added_tokens_decoder.items()
            if _TURN_TOKEN.fullmatch(token.content) and token.content in (self.template or "")
        ]
        self._reserved_ids = frozenset([*self.ids_of(reserved), *self.languages.values(), *turn_tokens])

    def _find_languages(self) -> dict[str, int]:
        """Read the language tokens: "de" of M2M100, "de_DE" of mBART, "deu_Latn" of NLLB, "deu" of Marian."""
        tokenizer = self._tokenizer
        ids = getattr(tokenizer, "lang_code_to_id", None)  # M2M100, mBART
        if ids is None:
            tokens = getattr(tokenizer, "supported_language_codes", None)  # Marian
            if tokens is None:
                tokens = filter(_LANGUAGE_TOKEN.fullmatch, tokenizer.all_special_tokens)
            ids = {token.strip("<>"): tokenizer.convert_tokens_to_ids(token) for token in tokens}
        return {name: id for name, id in ids.items() if id != tokenizer.unk_token_id}

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of tokens. Raises ModelError if the vocabulary lacks one."""
        vocabulary = self._tokenizer.get_vocab()
        missing = [token for token in tokens if token not in vocabulary]
        if missing:
            raise ModelError(
                f"{self._tokenizer.name_or_path}: expected a tokenizer with {', '.join(missing)}, found one without; "
                "use the tokenizer files of the checkpoint"
            )
        return [vocabulary[token] for token in tokens]

    def encode_from(self, text: str, max_length: int, language: int) -> list[int]:
        """Return the ids of `text` with the prefix and suffix tokens of the language whose token id is `language`.

        The text is truncated, so that there are at most `max_length` ids.
        """
        names = {id: name for name, id in self.languages.items()}
        with self._lock:
            default = self._tokenizer.src_lang  # a state of the tokenizer, restored below
            try:
                self._tokenizer.src_lang = names[language]
                before, after = list(self._tokenizer.prefix_tokens), list(self._tokenizer.suffix_tokens)
            finally:
                self._tokenizer.src_lang = default
        length = max_length - len(before + after)
        [ids] = self._ids([text], add_special_tokens=False, truncation=True, max_length=length)
        return [*before, *ids, *after]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens and surrounding spaces."""
        with self._lock:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def decode_exactly(self, ids: Sequence[int]) -> str:
        """Return the text of the ids with its spaces; U+FFFD where they are not whole characters."""
        with self._lock:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def encode_words(self, text: str) -> list[int]:
        """Return the ids of a text on its own, without any of the model's special tokens."""
        [ids] = self._ids([text], add_special_tokens=False, verbose=False)
        return [id for id in ids if id not in self._reserved_ids]

    def encode_prompt(self, media: Sequence[Medium], request: Request) -> list[int]:
        """Return the ids of a dialogue, or of a request's single turn, up to the beginning of the model's answer."""
        if request.turns:
            turns = request.turns
            if self.template is None:
                turns = tuple(Turn(role, one_speaker(text)) for role, text in turns)
        elif self.template is not None or self._reserved or request.prompt is not None:
            turns = (Turn("user", task_prompt(request)),)
        else:
            language = language_name(request.language or "English")
            turns = (Turn("user", _CONTINUED.get(request.task, "{}").format(request.text or "", language)),)
        if all(self._is_plain(turn.text) for turn in turns):
            ids = self._encode_rendered(self._render(media, turns, request), is_start=True)
        else:
            marked = [Turn(turn.role, _MARK.format(number)) for number, turn in enumerate(turns)]
            ids = []
            for index, piece in enumerate(_MARKS.split(self._render(media, marked, request))):
                if index % 2:  # the number of a mark
                    ids += self.encode_words(turns[int(piece)].text)
                else:
                    ids += self._encode_rendered(piece, is_start=index == 0)
        if ids:
            return ids
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return [int(end if begin is None else begin)]

    def _is_plain(self, text: str) -> bool:
        """Return whether the text contains no special token. If so, the reference processor gives the same ids."""
        if any(token in text for token in self._reserved):
            return False
        return self._encode_tokens(text, add_special_tokens=False) == self.encode_words(text)

    def _render(self, media: Sequence[Medium], turns: Sequence[Turn], request: Request) -> str:
        """Return the prompt as the checkpoint lays it out, with the tokens of the media in the last turn."""
        if self.template is None:
            pairs = [self._placeholders[medium.kind] for medium in media]
            written = "".join(placeholder.bare or placeholder.token for placeholder in pairs)
            rendered = write_dialogue(turns, written) if request.turns else written + turns[-1].text
        else:
            messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
            if self._reserved:
                parts = [[{"type": "text", "text": turn.text}] for turn in turns]
                parts[-1] = [*({"type": medium.kind} for medium in media), *parts[-1]]
                messages = [{"role": turn.role, "content": content} for turn, content in zip(turns, parts, strict=True)]
            rendered = self._tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        filled = ""
        for medium in media:
            placeholder = self._placeholders[medium.kind].token
            before, separator, rendered = rendered.partition(placeholder)
            if not separator:
                raise ModelError(
                    f"{self._tokenizer.name_or_path}: expected the chat template to write one {placeholder} per "
                    f"{medium.kind}; found fewer"
                )
            filled += before + medium.tokens
        return filled + rendered

    def _encode_rendered(self, rendered: str, is_start: bool) -> list[int]:
        """Return the ids of a rendered prompt, or of a later piece of it, as transformers' processors tokenize it."""
        begin = self._tokenizer.bos_token
        has_begin = begin is not None and rendered.startswith(begin)
        special = is_start and not has_begin and (self.template is None or bool(self._reserved))
        return self._encode_tokens(rendered, add_special_tokens=special)

    def _encode_tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text in which the model's own tokens are recognized."""
        with self._lock:
            encoded = self._tokenizer(
                text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
            )
        ids: list[int] = encoded["input_ids"]
        return ids
