"""Text encoders: BERT-like models and sentence encoders, with the pooling that each checkpoint names.

A directory with modules.json is used as sentence-transformers would use it (sentence.py). One without
names no pooling; its vector is the mean over the text's tokens, special tokens included, as
sentence-transformers also takes it to be. Decoders are of the generators' business.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers
from transformers import AutoModel

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.encoders.sentence import SentenceRecipe, load_head, pool, read_sentence_recipe
from mmbeam.models.loading import check_weights, load_pretrained, read_config, read_json
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, pad, unpad

logger = logging.getLogger(__name__)

# Families that count positions from the padding token's id on, and so have fewer than their table has rows.
OFFSET_POSITIONS = {
    *("camembert", "clap_text_model", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm"),
    *("mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
# Encoder-decoders of which the encoder alone is the text encoder.
ENCODER_HALVES: Mapping[str, str] = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
UNUSED = (r"(^|\.)pooler\.",)  # weights of BERT's own pooler, which not every checkpoint has
MAX_TOKENS = 8192  # where neither tokenizer nor configuration names a limit (relative positions)


class TextEncoder(Encoder):
    """Text vectors of a transformer, its pooling and what the checkpoint puts after it."""

    model_types: ClassVar[tuple[str, ...]] = ()  # the registry names them; a modules.json decides before any

    def __init__(self, spec: EncoderSpec, model: Any, recipe: SentenceRecipe, tokenizer: TextTokenizer) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.head = load_head(recipe, model.device)
        self.skip = 0 if recipe.include_prompt else self._prompt_tokens()

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read modules.json and the modules' configurations, or config.json alone; `config` is the transformer's."""
        recipe = read_recipe(directory)
        full = read_config(recipe.transformer)
        check_weights(recipe.transformer)
        check_vocabulary(recipe.transformer)
        return EncoderSpec(
            family=full.model_type,
            directory=str(directory),
            dims={"text": recipe.width(full.hidden_size)},
            token_dims={"text": full.hidden_size},
            max_text_tokens=text_limit(recipe.transformer, full, recipe.max_tokens),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load tokenizer and weights; pooling and what follows it run in float32 whatever the dtype."""
        recipe = read_recipe(Path(spec.directory))
        half = ENCODER_HALVES.get(read_config(recipe.transformer).model_type)
        family = AutoModel if half is None else getattr(transformers, half)
        model = load_pretrained(family, recipe.transformer, device, dtype, ignore_missing=UNUSED)
        return cls(spec, model, recipe, TextTokenizer(recipe.transformer))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompt and text, special tokens included, truncated to what the model takes."""
        return self.tokenizer.encode([self._prepare(self.recipe.prompt + text) for text in texts], self._limit)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, not truncated, special tokens and prompt not counted."""
        return self.tokenizer.count([self._prepare(text) for text in texts])

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode tokenized texts, padded on the right to the longest; tokens are the last hidden states."""
        return self._encode(token_ids, tokens, self.skip)

    def _encode(self, token_ids: Sequence[Sequence[int]], tokens: bool, skip: int, **more: torch.Tensor) -> Encoded:
        """Run the model on token ids (and `more` of its inputs), and pool all but the first `skip` of each."""
        longest = max(1, *map(len, token_ids))
        ids_BL, mask_BL = pad(token_ids, self.tokenizer.pad_id, self.device, length=longest)
        hidden_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL, **more).last_hidden_state
        pooled = self.head(pool(hidden_BLD, mask_BL, self.recipe.modes, skip))[:, : self.spec.dims["text"]]
        return Encoded(pooled=pooled, tokens=unpad(hidden_BLD.float(), list(map(len, token_ids))) if tokens else None)

    @property
    def _limit(self) -> int:
        assert self.spec.max_text_tokens is not None
        return self.spec.max_text_tokens

    def _prepare(self, text: str) -> str:
        # Character by character, as the Lowercase normalizer does it: str.lower() looks at a sigma's neighbours.
        return "".join(map(str.lower, text)) if self.recipe.lower_case else text

    def _prompt_tokens(self) -> int:
        """Tokens that the prompt puts before a text's own: without the special token that ends it."""
        ids, empty = self.tokenizer.encode([self._prepare(self.recipe.prompt), ""], self._limit)
        if not self.recipe.prompt:
            return 0
        return len(ids) - (ids[-1:] == empty[-1:])


def text_limit(directory: Path, config: Any, max_tokens: int | None = None) -> int:
    """How many tokens the model in `directory` takes, special tokens included.

    The smaller of what the positions hold and what the checkpoint names: `max_tokens`, or its
    tokenizer's model_max_length.
    """
    named = max_tokens or read_json(directory, "tokenizer_config.json", required=False).get("model_max_length")
    positions = getattr(config, "max_position_embeddings", None) or -1
    if config.model_type in OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    return int(
        min([limit for limit in (named, positions) if limit is not None and 0 < limit < 1 << 20], default=MAX_TOKENS)
    )


def read_recipe(directory: Path, inputs: frozenset[str] = frozenset(("text",))) -> SentenceRecipe:
    """How the checkpoint in `directory` makes one vector of a model's tokens; `inputs` are the kinds it may take."""
    path = directory / "modules.json"
    if not path.exists():
        logger.info("%s: has no modules.json; the vector of a text is the mean over its tokens", directory)
        return SentenceRecipe(transformer=directory)
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path}: expected a list of modules")
    return read_sentence_recipe(directory, modules, inputs)
