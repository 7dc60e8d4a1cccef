"""What the generators that are models of transformers share: loading, decoding, counting; and reading their files.

A family says what goes into its model (`inputs`); which token comes next is decoding.py's affair.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import AutoImageProcessor

from mmbeam.errors import LimitError, ModelError
from mmbeam.models.generators.base import Generator
from mmbeam.models.generators.decoding import GeneratedTokens, decode, score
from mmbeam.models.generators.prompts import PromptTokenizer
from mmbeam.models.loading import load_pretrained, quiet_transformers, read_json
from mmbeam.models.tokenizing import pad
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Request

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
# How pictures are given to image processors, which would take one of 3 rows for three channels.
AS_DECODED: Mapping[str, str] = {"input_data_format": "channels_last", "return_tensors": "pt"}


class PretrainedGenerator(Generator):
    """A model of transformers that generates. Subclasses say its class, what goes into it, and what that weighs."""

    model_class: ClassVar[Any]  # of transformers

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.tokenizer = self.read_tokenizer(Path(spec.directory))

    @classmethod
    def read_tokenizer(cls, directory: Path) -> PromptTokenizer:
        """The checkpoint's tokenizer; ModelError if its files are missing."""
        return PromptTokenizer(directory)

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the weights; whatever else the family needs is read from the directory."""
        return cls(spec, load_pretrained(cls.model_class, Path(spec.directory), device, dtype))

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """What the model's `generate` takes for these requests."""
        raise NotImplementedError

    @property
    def decoder(self) -> Any:
        """The model whose `generate` takes the inputs: the whole one, or the language model inside it."""
        return self.model

    @property
    def options(self) -> Mapping[str, Any]:
        """What its `generate` is told beside the inputs."""
        return {}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.tokenizer.count(texts)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        inputs = self.inputs(requests)
        self._check_room(inputs, decoding)
        seeds = [request.seed for request in requests]
        return self.finished(decode(self.decoder, inputs, decoding, seeds, **self.options))

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        return score(self.decoder, self.inputs(requests), [text.token_ids for text in texts])

    def finished(self, decoded: Sequence[GeneratedTokens]) -> list[Generated]:
        """The texts that tokens spell."""
        return [
            Generated(
                text=self.tokenizer.decode(each.token_ids),
                token_ids=each.token_ids,
                num_tokens=each.num_tokens,
                logprob=each.logprob,
            )
            for each in decoded
        ]

    def _check_room(self, inputs: Mapping[str, Any], decoding: Decoding) -> None:
        """Raise LimitError for prompts that leave a decoder no room for its answer."""
        if self.decoder.config.is_encoder_decoder or self.spec.max_text_tokens is None:
            return
        prompt = next(inputs[name] for name in ("inputs_embeds", "input_ids") if name in inputs).shape[1]
        if prompt + decoding.limit > self.spec.max_text_tokens:
            raise LimitError(
                f"a prompt of {prompt:,} tokens and {decoding.limit} new ones; "
                f"expected at most {self.spec.max_text_tokens:,} together"
            )

    def left_padded(self, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Prompts of different lengths as a decoder takes them: they end together."""
        ids_BP, mask_BP = pad(ids, self.tokenizer.pad_id, self.device, side="left")
        return {"input_ids": ids_BP, "attention_mask": mask_BP}


def context_of(config: Any) -> int | None:
    """The tokens, prompt and answer, that a decoder's positions hold; None if its configuration does not say."""
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in _CONTEXT_NAMES]
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def room_of(context: int | None) -> dict[str, Any]:
    """The most that such a decoder reads and writes, as GeneratorSpec has it: it begins with a token at least."""
    return {"max_text_tokens": context, "max_new_tokens": None if context is None else context - 1}


def read_image_processor(directory: Path) -> Any:
    """The checkpoint's own image processor, which needs no torchvision. Raises ModelError."""
    _check_processor(directory, "image processor")
    auto: Any = AutoImageProcessor  # untyped
    quiet_transformers()
    try:
        return auto.from_pretrained(directory, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{directory}: its image processor cannot be read: {type(error).__name__}: {error}") from error


def processor_option(directory: Path, name: str, default: Any) -> Any:
    """An option of the checkpoint's processor itself, as processor_config.json has it."""
    return read_json(directory, "processor_config.json", required=False).get(name, default)


def _check_processor(directory: Path, what: str) -> None:
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(f"{directory}: has no preprocessor_config.json or processor_config.json, where its {what} is")
