"""What a generator is, to the stage that runs it and to whoever adds a family.

A family is one module with a subclass of Generator. `describe` reads configuration files only, at launch,
without weights; `load` reads the weights, once per process and device. `generate` gets requests that fit
one batch. It knows nothing of windows, order, failures or memory: the generate stage does that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmbeam.errors import UsageError
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request


class Generator:
    """A loaded model on one device. Subclasses override all but what they cannot do."""

    model_types: ClassVar[tuple[str, ...]] = ()  # the config.model_type values that this family serves
    schedules: ClassVar[bool] = False  # whether it makes batches by itself, and is given a window at once

    def __init__(self, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files; raise ModelError naming what is missing."""
        raise NotImplementedError

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        """Raise UsageError for languages that the model cannot be asked for. Of task and prompt `spec` says enough."""
        for option, language in (("language", instruction.language), ("source-language", instruction.source_language)):
            if language is not None:
                raise UsageError(f"--{option} {language}: a {spec.family} takes none; leave it out")

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> "Generator":
        """Load the weights (safetensors only) onto `device`, in eval mode."""
        raise NotImplementedError

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """The tokens that each request is to the model, media included: what batches are ordered and limited by.

        May raise for a request that cannot be answered; it is then weighed by itself, and fails when its turn comes.
        """
        raise NotImplementedError

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, not truncated, special tokens not counted."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """One text per request, in order. A batch gives what each request alone would give."""
        raise NotImplementedError

    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """The log-probability of each text, given its request: `Generated.logprob` of that text, had it come out.

        A family that cannot do so raises ModelError; `--explain` is not for it.
        """
        raise NotImplementedError
