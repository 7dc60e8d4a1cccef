"""The sentence-transformers layout: the modules that turn a transformer's hidden states into one vector per text.

`read_sentence_recipe` reads modules.json and each module's configuration, as versions 2 to 6 write them. `pool` and
`load_head` are the modules after the transformer. An unknown module, option or activation is a ModelError that names
it; code is never imported from a path in these files.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from mmbeam.errors import ModelError, UsageError, did_you_mean
from mmbeam.models.loading import check_weights, model_path, read_json
from mmbeam.models.recipes import RecipeError

logger = logging.getLogger(__name__)

# Pooling mode by flag of older files; several modes are concatenated in this order.
LEGACY_MODES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = (
    *("Identity", "Tanh", "ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "SELU", "LeakyReLU", "Sigmoid", "Softplus"),
)
HEAD_MODULES = ("Dense", "LayerNorm", "Normalize", "Dropout")
# Names of the Transformer module's file; version 3 keeps the first only.
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Arguments for from_pretrained that change no vector.
HARMLESS_ARGUMENTS = {
    *("add_pooling_layer", "attn_implementation", "dtype", "torch_dtype", "padding_side", "trust_remote_code"),
}
TEXT_ONLY = frozenset(("text",))


@dataclass(frozen=True, kw_only=True)
class SentenceRecipe:
    """The modules before and after the transformer. The defaults are for a directory without modules.json."""

    transformer: Path  # its directory
    modes: tuple[str, ...] = ("mean",)  # how tokens are pooled; the vectors of several modes are concatenated
    include_prompt: bool = True  # whether the prompt's tokens are pooled too
    prompt: str = ""  # put before every text
    lower_case: bool = False
    max_tokens: int | None = None
    truncate_dim: int | None = None  # how many of the vector's values are kept
    head: tuple[tuple[str, Path], ...] = ()  # (class, directory) of the modules after pooling

    def width(self, hidden_size: int) -> int:
        """Return the width of a text's vector, for a transformer of `hidden_size`."""
        width = hidden_size * len(self.modes)
        for name, directory in self.head:
            if name == "Dense":
                width = _positive(directory, read_json(directory, "config.json"), "out_features")
        return min(width, self.truncate_dim or width)


def read_sentence_recipe(directory: Path, inputs: frozenset[str] = TEXT_ONLY) -> SentenceRecipe:
    """Return the recipe by which the checkpoint in `directory` pools a text into one vector.

    `inputs` are the modalities that the transformer accepts.

    Raises ModelError if a file is missing, or sets an option that is unsupported.
    """
    path = directory / "modules.json"
    if not path.exists():
        logger.info("%s: modules.json not found; a text's vector is the mean over its tokens", directory)
        return SentenceRecipe(transformer=directory)
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path}: expected a list of modules")
    chain = [_module(directory, module) for module in modules]
    names = [name for name, _ in chain]
    if names[:2] != ["Transformer", "Pooling"] or any(name not in HEAD_MODULES for name in names[2:]):
        raise RecipeError(
            f"{path}: expected Transformer, Pooling and then any of {', '.join(HEAD_MODULES)}, or the package "
            f"sentence-transformers, which runs others; found {', '.join(names)}"
        )
    (_, transformer), (_, pooling), *head = chain
    head = [(name, folder) for name, folder in head if name != "Dropout"]
    for name, folder in head:
        config = read_json(folder, "config.json", required=name != "Normalize")
        for key in ("module_input_name", "module_output_name"):
            if config.get(key, "sentence_embedding") != "sentence_embedding":
                raise RecipeError(f"{folder}/config.json: {key} is {config[key]!r}; expected 'sentence_embedding'")
        if name != "Normalize":
            check_weights(folder)
    general = read_json(directory, "config_sentence_transformers.json", required=False)
    options = _transformer_options(transformer, inputs)
    pooling_config = read_json(pooling, "config.json")
    return SentenceRecipe(
        transformer=transformer,
        modes=_modes(pooling, pooling_config),
        include_prompt=pooling_config.get("include_prompt", True),
        prompt=_default_prompt(directory, general),
        lower_case=bool(options.get("do_lower_case")),
        max_tokens=options.get("max_seq_length"),
        truncate_dim=general.get("truncate_dim"),
        head=tuple(head),
    )


