"""Text to text with any decoder: GPT-2, Llama, Qwen, Mistral ..., through the chat template where there is one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from mmbeam.models.generators.base import GeneratorSpec, Request
from mmbeam.models.generators.pretrained import PretrainedGenerator, context_of
from mmbeam.models.loading import read_config


class CausalGenerator(PretrainedGenerator):
    """A decoder that continues a text, or answers it if it is a chat model."""

    model_class = AutoModelForCausalLM

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("text",),
            required=("text",),
            max_text_tokens=context_of(parsed),
        )

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(ids) for ids in self._prompts(requests)]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        return dict(self.left_padded(self._prompts(requests)))

    def _prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        return [self.tokenizer.prompt((), request.text or "") for request in requests]
