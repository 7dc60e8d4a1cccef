"""The sentence-transformers layout: which modules turn a transformer's hidden states into one vector.

`read_sentence_recipe` reads modules.json and the configuration of each module, of any version from 2 to 6;
`load_head` builds what comes after the transformer. A module, option or activation that is not known
here is a ModelError that names it: it is never imported from the path that the file gives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from mmbeam.errors import ModelError
from mmbeam.models.loading import check_weights, read_json

# Pooling modes in the order in which older files, one flag each, concatenate them.
LEGACY_MODES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = (
    "Identity",
    "Tanh",
    "ReLU",
    "ReLU6",
    "GELU",
    "SiLU",
    "Mish",
    "ELU",
    "SELU",
    "LeakyReLU",
    "Sigmoid",
    "Softplus",
)
HEAD_MODULES = ("Dense", "LayerNorm", "Normalize", "Dropout")
# Old names of sentence_bert_config.json, for directories written before version 3.
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Options handed to from_pretrained that change no vector.
HARMLESS_OPTIONS = {
    "add_pooling_layer",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "padding_side",
    "trust_remote_code",
}


@dataclass(frozen=True, kw_only=True)
class SentenceRecipe:
    """What comes before and after the transformer. The defaults are those of a directory without modules.json."""

    transformer: Path  # its directory
    modes: tuple[str, ...] = ("mean",)  # how tokens are pooled; several are concatenated
    include_prompt: bool = True  # whether the prompt's tokens are pooled too
    prompt: str = ""  # put before every text
    lower_case: bool = False
    max_tokens: int | None = None
    truncate_dim: int | None = None  # only so many of the vector's first values
    head: tuple[tuple[str, Path], ...] = field(default=())  # (class, directory) after pooling

    def width(self, hidden_size: int) -> int:
        """Values in a text's vector, for a transformer of `hidden_size`."""
        width = hidden_size * len(self.modes)
        for name, directory in self.head:
            if name == "Dense":
                width = _count(directory, read_json(directory, "config.json"), "out_features")
        return min(width, self.truncate_dim or width)


def read_sentence_recipe(
    directory: Path, modules: list[Any], inputs: frozenset[str] = frozenset(("text",))
) -> SentenceRecipe:
    """The recipe of a directory whose modules.json holds `modules`; `inputs` are the kinds that its model may take."""
    named = [_module(directory, module) for module in modules]
    names = [name for name, _ in named]
    head = tuple((name, path) for name, path in named[2:] if name != "Dropout")
    if names[:2] != ["Transformer", "Pooling"] or any(name not in HEAD_MODULES for name in names[2:]):
        raise ModelError(
            f"{directory}/modules.json: expected Transformer, Pooling and then any of {', '.join(HEAD_MODULES)}; "
            f"found {', '.join(names)}"
        )
    for name, path in head:
        _check_module(name, path)
    general = read_json(directory, "config_sentence_transformers.json", required=False)
    transformer = _transformer_options(named[0][1], inputs)
    pooling = read_json(named[1][1], "config.json")
    return SentenceRecipe(
        transformer=named[0][1],
        modes=_modes(named[1][1], pooling),
        include_prompt=pooling.get("include_prompt", True),
        prompt=_default_prompt(directory, general),
        lower_case=bool(transformer.get("do_lower_case")),
        max_tokens=transformer.get("max_seq_length"),
        truncate_dim=general.get("truncate_dim"),
        head=head,
    )


def _module(directory: Path, module: Mapping[str, Any]) -> tuple[str, Path]:
    kind, path = str(module.get("type")), directory / str(module.get("path", ""))
    if not kind.startswith("sentence_transformers."):
        raise ModelError(
            f"{directory}/modules.json: {kind} is code from outside sentence-transformers, which is not run"
        )
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ModelError(
            f"{directory}/modules.json: the path {module.get('path')!r} leads out of the model's directory"
        )
    return kind.rpartition(".")[2], path


def _transformer_options(directory: Path, inputs: frozenset[str]) -> dict[str, Any]:
    options = next((found for name in TRANSFORMER_CONFIGS if (found := read_json(directory, name, required=False))), {})
    extra = [
        options.get(f"{what}_{end}") or {} for what in ("model", "tokenizer", "config") for end in ("args", "kwargs")
    ]
    extra += [options.get("processor_kwargs") or {}, options.get("processing_kwargs") or {}]
    unknown = sorted({key for given in extra for key in given} - HARMLESS_OPTIONS)
    if options.get("transformer_task", "feature-extraction") != "feature-extraction":
        unknown.append(f"transformer_task {options['transformer_task']!r}")
    if not _reads_hidden_states(options.get("modality_config"), inputs):
        unknown.append(f"modality_config {options['modality_config']!r}")
    if unknown:
        raise ModelError(f"{directory}: the Transformer module sets what is not supported: {', '.join(unknown)}")
    return options


