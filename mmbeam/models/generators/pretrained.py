"""Base classes for model families of the transformers library: PretrainedGenerator (any model), ImageGenerator (one
image), ChatGenerator (media in a chat), CausalGenerator (text only).

A family supplies the inputs of its model; decoding.py chooses the tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import AutoModelForCausalLM

from mmbeam.errors import LimitError, UsageError
from mmbeam.models.generators.base import Generator
from mmbeam.models.generators.decoding import GeneratedTokens, decode, score
from mmbeam.models.generators.media import AudioWindow, PixelReader, images_of
from mmbeam.models.generators.prompts import Medium, Placeholder, PromptTokenizer
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.tokenizing import pad, vocabulary_size
from mmbeam.names import TASKS, Modality, Task
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request
from mmbeam.prompts.turns import until_next_turn

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


class PretrainedGenerator(Generator):
    """A model of transformers with a `generate`. Subclasses implement `describe`, `encode_prompt` and `prepare`."""

    model_class: ClassVar[Any]  # of transformers

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.tokenizer = self.read_tokenizer(Path(spec.directory))
        self.vocabulary = vocabulary_size(model)

    @classmethod
    def read_tokenizer(cls, directory: Path) -> PromptTokenizer:
        """Read the checkpoint's tokenizer. Raises ModelError if files are missing."""
        return PromptTokenizer(directory)

    @classmethod
    def make_spec(cls, directory: Path, **fields: Any) -> GeneratorSpec:
        """Return the spec of a checkpoint, with `fields` as its other fields. Checks the tokenizer."""
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        return GeneratorSpec(family=parsed.model_type, directory=str(directory), **fields)

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the weights; `__init__` reads the other files from the directory."""
        return cls(spec, load_pretrained(cls.model_class, Path(spec.directory), device, dtype))

    def encode_prompt(self, request: Request) -> list[int]:
        """Return the ids of the whole prompt, placeholders of the media included."""
        raise NotImplementedError

    def encode(self, requests: Sequence[Request]) -> list[Any]:
        """Return the ids of each prompt."""
        return [self.encode_prompt(request) for request in requests]

    def prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the ids of each prompt, encoded once."""
        return [self.encode_prompt(request) if request.encoded is None else request.encoded for request in requests]

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the arguments of the model's `generate` that the host makes."""
        raise NotImplementedError

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the arguments of the model's `generate`: those of `prepare`, and what the device computes."""
        return dict(self.prepared(requests))

    @property
    def decoder(self) -> Any:
        """The model whose `generate` takes the inputs: the whole model, or the language model in it."""
        return self.model

    @property
    def options(self) -> Mapping[str, Any]:
        """Further arguments of `generate`."""
        return {}

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return the length of each prompt."""
        return list(map(len, self.prompts(requests)))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        return self.tokenizer.count(texts)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return one text per request. Raises LimitError for prompts that leave the decoder no room for an answer."""
        inputs, limit = self.inputs(requests), self.spec.max_text_tokens
        if limit is not None and not self.decoder.config.is_encoder_decoder:
            length = next(inputs[name] for name in ("inputs_embeds", "input_ids") if name in inputs).shape[1]
            if length + decoding.limit > limit:
                raise LimitError(
                    f"a prompt of {length:,} tokens and {decoding.limit} new ones; expected at most {limit:,} together"
                )
        seeds = [request.seed for request in requests]
        return self.to_texts(decode(self.decoder, inputs, decoding, seeds, **self.options))

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """Return the log-probability of each text given its request."""
        return score(self.decoder, self.inputs(requests), [text.token_ids for text in texts])

    def to_texts(self, generated: Sequence[GeneratedTokens]) -> list[Generated]:
        """Return the texts of generated tokens."""
        return [
            Generated(
                text=self.tokenizer.decode(tokens.token_ids),
                token_ids=tokens.token_ids,
                num_tokens=tokens.num_tokens,
                logprob=tokens.logprob,
            )
            for tokens in generated
        ]

    def left_padded(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return prompts of different lengths as a decoder's inputs, padded on the left so that they end together."""
        ids_BP, mask_BP = pad(prompts, self.tokenizer.pad_id, self.device, side="left", vocabulary=self.vocabulary)
        return {"input_ids": ids_BP, "attention_mask": mask_BP}


class ImageGenerator(PretrainedGenerator):
    """A model that takes exactly one image."""

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self._pixels = PixelReader(Path(spec.directory))

    @classmethod
    def make_spec(cls, directory: Path, **fields: Any) -> GeneratorSpec:
        """Return the spec of a model that takes an image and a prompt, unless `fields` differ. Checks its files."""
        shared: dict[str, Any] = {"modalities": ("image", "text"), "required": ("image",), "takes_prompt": True}
        pixels = PixelReader(directory)
        shared |= {"image_side": pixels.shorter_side, "notes": pixels.notes}
        return super().make_spec(directory, **{**shared, **fields})

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the images, for `inputs`."""
        return {"pixel_values": self._pixels.prepare(images_of(requests), self.device, self.dtype)}

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the arguments of `prepare`, with the preprocessed images, [B, 3, height, width]."""
        inputs = super().inputs(requests)
        return {**inputs, "pixel_values": self._pixels(inputs["pixel_values"], self.device, self.dtype)}


class ChatGenerator(PretrainedGenerator):
    """A decoder whose prompt holds media as tokens.

    Subclasses implement `describe`, `media`, and `processed` or `tensors`.
    """

    modalities: ClassVar[tuple[Modality, ...]]
    reserved: ClassVar[tuple[str, ...]] = ()  # tokens that the words of a sample are never encoded as
    placeholders: ClassVar[tuple[Placeholder, ...]] = ()  # of the media that the model takes
    type_ids: ClassVar[str | None] = None  # the model's argument for the kind of each token, if it has one

    @classmethod
    def read_tokenizer(cls, directory: Path) -> PromptTokenizer:
        """Read the checkpoint's tokenizer. Raises ModelError if files or tokens are missing."""
        return PromptTokenizer(directory, cls.reserved, cls.placeholders)

    @classmethod
    def make_spec(cls, directory: Path, **fields: Any) -> GeneratorSpec:
        """Return the spec of a model with all tasks and the class's modalities, unless `fields` differ."""
        shared = {"modalities": cls.modalities, "tasks": TASKS, "takes_prompt": True}
        limits = text_limits(context_length(read_config(directory)))
        return super().make_spec(directory, **limits, **{**shared, **fields})

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        """Raise UsageError for a language option that the prompt would not contain."""
        source = instruction.source_language
        if source is not None and instruction.task != "translate":
            raise UsageError(f"`source_language` {source}: only for `task` translate")
        language = instruction.language or source
        if language is not None and (instruction.template is not None or instruction.task == "dialogue"):
            raise UsageError(
                f"`language` {language}: {spec.family} has no language option; name the language in the prompt"
            )

    @classmethod
    def audio_window(cls, directory: Path) -> AudioWindow | None:
        """Return the windows that audio is cut into; None for a model without audio."""
        return None

    def media(self, request: Request) -> list[Medium]:
        """Return the request's images and audio, in the prompt's order."""
        return []

    def processed(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return what the checkpoint's own processor makes of the media, on its way to the device; {} without any."""
        return {}

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return what the device computes of the media, in the requests' order; {} without any."""
        return {}

    def token_types(self) -> dict[int, int]:
        """Return the kind of each media token by its id, for `type_ids`; words are of kind 0."""
        return {}

    def encode_prompt(self, request: Request) -> list[int]:
        """Return the ids of the whole prompt, placeholders of the media included."""
        return self.tokenizer.encode_prompt(self.media(request), request)

    def prepare(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the padded prompts, and the processed media."""
        return {**self.left_padded(self.prompts(requests)), **self.processed(requests)}

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the padded prompts, the kinds of their tokens, and the media."""
        inputs = super().inputs(requests)
        if self.type_ids is not None:
            types = torch.zeros_like(inputs["input_ids"])
            for token, kind in self.token_types().items():
                types[inputs["input_ids"] == token] = kind
            inputs[self.type_ids] = types
        return {**inputs, **self.tensors(requests)}


class CausalGenerator(ChatGenerator):
    """A decoder of text alone (GPT-2, Llama, Qwen, Mistral ...), which continues a text or answers as a chat model.

    Without a chat template, a dialogue is written with its speakers' names, and the answer ends at the next turn.
    """

    model_class = AutoModelForCausalLM
    modalities = ("text",)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and tokenizer. The default task of a model with a chat template is dialogue."""
        has_template = cls.read_tokenizer(directory).template is not None
        others: tuple[Task, ...] = ("caption", "summarize", "translate")
        tasks = ("dialogue", *others) if has_template else (*others, "dialogue")
        return cls.make_spec(directory, required=("text",), tasks=tasks)

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return one text per request."""
        return trim_answers(self.tokenizer, requests, super().generate(requests, decoding))


def trim_answers(
    tokenizer: PromptTokenizer, requests: Sequence[Request], texts: Sequence[Generated]
) -> list[Generated]:
    """Return the texts, without the turns that a model without a chat template writes after its answer."""
    return [
        replace(text, text=until_next_turn(text.text)) if request.turns and tokenizer.template is None else text
        for request, text in zip(requests, texts, strict=True)
    ]


def context_length(config: Any) -> int | None:
    """Return the context length of a decoder in tokens, prompt and answer together; None if it has no limit."""
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in _CONTEXT_NAMES]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def text_limits(context: int | None) -> dict[str, Any]:
    """Return a decoder's limits as fields of GeneratorSpec; its prompt has at least one token."""
    return {"max_text_tokens": context, "max_new_tokens": None if context is None else context - 1}