def _module(directory: Path, module: Mapping[str, Any]) -> tuple[str, Path]:
    """Return a module's class and directory."""
    kind, folder = str(module.get("type")), str(module.get("path", ""))
    if not kind.startswith("sentence_transformers."):
        raise ModelError(
            f"{directory}/modules.json: {kind} is code from outside sentence-transformers, which is never run"
        )
    model_path(directory, f"{folder}/config.json" if folder else "config.json", "modules.json")
    return kind.rpartition(".")[2], directory / folder


def _transformer_options(directory: Path, inputs: frozenset[str]) -> dict[str, Any]:
    """Return the options of the Transformer module, if all of them are supported."""
    files = (read_json(directory, name, required=False) for name in TRANSFORMER_CONFIGS)
    options: dict[str, Any] = next(filter(None, files), {})
    keys = [f"{part}_{suffix}" for part in ("model", "tokenizer", "config") for suffix in ("args", "kwargs")]
    arguments = [options.get(key) or {} for key in (*keys, "processor_kwargs", "processing_kwargs")]
    unsupported = sorted({name for group in arguments for name in group} - HARMLESS_ARGUMENTS)
    if options.get("transformer_task", "feature-extraction") != "feature-extraction":
        unsupported.append(f"transformer_task {options['transformer_task']!r}")
    if not _reads_hidden_states(options.get("modality_config"), inputs):
        unsupported.append(f"modality_config {options['modality_config']!r}")
    if unsupported:
        raise RecipeError(f"{directory}: the Transformer module sets unsupported options: {', '.join(unsupported)}")
    return options


def _reads_hidden_states(config: Any, inputs: frozenset[str]) -> bool:
    """Return whether all kinds of input are among `inputs` and use the last hidden states of the model's forward."""
    if config is None:
        return True
    kinds = config if isinstance(config, dict) else {}
    expected = {"method": "forward", "method_output_name": "last_hidden_state"}
    forward = [isinstance(method, dict) and expected.items() <= method.items() for method in kinds.values()]
    return "text" in kinds and set(kinds) <= inputs and all(forward)


