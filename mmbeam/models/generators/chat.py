"""Decoder-only models that take pictures and sounds in their prompt. A family adds what becomes of those."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmbeam.config import TASKS
from mmbeam.models.generators.pretrained import PretrainedGenerator, context_of, room_of
from mmbeam.models.generators.prompts import Medium, PromptTokenizer, check_words
from mmbeam.models.loading import read_config
from mmbeam.prompts.ask import GeneratorSpec, Instruction, Request
from mmbeam.types import Modality


class ChatGenerator(PretrainedGenerator):
    """A model that answers a user's turn. Subclasses name its tokens and say what a picture or a sound becomes."""

    modalities: ClassVar[tuple[Modality, ...]]
    held_back: ClassVar[tuple[str, ...]]  # tokens that stand for media
    type_ids: ClassVar[str | None] = None  # what the model calls the kind of each token, if it wants to know

    @classmethod
    def read_tokenizer(cls, directory: Path) -> PromptTokenizer:
        return PromptTokenizer(directory, cls.held_back)

    @classmethod
    def spec_of(cls, directory: Path, **options: Any) -> GeneratorSpec:
        """What `describe` gives: the family's own facts among the options."""
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            **room_of(context_of(parsed)),
            takes_prompt=True,
            **{"modalities": cls.modalities, "tasks": TASKS, **options},
        )

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        check_words(spec, instruction)

    def media(self, request: Request) -> list[Medium]:
        """The request's pictures and sounds, in the prompt's order."""
        raise NotImplementedError

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """The media themselves, in the requests' order; {} if none has any."""
        raise NotImplementedError

    def kinds(self) -> dict[int, int]:
        """The kind of a token, for `type_ids`, by its id; words are of kind 0."""
        return {}

    def prompt(self, request: Request) -> list[int]:
        """Ids of the whole prompt, placeholders of the media included."""
        return self.tokenizer.prompt(self.media(request), request)

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(self.prompt(request)) for request in requests]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        inputs = self.left_padded([self.prompt(request) for request in requests])
        if self.type_ids is not None:
            types = torch.zeros_like(inputs["input_ids"])
            for token, kind in self.kinds().items():
                types[inputs["input_ids"] == token] = kind
            inputs[self.type_ids] = types
        return {**inputs, **self.tensors(requests)}
