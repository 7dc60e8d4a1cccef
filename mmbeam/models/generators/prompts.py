"""Prompts for decoder-only models: a turn of the user with pictures, sounds and words, as the checkpoint lays it out.

The words of a sample are data. Where they spell one of the model's own tokens ("<|im_end|>", "<image>") they
are tokenized as ordinary characters, by themselves; on all other words the ids are the reference
processor's. What stands for a picture or a sound is the family's affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbeam.errors import ModelError
from mmbeam.models.generators.base import Request
from mmbeam.models.loading import read_json
from mmbeam.models.tokenizing import TextTokenizer

WORDS_GO_HERE = "\ue000\ue001\ue000"  # private characters: no template changes them, no sample spells them by chance


@dataclass(frozen=True)
class Medium:
    """A picture or a sound in a prompt."""

    kind: str  # "image" or "audio", as chat templates call it
    placeholder: str  # what the template writes for it
    tokens: str  # what is put in the place of that: as many of the model's tokens as it takes
    bare: str = ""  # what is written for it where there is no template; "": the placeholder alone


def instruction(request: Request) -> str:
    """What the model is asked: the request's own text, or else what its task comes to for what it holds."""
    if request.text is not None and request.text.strip():
        return request.text
    if request.image is None and request.audio is None:
        return request.text or ""
    held = {"image": request.image, "sound": request.audio}
    what = " and ".join(f"the {name}" for name, value in held.items() if value is not None)
    into = request.language or "English"
    asked = {
        "transcribe": "Transcribe the speech." if request.audio is not None else "Write down the text in the image.",
        "translate": f"Translate {'the speech' if request.audio is not None else 'the text in the image'} into {into}.",
        "summarize": f"Summarize {what} in one sentence.",
    }
    return asked.get(request.task, f"Describe {what} in one sentence.")


class PromptTokenizer(TextTokenizer):
    """A checkpoint's tokenizer and chat template. `held_back` are tokens that the words of no sample may become."""

    def __init__(self, directory: Path, held_back: Sequence[str] = ()) -> None:
        super().__init__(directory)
        legacy = read_json(directory, "chat_template.json", required=False).get("chat_template")
        self.template: str | None = self._tokenizer.chat_template or legacy
        self._held_back = tuple(held_back)
        self._held_back_ids = frozenset(self.ids_of(held_back))

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
        """The ids of tokens; ModelError for one that the vocabulary lacks."""
        vocabulary = self._tokenizer.get_vocab()
        missing = [token for token in tokens if token not in vocabulary]
        if missing:
            raise ModelError(f"{self._tokenizer.name_or_path}: its tokenizer has no {', '.join(missing)}")
        return [vocabulary[token] for token in tokens]

    def language_ids(self, languages: Sequence[str]) -> list[int]:
        """The tokens by which models of many languages are told theirs: "de_DE" of mBART, "__de__" (de) of M2M100."""
        vocabulary = self._tokenizer.get_vocab()
        return self.ids_of([language if language in vocabulary else f"__{language}__" for language in languages])

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids spell, without special tokens and the space around it."""
        with self._lock:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def words(self, text: str) -> list[int]:
        """Ids of a text by itself, nothing of it taken for a token of the model's own."""
        [ids] = self._ids([text], add_special_tokens=False, verbose=False)
        return [token for token in ids if token not in self._held_back_ids]

    def prompt(self, media: Sequence[Medium], text: str) -> list[int]:
        """Ids of one turn of the user, up to where the model's answer begins."""
        if self._is_plain(text):
            ids = self._tokens(self._filled(self._rendered(media, text), media), begins=True)
        else:
            rendered = self._filled(self._rendered(media, WORDS_GO_HERE), media)
            before, _, after = rendered.partition(WORDS_GO_HERE)
            ids = [*self._tokens(before, begins=True), *self.words(text), *self._tokens(after, begins=False)]
        return ids or [self._start_id]

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

    def _rendered(self, media: Sequence[Medium], text: str) -> str:
        if self.template is None:
            return "".join(medium.bare or medium.placeholder for medium in media) + text
        content: Any = text
        if self._held_back:  # templates of models that take media want a list
            content = [*({"type": medium.kind} for medium in media), {"type": "text", "text": text}]
        rendered: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return rendered

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
