"""Text encoders: BERT-like models and sentence encoders, with the pooling that each checkpoint defines.

A directory with modules.json is used as sentence-transformers uses it (sentence.py). Without it, a text's vector is the
mean over its tokens, special tokens included, which is also the default of sentence-transformers. Decoder-only models
are generators (models/generators/).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel

from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec, TransformersEncoder
from mmbeam.models.encoders.sentence import SentenceRecipe, load_head, pool, read_sentence_recipe
from mmbeam.models.loading import check_weights, load_pretrained, read_config
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, pad, text_limit, unpad

# Encoder-decoders whose encoder alone is the text encoder.
ENCODER_HALVES: Mapping[str, str] = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
UNUSED = (r"(^|\.)pooler\.",)  # weights of BERT's own pooler, which some checkpoints lack


class TextEncoder(TransformersEncoder):
    """Text vectors of a transformer, followed by the pooling and the head that the checkpoint defines."""

    recipe: SentenceRecipe

    def __init__(self, spec: EncoderSpec, model: Any, recipe: SentenceRecipe, tokenizer: TextTokenizer) -> None:
        if spec.text_prompt is not None:
            recipe = replace(recipe, prompt=spec.text_prompt)
        super().__init__(spec, model, recipe, tokenizer)
        self.head = load_head(recipe, model.device)
        self.skip = 0 if recipe.include_prompt else self._prompt_tokens()

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read modules.json and the modules' configurations, or config.json alone."""
        recipe = read_sentence_recipe(directory)
        parsed = read_config(recipe.transformer)
        check_weights(recipe.transformer)
        check_vocabulary(recipe.transformer)
        return EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={"text": recipe.width(parsed.hidden_size)},
            token_dims={"text": parsed.hidden_size},
            max_text_tokens=text_limit(recipe.transformer, parsed, recipe.max_tokens),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load tokenizer and weights; pooling and the head run in float32."""
        recipe = read_sentence_recipe(Path(spec.directory))
        half = ENCODER_HALVES.get(read_config(recipe.transformer).model_type)
        model_class = AutoModel if half is None else getattr(transformers, half)
        model = load_pretrained(model_class, recipe.transformer, device, dtype, ignore_missing=UNUSED)
        return cls(spec, model, recipe, TextTokenizer(recipe.transformer))

    def with_prompt(self, text: str) -> str:
        """Return the text: `tokenize` adds the prompt, whose tokens some checkpoints do not pool."""
        return text

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of prompt and text, special tokens included, truncated to the model's limit."""
        return super().tokenize([self._prepare(self.recipe.prompt + text) for text in texts])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens and prompt."""
        return super().count_tokens([self._prepare(text) for text in texts])

    def count_encoded(self, token_ids: Sequence[int]) -> int | None:
        """Return the number of tokens of a text by its ids; None for a text that is truncated or has a prompt."""
        return None if self.recipe.prompt else super().count_encoded(token_ids)

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made, padded on the right to the longest; tokens are the last hidden states."""
        return self._encode(token_ids, tokens, self.skip)

    def _encode(self, token_ids: Sequence[Sequence[int]], tokens: bool, skip: int, **inputs: torch.Tensor) -> Encoded:
        """Run the model on token ids and further `inputs`, and pool all tokens but the first `skip` of each text."""
        lengths = list(map(len, token_ids))
        length, pad_id = max(1, *lengths), self.tokenizer.pad_id
        ids_BL, mask_BL = pad(token_ids, pad_id, self.device, length, vocabulary=self.vocabulary)
        hidden_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL, **inputs).last_hidden_state
        pooled_BD = self.head(pool(hidden_BLD, mask_BL, self.recipe.modes, skip))[:, : self.spec.dims["text"]]
        return Encoded(pooled=pooled_BD, tokens=unpad(hidden_BLD.float(), lengths) if tokens else None)

    def _prepare(self, text: str) -> str:
        # One character at a time, like the Lowercase normalizer: str.lower() looks at the neighbours of a sigma.
        return "".join(map(str.lower, text)) if self.recipe.lower_case else text

    def _prompt_tokens(self) -> int:
        """Return the number of the prompt's tokens before the text, without the special token at its end."""
        if not self.recipe.prompt:
            return 0
        ids, empty = super().tokenize([self._prepare(self.recipe.prompt), ""])
        return len(ids) - (ids[-1:] == empty[-1:])
