"""Text to text with any decoder: GPT-2, Llama, Qwen, Mistral ..., through the chat template where there is one.

Without one a model goes on from what it reads, and a dialogue is written down with its speakers' names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from mmbeam.config import Task
from mmbeam.models.generators.pretrained import PretrainedGenerator, context_of, room_of
from mmbeam.models.generators.prompts import PromptTokenizer, check_words
from mmbeam.models.loading import read_config
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request
from mmbeam.prompts.turns import until_next_turn


class CausalGenerator(PretrainedGenerator):
    """A decoder that continues a text, or answers it if it is a chat model."""

    model_class = AutoModelForCausalLM

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        chats = cls.read_tokenizer(directory).template is not None
        tasks: tuple[Task, ...] = ("caption", "summarize", "translate")
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("text",),
            required=("text",),
            tasks=("dialogue", *tasks) if chats else (*tasks, "dialogue"),
            takes_prompt=True,
            **room_of(context_of(parsed)),
        )

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        check_words(spec, instruction)

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(self._prompt(request)) for request in requests]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        return dict(self.left_padded([self._prompt(request) for request in requests]))

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        return answers(self.tokenizer, requests, super().generate(requests, decoding))

    def _prompt(self, request: Request) -> list[int]:
        return self.tokenizer.prompt((), request)


def answers(tokenizer: PromptTokenizer, requests: Sequence[Request], made: Sequence[Generated]) -> list[Generated]:
    """The texts; of a dialogue without a chat template, which the model goes on with, no more than its own turn."""
    return [
        replace(each, text=until_next_turn(each.text)) if request.turns and tokenizer.template is None else each
        for request, each in zip(requests, made, strict=True)
    ]
