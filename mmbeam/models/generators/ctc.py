"""CTC speech recognisers: wav2vec2, HuBERT, WavLM, Parakeet CTC and others that AutoModelForCTC loads.

A model emits a token or a blank per frame; its text is the most likely token of each frame, repetitions and blanks
removed by the checkpoint's own tokenizer. Audio is cut into pieces of at most 30 s, whose texts are joined. Pieces of
equal shape share a batch, and nothing is padded, so that a text equals that of transformers for the piece alone.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from transformers.models.auto import modeling_auto

from mmbeam.errors import ModelError
from mmbeam.models.generators.base import Generator
from mmbeam.models.loading import load_pretrained, quiet_transformers, read_config
from mmbeam.ops.audio import to_rate
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Request

CLASSES: Mapping[str, str] = modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES
PIECE_SECONDS = 30

Inputs = dict[str, Any]


class CtcGenerator(Generator):
    """A model of CLASSES with its AutoProcessor."""

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.processor = _read_processor(Path(spec.directory))
        self.blank = int(model.config.pad_token_id)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration, processor and tokenizer."""
        parsed, processor = read_config(directory), _read_processor(directory)
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("audio",),
            required=("audio",),
            tasks=("transcribe",),
            takes_prompt=False,
            only_greedy=True,
            sampling_rate=int(processor.feature_extractor.sampling_rate),
        )

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the weights."""
        return cls(
            spec, load_pretrained(getattr(transformers, CLASSES[spec.family]), Path(spec.directory), device, dtype)
        )

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return the hundredths of a second of each sound."""
        return [1 + 100 * len(wave) // rate for wave, rate in (_sound(request) for request in requests)]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        return [len(self.processor.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]

    def prepare(self, requests: Sequence[Request]) -> Any:
        """Return the model's inputs for the pieces of each sound, on the CPU."""
        return [self._pieces(request) for request in requests]

    def _pieces(self, request: Request) -> list[Inputs]:
        assert self.spec.sampling_rate is not None
        wave, rate = _sound(request)
        [resampled] = to_rate([wave], [rate], self.spec.sampling_rate, torch.device("cpu"))
        pieces = torch.tensor_split(
            resampled.cpu(), max(1, math.ceil(len(resampled) / (PIECE_SECONDS * self.spec.sampling_rate)))
        )
        extract = self.processor.feature_extractor
        inputs = [
            extract(piece.numpy(), sampling_rate=self.spec.sampling_rate, return_tensors="pt") for piece in pieces
        ]
        return [{name: value for name, value in values.items() if value is not None} for values in inputs]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return one text per request."""
        prepared: list[list[Inputs]] = self.prepared(requests)
        groups: dict[Any, list[tuple[int, int]]] = {}
        for row, pieces in enumerate(prepared):
            for number, inputs in enumerate(pieces):
                shapes = tuple((name, value.shape) for name, value in sorted(inputs.items()))
                groups.setdefault(shapes, []).append((row, number))
        done: dict[tuple[int, int], tuple[list[int], float]] = {}
        for positions in groups.values():
            parts = [prepared[row][number] for row, number in positions]
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            joined = {
                name: to_device(value.to(self.dtype) if value.is_floating_point() else value, self.device)
                for name, value in joined.items()
            }
            logits_BTV = self.model(**joined).logits.float()
            best_BT = logits_BTV.argmax(-1)
            logprobs_B = logits_BTV.log_softmax(-1).amax(-1).sum(-1).tolist()
            done.update(zip(positions, zip(best_BT.tolist(), logprobs_B, strict=True), strict=True))
        return [self._text([done[row, number] for number in range(len(pieces))]) for row, pieces in enumerate(prepared)]

    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """Raise ModelError: the probability of a text is a sum over its alignments."""
        raise ModelError(f"{self.spec.directory}: a CTC model does not score texts, which `explain` needs")

    def _text(self, pieces: Sequence[tuple[list[int], float]]) -> Generated:
        """Return the text of the tokens of each piece's frames."""
        texts = [text for frames, _ in pieces if (text := self.processor.batch_decode([frames])[0])]
        tokens: list[int] = []
        for frames, _ in pieces:
            changes = [token for before, token in zip([None, *frames], frames, strict=False) if token != before]
            tokens += [token for token in changes if token != self.blank]
        return Generated(
            text=" ".join(texts),
            token_ids=tuple(tokens),
            num_tokens=len(tokens),
            logprob=math.fsum(logprob for _, logprob in pieces),
        )


def _sound(request: Request) -> tuple[Any, int]:
    assert request.audio is not None  # required
    return request.audio


def _read_processor(directory: Path) -> Any:
    """Return the checkpoint's processor. Raises ModelError."""
    quiet_transformers()
    auto: Any = transformers.AutoProcessor  # untyped
    try:
        processor = auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types
        raise ModelError(f"{directory}: its processor cannot be loaded: {type(error).__name__}: {error}") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "feature_extractor"):
        raise ModelError(
            f"{directory}: expected a processor with a tokenizer and a feature extractor, found "
            f"{type(processor).__name__}; copy the whole directory"
        )
    return processor
