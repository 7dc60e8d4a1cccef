"""Florence-2 (Xiao et al., 2023, arXiv:2311.06242), as transformers has it: a picture and a question.

Checkpoints are those that need no remote code (florence-community/Florence-2-*). Its tasks are questions in
plain words; a prompt that is the name of one ("<DETAILED_CAPTION>") asks that question. Places in the
picture, which it writes as tokens of their own, are no text and are left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Florence2ForConditionalGeneration

from mmbeam.config import Task
from mmbeam.errors import LimitError, ModelError
from mmbeam.models.generators.pixels import PixelReader
from mmbeam.models.generators.pretrained import PretrainedGenerator, context_of
from mmbeam.models.generators.prompts import PromptTokenizer
from mmbeam.models.loading import read_config
from mmbeam.models.tokenizing import pad
from mmbeam.prompts.ask import GeneratorSpec, Request

QUESTIONS: Mapping[str, str] = {  # of Florence2Processor, those that are answered in words
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
    "<OCR>": "What is the text in the image?",
}
TASKS: Mapping[Task, str] = {"caption": "<CAPTION>", "transcribe": "<OCR>"}


class Florence2Generator(PretrainedGenerator):
    """Captions and answers of a Florence2ForConditionalGeneration."""

    model_types = ("florence2",)
    model_class = Florence2ForConditionalGeneration

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.pixels = PixelReader(Path(spec.directory))
        self.picture_tokens = _picture_tokens(self.pixels, spec.directory)

    @classmethod
    def read_tokenizer(cls, directory: Path) -> PromptTokenizer:
        return PromptTokenizer(directory, ("<image>",))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        pixels = PixelReader(directory)
        _picture_tokens(pixels, str(directory))
        limit = context_of(parsed)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("image", "text"),
            required=("image",),
            tasks=tuple(TASKS),
            takes_prompt=True,
            image_side=pixels.shorter_side,
            max_text_tokens=limit,
            max_new_tokens=limit,
        )

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        return [len(prompt) for prompt in self._prompts(requests)]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        ids_BL, mask_BL = pad(self._prompts(requests), self.tokenizer.pad_id, self.device)
        pixels = self.pixels([request.image for request in requests], self.device, self.dtype)
        return {"input_ids": ids_BL, "attention_mask": mask_BL, "pixel_values": pixels}

    def _prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        config = self.model.config
        picture = [config.image_token_id] * self.picture_tokens
        begin, end = config.text_config.bos_token_id, config.text_config.eos_token_id
        return [[*picture, begin, *self._words(request), end] for request in requests]

    def _words(self, request: Request) -> list[int]:
        """Ids of what is asked. Raises LimitError for a prompt that does not fit beside the picture."""
        room = (self.spec.max_text_tokens or self.picture_tokens) - self.picture_tokens - 2
        words = self.tokenizer.words(_question(request))
        if request.prompt is not None and len(words) > room:
            raise LimitError(f"a prompt of {len(words):,} tokens; expected at most {room:,} beside the picture")
        return words[:room]


def _question(request: Request) -> str:
    asked = request.words.strip() or TASKS[request.task]
    return QUESTIONS.get(asked, asked)


def _picture_tokens(pixels: PixelReader, directory: str) -> int:
    """The tokens that a picture is to the model: the image processor's file alone says how many."""
    found = getattr(pixels.processor, "image_seq_length", None)
    if not isinstance(found, int):
        raise ModelError(f"{directory}: its image processor names no image_seq_length; take the checkpoint's own files")
    return found
