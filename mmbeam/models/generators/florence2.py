"""Florence-2 (Xiao et al., 2023, arXiv:2311.06242) as implemented by transformers: an image and a question.

Supported are checkpoints without remote code (florence-community/Florence-2-*). Each task is a question in plain
words; a prompt that is a task's name ("<DETAILED_CAPTION>") asks its question. Locations in the image, which the
model writes as special tokens, are dropped from the text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Florence2ForConditionalGeneration

from mmbeam.errors import LimitError, ModelError
from mmbeam.models.generators.media import PixelReader
from mmbeam.models.generators.pretrained import ImageGenerator, context_length
from mmbeam.models.generators.prompts import PromptTokenizer
from mmbeam.models.loading import read_config
from mmbeam.models.tokenizing import pad
from mmbeam.names import Task
from mmbeam.prompts.ask import GeneratorSpec, Request

QUESTIONS: Mapping[str, str] = {  # the tasks of Florence2Processor that are answered in words
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
    "<OCR>": "What is the text in the image?",
}
TASKS: Mapping[Task, str] = {"caption": "<CAPTION>", "transcribe": "<OCR>"}


class Florence2Generator(ImageGenerator):
    """Captions and answers of a Florence2ForConditionalGeneration."""

    model_types = ("florence2",)
    model_class = Florence2ForConditionalGeneration

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.image_tokens = _image_tokens(Path(spec.directory))

    @classmethod
    def read_tokenizer(cls, directory: Path) -> PromptTokenizer:
        """Read the checkpoint's tokenizer. Raises ModelError if files or tokens are missing."""
        return PromptTokenizer(directory, ("<image>",))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        _image_tokens(directory)
        limit = context_length(read_config(directory))
        return cls.make_spec(directory, tasks=tuple(TASKS), max_text_tokens=limit, max_new_tokens=limit)

    def encode_prompt(self, request: Request) -> list[int]:
        """Return the image's tokens and the question. Raises LimitError for a prompt that does not fit."""
        config = self.model.config
        question = request.words.strip() or TASKS[request.task]
        words = self.tokenizer.encode_words(QUESTIONS.get(question, question))
        room = (self.spec.max_text_tokens or self.image_tokens) - self.image_tokens - 2
        if request.prompt is not None and len(words) > room:
            raise LimitError(f"a prompt of {len(words):,} tokens; expected at most {room:,} besides the image")
        image = [config.image_token_id] * self.image_tokens
        begin, end = config.text_config.bos_token_id, config.text_config.eos_token_id
        return [*image, begin, *words[:room], end]

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the padded prompts and the images."""
        prompts = self.prompts(requests)
        ids_BL, mask_BL = pad(prompts, self.tokenizer.pad_id, self.device, vocabulary=self.vocabulary)
        return {"input_ids": ids_BL, "attention_mask": mask_BL, **super().prepare(requests)}


def _image_tokens(directory: Path) -> int:
    """Read the number of tokens of an image; only the image processor's file states it."""
    count = getattr(PixelReader(directory).processor, "image_seq_length", None)
    if not isinstance(count, int):
        raise ModelError(
            f"{directory}: expected image_seq_length in the image processor's file; use the checkpoint's own files"
        )
    return count
