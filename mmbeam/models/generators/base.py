"""The interface between the generate stage and a family of generators.

A family is a subclass of Generator. `describe` reads configuration files at launch, without weights; `load` reads the
weights, once per process and device; `generate` runs one batch. Windows, order, failures and memory are handled
by stages/generate.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmbeam.errors import UsageError
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request


class Prepared(list[Request]):
    """The requests of a batch, with the inputs that `Generator.prepare` made of them. Can stand for the list."""

    def __init__(self, requests: Sequence[Request], inputs: Any) -> None:
        super().__init__(requests)
        self.inputs = inputs


class Generator:
    """A loaded model on one device. Subclasses override every method that the model supports."""

    model_types: ClassVar[tuple[str, ...]] = ()  # the config.model_type values that this family serves
    has_scheduler: ClassVar[bool] = False  # whether it forms its own batches; it then receives whole windows

    def __init__(self, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files. Raises ModelError that names what is missing."""
        raise NotImplementedError

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        """Raise UsageError for languages that the model does not support; `spec` declares its tasks and prompts."""
        for name, language in (("language", instruction.language), ("source_language", instruction.source_language)):
            if language is not None:
                raise unsupported_language(spec, name, language)

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> "Generator":
        """Load the weights (safetensors only) onto `device`, in eval mode."""
        raise NotImplementedError

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return the number of tokens of each request, media included: it orders windows and limits batches.

        May raise for an invalid request. That request is then weighed alone, and fails when it is generated.
        """
        raise NotImplementedError

    def encode(self, requests: Sequence[Request]) -> list[Any]:
        """Return the tokens of each request, for `Request.encoded`: in the unit's thread, once.

        `weigh` and `prepare` take them from there. None for a request without tokens of its own.
        """
        return [None] * len(requests)

    def prepare(self, requests: Sequence[Request]) -> Any:
        """Return the inputs of a batch that the host makes, copied to the device without waiting for it.

        Runs in the unit's thread, runs no kernels, and may raise for an invalid request. None if the host makes none.
        """
        return None

    def prepared(self, requests: Sequence[Request]) -> Any:
        """Return what `prepare` returns for requests, or has returned for them."""
        return requests.inputs if isinstance(requests, Prepared) else self.prepare(requests)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without truncation and special tokens."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return one text per request, in order, the same as for each request alone."""
        raise NotImplementedError

    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """Return the log-probability of each text given its request, comparable to `Generated.logprob`.

        Raises ModelError if the family does not support it; `explain` needs it.
        """
        raise NotImplementedError


def unsupported_language(spec: GeneratorSpec, name: str, language: str) -> UsageError:
    """Return the error for the argument `name`, "language" or "source_language", of a model that lacks it."""
    return UsageError(f"`{name}` {language}: {spec.family} has no {name.replace('_', ' ')} option; omit it")
