"""mmbeam's fusion model as a generator: text from image, audio, text or features, whichever a sample has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from mmbeam.errors import ModelError
from mmbeam.models.fusion.configuration import FusionConfig
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.models.generators.base import Generator
from mmbeam.models.generators.decoding import decode, score
from mmbeam.models.loading import load_pretrained
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Request
from mmbeam.types import FeatureColumn


def read_processor(directory: Path, config: Mapping[str, Any]) -> FusionProcessor:
    """Read the processor of a model with this configuration. Raises ModelError if the configuration is invalid."""
    try:
        FusionConfig.from_dict(dict(config))
    except Exception as error:  # transformers validates with errors of its own
        raise ModelError(f"{directory}/config.json: not a configuration of a fusion model: {error}") from error
    processor, size = FusionProcessor.from_directory(directory), FusionConfig.from_dict(dict(config)).vocab_size
    if processor.vocab_size > size:
        raise ModelError(
            f"{directory}: expected a tokenizer of at most {size:,} tokens, as config.json says, found "
            f"{processor.vocab_size:,}; use the files of one model"
        )
    return processor


class FusionGenerator(Generator):
    """A FusionModel and its processor."""

    model_types = ("mmbeam-fusion",)

    def __init__(self, spec: GeneratorSpec, model: Any, processor: FusionProcessor) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.processor = processor

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        processor = read_processor(directory, config)
        texts = [source.max_tokens for source in processor.sources.values() if source.modality == "text"]
        return GeneratorSpec(
            family=cls.model_types[0],
            directory=str(directory),
            modalities=processor.modalities,
            sampling_rate=processor.sampling_rate,
            image_side=processor.image_side,
            max_text_tokens=max(texts, default=None),
            max_new_tokens=config.get("max_target_positions"),
            columns=tuple(
                FeatureColumn(
                    name=name,
                    modality=source.modality,
                    width=source.width,
                    tokens=source.tokens,
                    origin=source.origin,
                )
                for name, source in processor.sources.items()
                if source.kind == "features"
            ),
            embedding_dim=config.get("embedding_dim"),
        )

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> "FusionGenerator":
        """Load the weights and the processor."""
        directory = Path(spec.directory)
        model = load_pretrained(FusionModel, directory, device, dtype)
        return cls(spec, model, FusionProcessor.from_directory(directory))

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return the tokens of text and features; all images, and all audio, have the same number of tokens."""
        weights = []
        for request in requests:
            rows = self.encode([request])[0] if request.encoded is None else request.encoded
            features = sum(len(feature) for feature in request.features.values() if feature.ndim > 1)
            weights.append(max(map(len, rows.values()), default=0) + features)
        return weights

    def encode(self, requests: Sequence[Request]) -> list[Any]:
        """Return the token ids of each request's text, by source."""
        return self.processor.encode([request.text or "" for request in requests])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated."""
        return self.processor.count_tokens(texts)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return one text per request."""
        generated = decode(self.model, self._memory(requests), decoding, [request.seed for request in requests])
        texts = self.processor.decode([tokens.token_ids for tokens in generated])
        return [
            Generated(text=text, token_ids=tokens.token_ids, num_tokens=tokens.num_tokens, logprob=tokens.logprob)
            for text, tokens in zip(texts, generated, strict=True)
        ]

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """Return the log-probability of each text given its request."""
        return score(self.model, self._memory(requests), [text.token_ids for text in texts])

    def _memory(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the memory that the decoder attends to: the sources, encoded and fused."""
        encoding = self.model.encode(**self.processor(requests, self.device, self.dtype))
        memory = BaseModelOutput(last_hidden_state=encoding.memory)
        return {"encoder_outputs": memory, "attention_mask": encoding.memory_mask}
