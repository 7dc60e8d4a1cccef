"""Prompts for decoder-only models: a turn of the user with pictures, sounds and words, as the checkpoint lays it out.

The words of a sample are data. Where they spell one of the model's own tokens ("<|im_end|>", "<image>") they
are tokenized as ordinary characters, by themselves; on all other words the ids are the reference
processor's. What stands for a picture or a sound is the family's affair.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbeam.config import Task
from mmbeam.errors import ModelError, UsageError
from mmbeam.models.generators.languages import language_ids, name_of
from mmbeam.models.loading import read_json
from mmbeam.models.tokenizing import TextTokenizer
from mmbeam.prompts.ask import GeneratorSpec, Instruction, Request
from mmbeam.prompts.turns import Turn, one_speaker, write_dialogue

_MARK = "\ue000{}\ue001"  # where a text belongs: private characters, which no template changes
_MARKS = re.compile(_MARK.format(r"(\d+)"))
_MARK_OF_TURN = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)  # no word, and no spaces: those are words to a sample
# How a model without a chat template, which goes on from what it reads, is asked: "TL;DR:" is GPT-2's (section 3.6).
_PLAIN: Mapping[Task, str] = {"summarize": "{}\n\nTL;DR:", "translate": "{}\n\nThe same in {}:"}


@dataclass(frozen=True)
class Medium:
    """A picture or a sound in a prompt."""

    kind: str  # "image" or "audio", as chat templates call it
    placeholder: str  # what the template writes for it
    tokens: str  # what is put in the place of that: as many of the model's tokens as it takes
    bare: str = ""  # what is written for it where there is no template; "": the placeholder alone


def task_prompt(request: Request) -> str:
    """What a chat model is asked: the user's prompt, or what the task comes to for what the request holds.

    A text is what is translated or summarized; of any other task it is itself what is asked.
    """
    if request.prompt is not None:
        return request.prompt
    text = request.text or ""
    heard, seen = request.audio is not None, request.image is not None
    of_text = request.task in ("translate", "summarize")
    if not (heard or seen or of_text) or (text.strip() and not of_text):
        return text
    held = {"the image": seen, "the sound": heard, "the following text": bool(text) or not (heard or seen)}
    what = " and ".join(name for name, is_held in held.items() if is_held)
    words = "the speech" if heard else "the following text" if text else "the text in the image"
    in_language = "" if request.language is None else f" in {name_of(request.language)}"
    asked: dict[Task, str] = {
        "transcribe": f"Transcribe the speech{in_language}." if heard else "Write down the text in the image.",
        "translate": f"Translate {words}{_from(request)} into {name_of(request.language or 'English')}.",
        "summarize": f"Summarize {what} in one sentence{in_language}.",
    }
    question = asked.get(request.task, f"Describe {what} in one sentence{in_language}.")
    return f"{question}\n\n{text}" if text else question


def _from(request: Request) -> str:
    return "" if request.source_language is None else f" from {name_of(request.source_language)}"


def check_words(spec: GeneratorSpec, instruction: Instruction) -> None:
    """Raise UsageError for languages that a model which is asked in words would not be told of."""
    if instruction.source_language is not None and instruction.task != "translate":
        raise UsageError(f"--source-language {instruction.source_language}: goes with --task translate")
    named = instruction.language or instruction.source_language
    if named is not None and (instruction.prompt is not None or instruction.task == "dialogue"):
        raise UsageError(f"--language {named}: a {spec.family} is asked in words: name the language in the prompt")


class PromptTokenizer(TextTokenizer):
    """A checkpoint's tokenizer and chat template. `held_back` are tokens that the words of no sample may become."""

    def __init__(self, directory: Path, held_back: Sequence[str] = ()) -> None:
        super().__init__(directory)
        self.template = self._find_template(directory)
        self._held_back = tuple(held_back)
        self._languages = language_ids(self._tokenizer)
        self._held_back_ids = frozenset([*self.ids_of(held_back), *self._languages.values(), *self._marks_of_turns()])

    def _find_template(self, directory: Path) -> str | None:
        """The checkpoint's chat template, of several by name that for chats; None if it has none."""
        legacy = read_json(directory, "chat_template.json", required=False).get("chat_template")
        found = self._tokenizer.chat_template or legacy
        return found.get("default") if isinstance(found, dict) else found

    def _marks_of_turns(self) -> list[int]:
        """Added tokens, "<|user|>", that the template writes although the tokenizer does not call them special."""
        added = self._tokenizer.added_tokens_decoder.items()
        marks = [(id, token.content) for id, token in added if _MARK_OF_TURN.fullmatch(token.content)]
        return [id for id, mark in marks if mark in (self.template or "")]

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
        """The ids of tokens; ModelError for one that the vocabulary lacks."""
        vocabulary = self._tokenizer.get_vocab()
        missing = [token for token in tokens if token not in vocabulary]
        if missing:
            raise ModelError(f"{self._tokenizer.name_or_path}: its tokenizer has no {', '.join(missing)}")
        return [vocabulary[token] for token in tokens]

    @property
    def languages(self) -> dict[str, int]:
        """The tokens by which models of many languages are told theirs, by what they call them."""
        return self._languages

    def encode_from(self, text: str, max_length: int, language: int) -> list[int]:
        """Ids of a text of that language, given by its token, with the marks that a model of many wants."""
        with self._lock:
            before, after = self._marks_of(language)
        [ids] = self._ids(
            [text], add_special_tokens=False, truncation=True, max_length=max_length - len(before + after)
        )
        return [*before, *ids, *after]

    def _marks_of(self, language: int) -> tuple[list[int], list[int]]:
        """What such a tokenizer puts before and behind a text. It keeps the language as a state, which is put back."""
        own = self._tokenizer.src_lang
        names = {token: name for name, token in self._languages.items()}
        try:
            self._tokenizer.src_lang = names[language]
            return list(self._tokenizer.prefix_tokens), list(self._tokenizer.suffix_tokens)
        finally:
            self._tokenizer.src_lang = own

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids spell, without special tokens and the space around it."""
        with self._lock:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def words(self, text: str) -> list[int]:
        """Ids of a text by itself, nothing of it taken for a token of the model's own."""
        [ids] = self._ids([text], add_special_tokens=False, verbose=False)
        return [token for token in ids if token not in self._held_back_ids]

    def prompt(self, media: Sequence[Medium], request: Request) -> list[int]:
        """Ids of a dialogue, or of the one turn that a request comes to, up to where the model's answer begins."""
        turns = request.turns or (Turn("user", self._asked(request)),)
        if request.turns and self.template is None:
            turns = tuple(Turn(role, one_speaker(text)) for role, text in turns)
        texts = [turn.text for turn in turns]
        if all(map(self._is_plain, texts)):
            ids = self._tokens(self._rendered(media, turns, request), begins=True)
        else:
            marked = [Turn(turn.role, _MARK.format(number)) for number, turn in enumerate(turns)]
            ids = self._put_in(self._rendered(media, marked, request), texts)
        return ids or [self._start_id]

    def _asked(self, request: Request) -> str:
        if self.template is not None or self._held_back or request.prompt is not None:
            return task_prompt(request)
        return _PLAIN.get(request.task, "{}").format(request.text or "", name_of(request.language or "English"))

    def _put_in(self, rendered: str, texts: Sequence[str]) -> list[int]:
        """Ids of a rendered prompt, and each text's by itself in the place of its mark."""
        ids: list[int] = []
        for number, piece in enumerate(_MARKS.split(rendered)):  # every second piece is a mark's number
            ids += self.words(texts[int(piece)]) if number % 2 else self._tokens(piece, begins=number == 0)
        return ids

    @property
    def _start_id(self) -> int:
        """What a model without a prompt begins with."""
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return int(end if begin is None else begin)

    def _is_plain(self, text: str) -> bool:
        """Whether the reference, too, reads nothing but words in it."""
        if any(token in text for token in self._held_back):
            return False
        return self._raw(text, add_special_tokens=False) == self.words(text)

    def _rendered(self, media: Sequence[Medium], turns: Sequence[Turn], request: Request) -> str:
        """The prompt as the checkpoint lays it out, each medium's tokens in their place in the last turn."""
        if self.template is None:
            written = "".join(medium.bare or medium.placeholder for medium in media)
            rendered = write_dialogue(turns, written) if request.turns else written + turns[-1].text
            return self._filled(rendered, media)
        messages = [
            {"role": turn.role, "content": self._content(turn.text, media if number == len(turns) else ())}
            for number, turn in enumerate(turns, 1)
        ]
        rendered = self._tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return self._filled(rendered, media)

    def _content(self, text: str, media: Sequence[Medium]) -> Any:
        """Templates of models that take media want a list."""
        return (
            [*({"type": medium.kind} for medium in media), {"type": "text", "text": text}] if self._held_back else text
        )

    def _filled(self, rendered: str, media: Sequence[Medium]) -> str:
        """The prompt with each medium's tokens in the place of its placeholder."""
        done = ""
        for medium in media:
            before, found, rendered = rendered.partition(medium.placeholder)
            if not found:
                raise ModelError(
                    f"{self._tokenizer.name_or_path}: its chat template writes no {medium.placeholder} for "
                    f"{medium.kind}; expected one for each"
                )
            done += before + medium.tokens
        return done + rendered

    def _tokens(self, rendered: str, begins: bool) -> list[int]:
        """Ids of a rendered prompt, or of its end, as transformers' processors tokenize it."""
        begin = self._tokenizer.bos_token
        has_begin = begin is not None and rendered.startswith(begin)
        special = begins and not has_begin and (self.template is None or bool(self._held_back))
        return self._raw(rendered, add_special_tokens=special)

    def _raw(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text in which the model's tokens are read as such."""
        with self._lock:
            encoded = self._tokenizer(
                text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
            )
        ids: list[int] = encoded["input_ids"]
        return ids
