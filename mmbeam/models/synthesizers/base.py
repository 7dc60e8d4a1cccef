"""The synthesizer interface, for the synthesize stage and for new families.

`describe` reads configuration files only, where the job is launched; `load` reads the weights, once per process and
device. A batch passes through `compute` (the device's thread), and `encode` (the unit's thread) makes files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmbeam.config import Synthesis


class Prompt(NamedTuple):
    """A text, and the seed of the random stream with which something is made of it."""

    text: str
    seed: int


class Encoded(NamedTuple):
    """A file, and what is unusual about it."""

    content: bytes
    warning: str | None = None


@dataclass(frozen=True, kw_only=True)
class SynthesizerSpec:
    """A synthesizer as its configuration files describe it, and what it is asked for."""

    family: str  # class of the pipeline or model
    directory: str
    synthesis: Synthesis  # with its defaults
    max_tokens: int | None = None  # of a prompt, special tokens included; None: no limit
    notes: tuple[str, ...] = ()  # what the summary says of the model


class Synthesizer:
    """A loaded model on one device."""

    good_text: str = "a"  # a prompt that every working model of the family accepts

    def __init__(self, spec: SynthesizerSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype

    @classmethod
    def describe(cls, directory: Path, synthesis: Synthesis) -> SynthesizerSpec:
        """Read configuration files; raise ModelError naming what is missing or unsupported."""
        raise NotImplementedError

    @classmethod
    def load(cls, spec: SynthesizerSpec, device: torch.device, dtype: torch.dtype) -> "Synthesizer":
        """Load the weights (safetensors only) onto `device`, in eval mode."""
        raise NotImplementedError

    def num_tokens(self, text: str) -> int:
        """Return the number of tokens of a prompt, special tokens included, not truncated; 0 if it says nothing."""
        raise NotImplementedError

    def compute(self, prompts: Sequence[Prompt]) -> list[Any]:
        """Return for each prompt what `encode` takes, or an exception if there is nothing to encode."""
        raise NotImplementedError

    def encode(self, made: Any) -> Encoded:
        """Return the file. Raises SampleError if there is nothing to write."""
        raise NotImplementedError
