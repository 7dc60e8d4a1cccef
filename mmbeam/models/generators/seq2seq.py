"""Text to text with any encoder and decoder: T5, BART, mBART, Marian, Pegasus ..., and EncoderDecoder (BERT to BERT).

A text that is longer than the encoder's positions is cut at its end, as their pipelines do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from mmbeam.models.generators.base import GeneratorSpec, Request
from mmbeam.models.generators.pretrained import PretrainedGenerator
from mmbeam.models.loading import read_config, read_json
from mmbeam.ops.collate import pad

MAX_TOKENS = 4096  # of a text, where neither positions nor the tokenizer name a limit
# What models call the number of their positions; LED's halves differ.
_POSITIONS = {
    "encoder": ("max_encoder_position_embeddings", "max_position_embeddings"),
    "decoder": ("max_decoder_position_embeddings", "max_position_embeddings"),
}


class Seq2SeqGenerator(PretrainedGenerator):
    """An encoder that reads the sample's text, and a decoder that writes another one."""

    model_class = AutoModelForSeq2SeqLM

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("text",),
            required=("text",),
            max_text_tokens=_text_limit(directory, parsed),
            max_new_tokens=_new_tokens(parsed),
        )

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(ids) for ids in self._sources(requests)]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        ids_BL, mask_BL = pad(self._sources(requests), self.tokenizer.pad_id, self.device)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if any(request.language for request in requests):
            inputs["decoder_input_ids"] = self._begun(requests)
        return inputs

    def _sources(self, requests: Sequence[Request]) -> list[list[int]]:
        assert self.spec.max_text_tokens is not None
        return self.tokenizer.encode([request.text or "" for request in requests], self.spec.max_text_tokens)

    def _begun(self, requests: Sequence[Request]) -> torch.Tensor:
        """The decoder's start token and the language's, which mBART, M2M100 and NLLB go on from. [B, 2]"""
        start = self.model.generation_config.decoder_start_token_id
        wanted = self.tokenizer.language_ids([request.language or "" for request in requests])
        return torch.tensor([[start, language] for language in wanted], device=self.device)


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
