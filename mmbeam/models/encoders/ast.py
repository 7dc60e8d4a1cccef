"""AST, the Audio Spectrogram Transformer (Gong et al., 2021, arXiv:2104.01778), as a source of sound vectors.

A vector is the model's pooler_output: the mean of its class and distillation tokens. A sound longer than
the model's window of 10 s, which the reference cuts, is heard in the windows that cover it, evenly spread;
its vector is the mean of theirs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import ASTModel

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import load_pretrained, read_config
from mmbeam.models.recipes import read_ast_recipe
from mmbeam.ops.audio import to_rate
from mmbeam.ops.log_mel import AST_RATE, AstRecipe, ast_log_mel, ast_windows
from mmbeam.types import Waveform

WINDOWS_AT_ONCE = 16  # of 10 s: their spectrograms take 300 MB on the way


class AstEncoder(Encoder):
    """Audio vectors of an ASTModel."""

    model_types: ClassVar[tuple[str, ...]] = ("audio-spectrogram-transformer",)

    def __init__(self, spec: EncoderSpec, model: Any, recipe: AstRecipe) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the feature extractor's file."""
        full = read_config(directory)
        recipe = read_ast_recipe(directory)
        expected, found = (full.num_mel_bins, full.max_length), (recipe.n_mels, recipe.n_frames)
        if found != expected:
            raise ModelError(
                f"{directory}: config.json expects {expected[0]} mel bins and {expected[1]} frames, the feature "
                f"extractor makes {found[0]} and {found[1]}; they must be of the same model"
            )
        return EncoderSpec(
            family=full.model_type,
            directory=str(directory),
            dims={"audio": full.hidden_size},
            token_dims={"audio": full.hidden_size},
            sampling_rate=AST_RATE,
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the weights, without a classifier; the spectrogram stays in float64 whatever the dtype."""
        directory = Path(spec.directory)
        return cls(spec, load_pretrained(ASTModel, directory, device, dtype), read_ast_recipe(directory))

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode sounds; tokens are class token, distillation token and patches, window after window."""
        windows = [ast_windows(sound, self.recipe) for sound in to_rate(waves, rates, AST_RATE, self.device)]
        counts = [len(of_sound) for of_sound in windows]
        flat = [window for of_sound in windows for window in of_sound]
        outputs = [
            self.model(ast_log_mel(flat[first : first + WINDOWS_AT_ONCE], self.recipe).to(self.dtype))
            for first in range(0, len(flat), WINDOWS_AT_ONCE)
        ]
        vectors = torch.cat([output.pooler_output for output in outputs]).float()
        pooled = torch.stack([of_sound.mean(0) for of_sound in torch.split(vectors, counts)])
        if not tokens:
            return Encoded(pooled=pooled)
        hidden_BLD = torch.cat([output.last_hidden_state for output in outputs]).float()
        return Encoded(pooled=pooled, tokens=[of_sound.flatten(0, 1) for of_sound in torch.split(hidden_BLD, counts)])
