"""Texts to token ids and their counts with a checkpoint's tokenizer, and token ids to padded batches."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from mmbeam.errors import ModelError
from mmbeam.models.loading import model_path, read_json
from mmbeam.ops.transfer import Uploaded, to_device

Side = Literal["left", "right"]

# A tokenizer needs one of these sets of files; without any, some tokenizer classes load with an empty vocabulary.
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
# Families that number positions from the padding token's id, so that their position table has unused rows.
_OFFSET_POSITIONS = {
    *("camembert", "clap_text_model", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm"),
    *("mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
_PIECE_CHARS = 1 << 16  # of a long text, counted at a time
_GROUP_CHARS = 1 << 18  # of texts that are tokenized together: an encoding takes up to 500 bytes per character
_ENOUGH_CHARS = 4096  # of a text, tokenized at first; or this many per token that is kept:
_CHARS_PER_TOKEN = 16
_CUT_TOKENS = 64  # at the end of a text, which a cut there may change
_MAX_TOKENS = 8192  # if neither tokenizer nor configuration sets a limit (relative positions)


class Tokens(NamedTuple):
    """The tokens of a text, special tokens included."""

    ids: list[int]
    offsets: list[tuple[int, int] | None]  # of their first character and behind their last one; None: a special token


class TextTokenizer:
    """A checkpoint's tokenizer, thread-safe.

    The text of a sample is data. Where it spells a special token ("<|endoftext|>", "[SEP]"), that is tokenized as
    ordinary characters, while the reference processors would insert the token itself. Where the vocabulary has no other
    spelling ("</s>" is an ordinary piece to XLM-RoBERTa's tokenizer), it is left out. On all other texts the ids are
    those of the reference.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_tokenizer(directory)
        # Truncation is a state of the tokenizer: setting it while another thread encodes raises "Already borrowed".
        self._lock = Lock()
        self._spellable: frozenset[int] = frozenset()
        self._spellable = self._find_spellable()

    @property
    def pad_id(self) -> int:
        """The padding token's id; 0 if the tokenizer has none, since padding is masked."""
        pad_id = self._tokenizer.pad_token_id
        return 0 if pad_id is None else int(pad_id)

    @property
    def padding_side(self) -> Side:
        """The side on which the tokenizer pads."""
        return "left" if self._tokenizer.padding_side == "left" else "right"

    @property
    def inputs(self) -> Sequence[str]:
        """The model's inputs: "input_ids", and "attention_mask" unless the model was trained without it."""
        return tuple(self._tokenizer.model_input_names)

    @property
    def max_length(self) -> int:
        """The tokenizer's own limit of tokens; a huge number if it has none."""
        return int(self._tokenizer.model_max_length)

    def special_types(self) -> dict[int, int]:
        """Return the token types of special tokens where they are not 0, for models that take types (XLNet)."""
        if "token_type_ids" not in self.inputs:
            return {}
        encoded = self._tokenizer("a", return_token_type_ids=True)
        special = set(self._tokenizer.all_special_ids)
        pairs = zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        return {token: kind for token, kind in pairs if token in special and kind}

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the ids of each text with special tokens, truncated to `max_length`, without padding."""
        keeps_end = self._tokenizer.truncation_side == "left"
        parts = [enough_text(text, max_length, self._count, keeps_end) for text in texts]
        return [ids for group in _groups(parts) for ids in self._ids(group, truncation=True, max_length=max_length)]

    def check_offsets(self, directory: Path) -> None:
        """Raise ModelError if the tokenizer does not know the characters of its tokens."""
        if not self._tokenizer.is_fast:
            raise ModelError(
                f"{directory}: its tokenizer, {type(self._tokenizer).__name__}, does not tell where in a text a token "
                "is; expected one with tokenizer.json"
            )

    def encode_with_offsets(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text as `encode` does, with their places in the text."""
        keeps_end = self._tokenizer.truncation_side == "left"
        encoded: list[Tokens] = []
        for text in texts:
            part = enough_text(text, max_length, self._count, keeps_end)
            shift = len(text) - len(part) if keeps_end else 0
            with self._lock:
                values = self._tokenizer(
                    part,
                    truncation=True,
                    max_length=max_length,
                    split_special_tokens=True,
                    return_offsets_mapping=True,
                    return_special_tokens_mask=True,
                )
            ids: list[int] = []
            offsets: list[tuple[int, int] | None] = []
            names = ("input_ids", "offset_mapping", "special_tokens_mask")
            for token, (start, end), special in zip(*(values[name] for name in names), strict=True):
                if special or token not in self._spellable:
                    ids.append(token)
                    offsets.append(None if special else (start + shift, end + shift))
            encoded.append(Tokens(ids, offsets))
        return encoded

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens. See count_in_pieces."""
        return count_in_pieces(texts, self._count)

    def count_encoded(self, ids: Sequence[int], max_length: int) -> int | None:
        """Return the number of tokens of a text by what `encode` returned for it, without special tokens.

        None if the text may have been truncated.
        """
        return len(ids) - self._tokenizer.num_special_tokens_to_add() if len(ids) < max_length else None

    def _count(self, texts: Sequence[str]) -> list[int]:
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
        """Return the special tokens that a text contains if it spells them, although they should be split."""
        special = dict(zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=True))
        special.pop(self._tokenizer.unk_token_id, None)
        spelt = self._ids(list(special.values()), add_special_tokens=False)
        return frozenset(token for token, ids in zip(special, spelt, strict=True) if token in ids)


def enough_text(
    text: str, max_tokens: int, count: Callable[[Sequence[str]], Sequence[int]], keeps_end: bool = False
) -> str:
    """Return the beginning of a text, or its end, that has all of its first, or last, `max_tokens` tokens.

    Tokenizing a million characters takes seconds and hundreds of megabytes. `count` returns numbers of tokens.
    """
    size = max(_ENOUGH_CHARS, _CHARS_PER_TOKEN * max_tokens)
    while size < len(text):
        part = text[-size:] if keeps_end else text[:size]
        if count([part])[0] >= max_tokens + _CUT_TOKENS:
            return part
        size *= 4
    return text


def count_in_pieces(texts: Sequence[str], count: Callable[[Sequence[str]], Sequence[int]]) -> list[int]:
    """Return the number of tokens of each text.

    A text of more than 65,536 characters is counted in pieces that begin with white space, which may differ by a token
    per piece from counting it whole.
    """
    totals = [0] * len(texts)
    pieces = [(position, piece) for position, text in enumerate(texts) for piece in _pieces(text)]
    counts = (number for group in _groups([piece for _, piece in pieces]) for number in count(group))
    for (position, _), number in zip(pieces, counts, strict=True):
        totals[position] += number
    return totals


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        space = max(text.rfind(char, start + _PIECE_CHARS // 2, end) for char in " \n\t")
        end = end if space < 0 else space
        yield text[start:end]
        start = end
    yield text[start:]


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in groups of at most _GROUP_CHARS characters, or of one text."""
    group: list[str] = []
    chars = 0
    for text in texts:
        if group and chars + len(text) > _GROUP_CHARS:
            yield group
            group, chars = [], 0
        group.append(text)
        chars += len(text)
    if group:
        yield group


def check_vocabulary(directory: Path) -> None:
    """Raise ModelError unless the directory has a tokenizer's files, and names none outside."""
    if not any(all((directory / name).is_file() for name in names) for names in _VOCABULARIES):
        expected = ", or ".join(" with ".join(names) for names in _VOCABULARIES)
        raise ModelError(f"{directory}: expected a tokenizer ({expected}), found none; copy the whole directory")
    for name in read_json(directory, "tokenizer_config.json", required=False).get("fast_tokenizer_files") or ():
        model_path(directory, name, "tokenizer_config.json")


def load_tokenizer(directory: Path) -> Any:
    """Return a checkpoint's tokenizer. Raises ModelError if its files are missing or cannot be loaded."""
    check_vocabulary(directory)
    # For Mistral's format, use transformers' class even if mistral_common is installed: that one cannot split
    # special tokens.
    options = {"mistral_format": False} if (directory / "tekken.json").is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"{directory}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error


def text_limit(directory: Path, config: Any, max_tokens: int | None = None) -> int:
    """Return how many tokens the model in `directory` takes, special tokens included.

    This is the smaller of its positions and of the limit that the checkpoint sets: `max_tokens`, or its tokenizer's
    model_max_length.
    """
    limit = max_tokens or read_json(directory, "tokenizer_config.json", required=False).get("model_max_length")
    positions = getattr(config, "max_position_embeddings", None) or -1
    if config.model_type in _OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    limits = [value for value in (limit, positions) if value is not None and 0 < value < 1 << 20]
    return int(min(limits, default=_MAX_TOKENS))


def vocabulary_size(model: Any) -> int | None:
    """Return how many token ids a model has vectors for.

    None if that is unknown, or if ids outside stand for media: the model replaces them itself.
    """
    marks = [value for name, value in vars(model.config).items() if name.endswith(("_token_id", "_token_index"))]
    largest = max((mark for mark in marks if isinstance(mark, int)), default=0)
    for part in (model, *(getattr(model, name, None) for name in ("text_model", "text_encoder", "language_model"))):
        try:
            table = part.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(table, torch.nn.Embedding):
            return table.num_embeddings if largest < table.num_embeddings else None
    return None


def pad(
    ids: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    length: int | None = None,
    side: Side = "right",
    vocabulary: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids as int64 [B, L] and their mask (1 for a token); L is `length`, or the longest sequence's.

    Raises ValueError if a sequence is longer than `length`, and IndexError for an id outside `vocabulary`, which would
    end the process on a GPU.
    """
    if vocabulary is not None:
        largest = max((max(sequence) for sequence in ids if sequence), default=0)
        if largest >= vocabulary:
            raise IndexError(
                f"token id {largest:,} is outside the model's vocabulary of {vocabulary:,}; are the tokenizer and the "
                "weights from the same model?"
            )
    longest = max(map(len, ids), default=0)
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"expected at most {width} tokens, found {longest}")
    if isinstance(ids, Uploaded):
        lengths_B1 = ids.flat[len(ids.flat) - len(ids) :, None]
        steps_BL = torch.arange(width, device=device) - (0 if side == "right" else width - lengths_B1)
        is_token_BL = (steps_BL >= 0) & (steps_BL < lengths_B1)
        index_BL = (lengths_B1.cumsum(0) - lengths_B1 + steps_BL).clamp(0, len(ids.flat) - 1)
        return torch.where(is_token_BL, ids.flat[index_BL], pad_id), is_token_BL.long()
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))[:, None]
    steps = np.arange(width) - (0 if side == "right" else width - lengths)
    is_token = (steps >= 0) & (steps < lengths)
    padded = np.full((2, len(ids), width), pad_id, np.int64)  # the ids, and the mask
    padded[0][is_token] = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
    padded[1] = is_token
    ids_BL, mask_BL = to_device(padded, device)
    return ids_BL, mask_BL


def unpad(hidden_BLD: torch.Tensor, lengths: Sequence[int], side: Side = "right") -> list[torch.Tensor]:
    """Return the vectors of each sequence without padding, [length, D] each."""
    if side == "right":
        return [hidden[:length] for hidden, length in zip(hidden_BLD, lengths, strict=True)]
    return [hidden[len(hidden) - length :] for hidden, length in zip(hidden_BLD, lengths, strict=True)]