def _reads_hidden_states(config: Any, inputs: frozenset[str]) -> bool:
    """Whether every kind of input, all among `inputs`, goes through the model's forward to its last hidden states."""
    if config is None:
        return True
    kinds = config if isinstance(config, dict) else {}
    expected = {"method": "forward", "method_output_name": "last_hidden_state"}
    forward = [isinstance(how, dict) and expected.items() <= how.items() for how in kinds.values()]
    return "text" in kinds and set(kinds) <= inputs and all(forward)


def _modes(directory: Path, pooling: Mapping[str, Any]) -> tuple[str, ...]:
    given = pooling.get("pooling_mode")
    if given is None:
        modes = tuple(mode for key, mode in LEGACY_MODES.items() if pooling.get(key)) or ("mean",)
    else:
        modes = (given,) if isinstance(given, str) else tuple(given)
    unknown = [mode for mode in modes if mode not in LEGACY_MODES.values()]
    if unknown:
        raise ModelError(f"{directory}/config.json: unknown pooling {unknown}; expected {', '.join(POOLINGS)}")
    return modes


def _default_prompt(directory: Path, general: Mapping[str, Any]) -> str:
    name, prompts = general.get("default_prompt_name"), general.get("prompts") or {}
    if name is None:
        return ""
    if name not in prompts:
        raise ModelError(
            f"{directory}/config_sentence_transformers.json: default_prompt_name {name!r} is none of {sorted(prompts)}"
        )
    return prompts[name] or ""


def _check_module(name: str, directory: Path) -> None:
    config = read_json(directory, "config.json", required=name != "Normalize")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key, "sentence_embedding") != "sentence_embedding":
            raise ModelError(f"{directory}/config.json: {key} is {config[key]!r}; expected 'sentence_embedding'")
    if name != "Normalize":
        check_weights(directory)


def _count(directory: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{directory}/config.json: {key} is {value!r}; expected a whole number from 1 on")
    return value


def pool(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor, modes: tuple[str, ...], skip: int = 0) -> torch.Tensor:
    """One vector of each sequence, [B, D * len(modes)], in float32.

    `mask_BL` is 1 where there is a token, padding on the right; the first `skip` tokens (the prompt's)
    are left out, and keep their part in the weights of "weightedmean".
    """
    hidden_BLD, mask_BL = hidden_BLD.float(), mask_BL.clone()
    mask_BL[:, :skip] = 0
    return torch.cat([POOLINGS[mode](hidden_BLD, mask_BL[..., None]) for mode in modes], dim=-1)


def _cls(hidden_BLD: torch.Tensor, mask_BL1: torch.Tensor) -> torch.Tensor:
    return hidden_BLD.gather(1, mask_BL1.argmax(1, keepdim=True).expand(-1, 1, hidden_BLD.shape[-1])).squeeze(1)


def _last(hidden_BLD: torch.Tensor, mask_BL1: torch.Tensor) -> torch.Tensor:
    at = hidden_BLD.shape[1] - 1 - mask_BL1.flip(1).argmax(1, keepdim=True)
    return hidden_BLD.gather(1, at.expand(-1, 1, hidden_BLD.shape[-1])).squeeze(1)


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
        sizes = _count(directory, config, "in_features"), _count(directory, config, "out_features")
        self.linear = nn.Linear(*sizes, bias=bool(config.get("bias", True)))
        self.activation = _activation(directory, config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        self.use_residual = bool(config.get("use_residual"))
        if self.use_residual and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(self.linear(vectors))
        if not self.use_residual:
            return out
        return out + (self.residual(vectors) if hasattr(self, "residual") else vectors)


def _activation(directory: Path, path: str) -> nn.Module:
    name = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or name not in ACTIVATIONS:
        raise ModelError(
            f"{directory}/config.json: activation {path!r} is not supported; expected torch.nn's {ACTIVATIONS}"
        )
    activation: nn.Module = getattr(nn, name)()
    return activation


class _LayerNorm(nn.Module):
    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_count(directory, config, "dimension"))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(vectors)
        return out


class _Normalize(nn.Module):
    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return functional.normalize(vectors, dim=-1)


def load_head(recipe: SentenceRecipe, device: torch.device) -> nn.Module:
    """The modules after pooling, with their weights, in float32: they are small, and so is their share of the time."""
    return nn.Sequential(*[_load_module(name, directory) for name, directory in recipe.head]).eval().to(device)


def _load_module(name: str, directory: Path) -> nn.Module:
    if name == "Normalize":
        return _Normalize()
    module = (_Dense if name == "Dense" else _LayerNorm)(directory, read_json(directory, "config.json"))
    try:
        module.load_state_dict(
            {key: value.float() for key, value in load_file(directory / "model.safetensors").items()}
        )
    except RuntimeError as error:
        raise ModelError(f"{directory}: its weights do not fit its config.json: {error}") from error
    return module