def _modes(directory: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    value = config.get("pooling_mode")
    if value is None:
        modes = tuple(mode for key, mode in LEGACY_MODES.items() if config.get(key)) or ("mean",)
    else:
        modes = (value,) if isinstance(value, str) else tuple(value)
    unknown = [mode for mode in modes if mode not in POOLINGS]
    if unknown:
        raise RecipeError(f"{directory}/config.json: unknown pooling {unknown}; expected {', '.join(POOLINGS)}")
    return modes


def _default_prompt(directory: Path, general: Mapping[str, Any]) -> str:
    name, prompts = general.get("default_prompt_name"), general.get("prompts") or {}
    if name is None:
        return ""
    if name not in prompts:
        raise ModelError(
            f"{directory}/config_sentence_transformers.json: default_prompt_name is {name!r}; "
            f"expected one of {sorted(prompts)}"
        )
    return prompts[name] or ""


def find_prompt(directory: Path, prompt: str) -> str:
    """Return the checkpoint's prompt of that name, or else `prompt` itself.

    Raises UsageError for a single word that the checkpoint does not define: a prompt ends in a space or punctuation.
    """
    stored = read_json(directory, "config_sentence_transformers.json", required=False).get("prompts") or {}
    prompts = {name: text or "" for name, text in stored.items()}
    if prompt in prompts:
        return str(prompts[prompt])
    if re.fullmatch(r"[\w.-]+", prompt):
        defined = f"the checkpoint defines {', '.join(prompts)}" if prompts else "the checkpoint defines no prompts"
        raise UsageError(
            f"`text_prompt` {prompt}: {defined}{did_you_mean(prompt, prompts)}; any other text is put before each text "
            "as it is, and ends in a space, such as 'query: '"
        )
    return prompt


def _positive(directory: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{directory}/config.json: {key} is {value!r}; expected a positive integer")
    return value


def pool(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor, modes: tuple[str, ...], skip: int = 0) -> torch.Tensor:
    """Return one vector per sequence, [B, D * len(modes)], in float32.

    `mask_BL` is 1 for tokens and 0 for padding on the right. The first `skip` tokens (the prompt's) are left out, but
    count as positions for the weights of "weightedmean".
    """
    hidden_BLD, mask_BL = hidden_BLD.float(), mask_BL.clone()
    mask_BL[:, :skip] = 0
    return torch.cat([POOLINGS[mode](hidden_BLD, mask_BL[..., None]) for mode in modes], dim=-1)


def _cls(hidden_BLD: torch.Tensor, mask_BL1: torch.Tensor) -> torch.Tensor:
    return hidden_BLD.gather(1, mask_BL1.argmax(1, keepdim=True).expand(-1, 1, hidden_BLD.shape[-1])).squeeze(1)


def _last(hidden_BLD: torch.Tensor, mask_BL1: torch.Tensor) -> torch.Tensor:
    position = hidden_BLD.shape[1] - 1 - mask_BL1.flip(1).argmax(1, keepdim=True)
    return hidden_BLD.gather(1, position.expand(-1, 1, hidden_BLD.shape[-1])).squeeze(1)


def _max(hidden_BLD: torch.Tensor, mask_BL1: torch.Tensor) -> torch.Tensor:
    return hidden_BLD.masked_fill(mask_BL1 == 0, -torch.inf).amax(1)


def _mean(hidden_BLD: torch.Tensor, weights_BL1: torch.Tensor) -> torch.Tensor:
    return (hidden_BLD * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1)


def _mean_sqrt(hidden_BLD: torch.Tensor, mask_BL1: torch.Tensor) -> torch.Tensor:
    return (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1).sqrt()


def _weighted(hidden_BLD: torch.Tensor, mask_BL1: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(1, hidden_BLD.shape[1] + 1, device=hidden_BLD.device)
    return _mean(hidden_BLD, mask_BL1 * positions[:, None])


POOLINGS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted,
    "lasttoken": _last,
}


class _Dense(nn.Module):
    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        sizes = _positive(directory, config, "in_features"), _positive(directory, config, "out_features")
        self.linear = nn.Linear(*sizes, bias=bool(config.get("bias", True)))
        path = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        name = path.rpartition(".")[2]
        if not path.startswith("torch.nn.") or name not in ACTIVATIONS:
            raise ModelError(
                f"{directory}/config.json: activation {path!r} is unsupported; expected torch.nn's {ACTIVATIONS}"
            )
        self.activation = getattr(nn, name)()
        self.use_residual = bool(config.get("use_residual"))
        if self.use_residual and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(self.linear(vectors))
        if not self.use_residual:
            return out
        return out + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class _Normalize(nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return functional.normalize(vectors, dim=-1)


def load_head(recipe: SentenceRecipe, device: torch.device) -> nn.Module:
    """Return the modules after pooling with their weights, in float32: they take little of the time."""
    return nn.Sequential(*[_load_module(name, directory) for name, directory in recipe.head]).eval().to(device)


def _load_module(name: str, directory: Path) -> nn.Module:
    if name == "Normalize":
        return _Normalize()
    config = read_json(directory, "config.json")
    dense = name == "Dense"
    module = _Dense(directory, config) if dense else nn.LayerNorm(_positive(directory, config, "dimension"))
    prefix = "" if dense else "norm."
    try:
        weights = load_file(directory / "model.safetensors")
        module.load_state_dict({key.removeprefix(prefix): value.float() for key, value in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{directory}: its weights do not fit its config.json: {error}") from error
    return module
