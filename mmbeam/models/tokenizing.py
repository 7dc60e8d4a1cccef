"""Texts to token ids and counts, with the tokenizer that a checkpoint brings, and token ids to padded batches."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from mmbeam.errors import ModelError

# One of these sets of files holds the vocabulary; without any, some tokenizer classes come up empty.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.json", "source.spm", "target.spm"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
    ("spm.model",),
    ("tekken.json",),
)


class TextTokenizer:
    """A checkpoint's tokenizer, for any number of threads.

    The text of a sample is data: where it spells a special token ("<|endoftext|>", "[SEP]"), it is
    tokenized as ordinary characters, while the reference processors would read the token itself; where
    the vocabulary has no other way to spell it ("</s>" is a piece like any other to XLM-RoBERTa's), it is
    left out. On every other text the ids are the reference's.
    """

    def __init__(self, directory: Path) -> None:
        check_vocabulary(directory)
        # Of Mistral's format: one class, whether mistral_common is installed or not; its own splits no special tokens.
        options = {"mistral_format": False} if (directory / "tekken.json").is_file() else {}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ModelError(f"{directory}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
        # Truncation is a state of the tokenizer: changing it while another thread encodes raises "Already borrowed".
        self._lock = Lock()
        self._spellable: frozenset[int] = frozenset()
        self._spellable = self._find_spellable()

    @property
    def pad_id(self) -> int:
        """What to pad with; 0 where the tokenizer names nothing, as the mask hides it."""
        pad_id = self._tokenizer.pad_token_id
        return 0 if pad_id is None else int(pad_id)

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """Where padding goes."""
        return "left" if self._tokenizer.padding_side == "left" else "right"

    @property
    def inputs(self) -> Sequence[str]:
        """What the model takes of this tokenizer: "input_ids", and "attention_mask" unless it was trained without."""
        return tuple(self._tokenizer.model_input_names)

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each text with special tokens, truncated to `max_length`, not padded."""
        return self._ids(texts, truncation=True, max_length=max_length)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, not truncated, without special tokens."""
        return [len(ids) for ids in self._ids(texts, truncation=False, add_special_tokens=False, verbose=False)]

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        with self._lock:
            encoded = self._tokenizer(
                list(texts),
                padding=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_special_tokens_mask=bool(self._spellable),
                **options,
            )
        if not self._spellable:
            return list(encoded["input_ids"])
        return [
            [token for token, added in zip(ids, mask, strict=True) if added or token not in self._spellable]
            for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        ]

    def _find_spellable(self) -> frozenset[int]:
        """Special tokens that a text gets by spelling them, although they are to be split."""
        special = dict(zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=True))
        special.pop(self._tokenizer.unk_token_id, None)
        spelt = self._ids(list(special.values()), add_special_tokens=False)
        return frozenset(token for token, ids in zip(special, spelt, strict=True) if token in ids)


def check_vocabulary(directory: Path) -> None:
    """Raise ModelError unless the directory holds a tokenizer's files."""
    if not any(all((directory / name).is_file() for name in names) for names in _VOCABULARIES):
        expected = ", or ".join(" with ".join(names) for names in _VOCABULARIES)
        raise ModelError(f"{directory}: has no tokenizer; expected {expected}")


def pad(
    ids: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    length: int | None = None,
    side: Literal["left", "right"] = "right",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as int64 [B, L] and their mask (1: a token), L the longest of them or `length`.

    Raises ValueError if a sequence is longer than `length`.
    """
    longest = max(map(len, ids), default=0)
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"expected at most {width} tokens, found {longest}")
    tokens = torch.full((len(ids), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), width), dtype=torch.int64)
    for row, sequence in enumerate(ids):
        where = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        tokens[row, where] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, where] = 1
    return tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def unpad(
    hidden_BLD: torch.Tensor, lengths: Sequence[int], side: Literal["left", "right"] = "right"
) -> list[torch.Tensor]:
    """The vectors of each sequence's own tokens, [length, D] each."""
    if side == "right":
        return [hidden[:length] for hidden, length in zip(hidden_BLD, lengths, strict=True)]
    return [hidden[len(hidden) - length :] for hidden, length in zip(hidden_BLD, lengths, strict=True)]
