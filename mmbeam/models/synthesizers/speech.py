"""Speech by VITS (MMS-TTS and others), as transformers runs it."""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from transformers import VitsModel, VitsTokenizer

from mmbeam.config import Synthesis
from mmbeam.errors import ModelError, SampleError
from mmbeam.models.loading import check_weights, load_pretrained, read_config, read_json
from mmbeam.models.synthesizers.base import Encoded, Prompt, Synthesizer, SynthesizerSpec

_random = Lock()  # all threads share torch's generator of the CPU, and a seed is set on every GPU


class SpeechSynthesizer(Synthesizer):
    """A VITS. It draws from torch's global generator, so each text passes alone, under its own seed."""

    model: Any
    tokenizer: Any

    @classmethod
    def describe(cls, directory: Path, synthesis: Synthesis) -> SynthesizerSpec:
        """Read config.json and the tokenizer's files."""
        config = read_config(directory)
        check_weights(directory)
        read_json(directory, "vocab.json")
        settings = read_json(directory, "tokenizer_config.json")
        if settings.get("phonemize") and importlib.util.find_spec("phonemizer") is None:
            raise ModelError(
                f"{directory}/tokenizer_config.json: this model takes phonemes; run `pip install phonemizer`, and "
                "install espeak-ng"
            )
        return SynthesizerSpec(
            family=config.model_type,
            directory=str(directory),
            synthesis=replace(
                synthesis,
                format=synthesis.format or "wav",
                sampling_rate=synthesis.sampling_rate or int(config.sampling_rate),
            ),
        )

    @classmethod
    def load(cls, spec: SynthesizerSpec, device: torch.device, dtype: torch.dtype) -> "SpeechSynthesizer":
        """Load the weights onto `device`."""
        model = cls(spec, device, dtype)
        model.model = load_pretrained(VitsModel, Path(spec.directory), device, dtype)
        model.tokenizer = VitsTokenizer.from_pretrained(spec.directory, local_files_only=True)
        letters = (letter for letter in ("a", *model.tokenizer.get_vocab()) if model.num_tokens(letter))
        model.good_text = next(letters, "")
        if not model.good_text:
            raise ModelError(f"{spec.directory}/vocab.json: expected the letters of a language, found none")
        return model

    def num_tokens(self, text: str) -> int:
        """Return the number of tokens; 0 if the vocabulary has no character of the text."""
        ids = self.tokenizer(text).input_ids
        blank = self.tokenizer("").input_ids
        return 0 if len(ids) <= len(blank) else len(ids)

    def compute(self, prompts: Sequence[Prompt]) -> list[Any]:
        """Return a waveform for each prompt, or an exception if it is not finite."""
        made: list[Any] = []
        devices = [self.device] if self.device.type == "cuda" else []
        for prompt in prompts:
            inputs = self.tokenizer(prompt.text, return_tensors="pt").to(self.device)
            with _random, torch.random.fork_rng(devices):
                torch.manual_seed(prompt.seed)
                wave: Any = self.model(**inputs).waveform[0].float().cpu().numpy()
            is_finite = bool(np.isfinite(wave).all())
            made.append(wave if is_finite else FloatingPointError("the sound is not finite; a wider `dtype` may help"))
        return made

    def encode(self, made: Any) -> Encoded:
        """Return the sound as a file of 16 bits, resampled, and clipped to full scale."""
        rate, native = self.spec.synthesis.sampling_rate, int(self.model.config.sampling_rate)
        wave = made if rate == native else soxr.resample(made, native, rate)
        if not wave.size:
            raise SampleError(f"the sound is empty at {rate} Hz")
        buffer = io.BytesIO()
        soundfile.write(
            buffer, wave.clip(-1.0, 1.0), rate, format=str(self.spec.synthesis.format).upper(), subtype="PCM_16"
        )
        is_clipped = bool((np.abs(wave) > 1.0).any())
        return Encoded(buffer.getvalue(), "sounds clipped to full scale" if is_clipped else None)
