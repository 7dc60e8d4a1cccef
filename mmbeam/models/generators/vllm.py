"""vLLM (Kwon et al., 2023, arXiv:2309.06180) as the engine of decoder-only models that answer a prompt.

vLLM receives a whole window and batches it continuously. Prompts are mmbeam's own, with one placeholder per image and
audio window, which vLLM replaces by the model's tokens; the checkpoint's processor prepares the media. Written against
the offline interface of vLLM 0.33 (`LLM`, `enqueue`, `wait_for_completion`). vLLM pins its own torch, and is imported
when a model is loaded.

Log-probabilities come from the model's own distribution, as with the engine transformers. In low precision, another
batch size may change a text where two tokens are nearly tied, unless VLLM_BATCH_INVARIANT=1. Each sample has its own
random stream, a different one than with the engine transformers. Beam search, `score` and models that read no prompt
(Whisper, T5, BLIP) are not supported.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmbeam.errors import DeviceError, JobError, LimitError, ModelError, UsageError
from mmbeam.models.generators.base import Generator
from mmbeam.models.generators.pretrained import ChatGenerator, trim_answers
from mmbeam.models.generators.prompts import Medium
from mmbeam.models.loading import read_json
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Request

INSTALL = "pip install 'vllm>=0.33' on a machine with a GPU (it chooses torch's and transformers' versions)"
MEMORY = 0.9  # of the free GPU memory, for weights, cache and activations
MAX_WINDOWS = 16  # of audio in one prompt: vLLM reserves memory for as many
MAX_TEMPERATURE = 2.0  # vLLM's own limit
SEEDS = 1 << 63  # vLLM takes signed 64 bits, and -1 for no seed
# By default, vLLM logs to stdout, reports usage and starts a process. In this process, it runs on the thread that owns
# the device, and its errors are raised unchanged.
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def check(family: type[Generator], spec: GeneratorSpec, decoding: Decoding, device: str, explain: bool) -> None:
    """Raise UsageError for what vLLM does not support, whether or not it is installed."""
    media = set(spec.modalities) - {"text"}
    if not issubclass(family, ChatGenerator) or not media <= {placeholder.kind for placeholder in family.placeholders}:
        raise UsageError(
            f"`engine` vllm: expected a text-only decoder, or a chat model of the families gemma3, gemma4, idefics3, "
            f"qwen2_5_omni, qwen2_audio, qwen*_vl or smolvlm; found {spec.family}"
        )
    if torch.device(device).type != "cuda":
        raise UsageError(f"`engine` vllm: expected `device` cuda, found {device}")
    if decoding.num_beams > 1 or (decoding.temperature or 0) > MAX_TEMPERATURE:
        raise UsageError(f"`engine` vllm: expected `num_beams` 1 and a `temperature` of at most {MAX_TEMPERATURE}")
    if explain:
        raise UsageError("`engine` vllm: `explain` needs `engine` transformers")


def check_installed() -> None:
    """Raise JobError unless vLLM is installed on this machine."""
    if importlib.util.find_spec("vllm") is None:
        raise JobError(f"`engine` vllm: vLLM is not installed here: {INSTALL}")


def check_processes(gpus: int, workers: int) -> None:
    """Raise UsageError for processes that would use several GPUs: vLLM uses one per process."""
    if gpus > workers:
        raise UsageError(
            f"`engine` vllm: expected one GPU per process, found {gpus} GPUs for {workers} processes; "
            f"set `workers` to {gpus}, or `device` to cuda:0"
        )


class VllmGenerator(ChatGenerator):
    """A model that vLLM runs. `engine` is its LLM, `sampling_params` its class of that name."""

    has_scheduler = True

    def __init__(
        self,
        spec: GeneratorSpec,
        family: type[ChatGenerator],
        device: torch.device,
        dtype: torch.dtype,
        engine: Any,
        sampling_params: Callable[..., Any],
    ) -> None:
        Generator.__init__(self, spec, device, dtype)  # without a model of transformers
        directory = Path(spec.directory)
        self.family = family
        self.tokenizer = family.read_tokenizer(directory)
        self.window = family.audio_window(directory) if "audio" in spec.modalities else None
        self.engine = engine
        self._sampling_params = sampling_params
        self._penalty = repetition_penalty(directory)

    def media(self, request: Request) -> list[Medium]:
        """Return one medium per image and audio window, with its placeholder instead of the model's tokens."""
        counts = {"image": int(request.image is not None), "audio": self._window_count(request)}
        return [Medium(kind, token) for kind, token, _ in self.family.placeholders for _ in range(counts[kind])]

    def _window_count(self, request: Request) -> int:
        return 0 if self.window is None else len(self.window.lengths(request))

    def prepare(self, requests: Sequence[Request]) -> Any:
        """Return vLLM's form of the prompts."""
        return [self.vllm_prompt(request) for request in requests]

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return one text per request. Raises vLLM's errors for invalid prompts, DeviceError for errors of a run."""
        prompts = self.prepared(requests)
        params = [self._sampling_params(**sampling(decoding, request.seed, self._penalty)) for request in requests]
        self.engine.enqueue(prompts, params, use_tqdm=False)
        try:
            outputs = self.engine.wait_for_completion(use_tqdm=False)
        except Exception as error:  # the engine's queue would be mixed with the next window
            raise DeviceError(f"vLLM failed while generating: {type(error).__name__}: {error}") from error
        return trim_answers(self.tokenizer, requests, [self.read(output, decoding) for output in outputs])

    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """Raise ModelError: not supported."""
        raise ModelError("`engine` vllm: score is not supported")

    def vllm_prompt(self, request: Request) -> dict[str, Any]:
        """Return vLLM's form of a prompt: token ids, and the image and the audio at the model's sampling rate."""
        windows = self._window_count(request)
        if windows > MAX_WINDOWS:
            raise LimitError(f"audio of {windows} windows; expected at most {MAX_WINDOWS} with `engine` vllm")
        prompt: dict[str, Any] = {"prompt_token_ids": self.prompts([request])[0]}
        data: dict[str, Any] = {}
        if request.image is not None and "image" in self.spec.modalities:
            data["image"] = Image.fromarray(request.image)
        if self.window is not None and request.audio is not None:
            data["audio"] = [window.numpy() for window in self.window.cut([request], torch.device("cpu"))]
        return prompt | {"multi_modal_data": data} if data else prompt

    def read(self, output: Any, decoding: Decoding) -> Generated:
        """Return the text of a vLLM RequestOutput. Raises LimitError if the context ended it."""
        [completion] = output.outputs
        ids = tuple(completion.token_ids)
        if completion.finish_reason == "length" and len(ids) < decoding.limit:
            raise LimitError(
                f"a prompt of {len(output.prompt_token_ids):,} tokens leaves room for {len(ids)} of "
                f"{decoding.limit} new ones"
            )
        return Generated(
            text=self.tokenizer.decode(ids),
            token_ids=ids,
            num_tokens=len(ids) - (completion.finish_reason == "stop"),  # no stop strings: an end-of-text token
            logprob=float(completion.cumulative_logprob),
        )


def sampling(decoding: Decoding, seed: int, penalty: float) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams for one sample."""
    return {
        "max_tokens": decoding.limit,
        "temperature": decoding.temperature or 0.0,  # 0: greedy decoding
        "top_p": decoding.top_p,
        "seed": seed % SEEDS if decoding.is_sampled else None,
        "repetition_penalty": penalty,
        "logprobs": 0,  # only of the chosen token
        "detokenize": False,
    }


def repetition_penalty(directory: Path) -> float:
    """Read the checkpoint's repetition penalty; vLLM ignores the other restrictions of its generation_config."""
    return float(read_json(directory, "generation_config.json", required=False).get("repetition_penalty") or 1.0)


def engine_options(spec: GeneratorSpec, device: torch.device, dtype: torch.dtype, memory: float) -> dict[str, Any]:
    """Return the arguments of vLLM's LLM; `memory` is the fraction of the GPU's total memory that vLLM may use."""
    options: dict[str, Any] = {
        "model": spec.directory,
        "load_format": "safetensors",  # data is never code
        "dtype": str(dtype).removeprefix("torch."),
        "device_ids": [device.index or 0],  # among the GPUs visible to this process
        "gpu_memory_utilization": memory,
        "max_model_len": -1,  # the model's context, or as much of it as fits into the memory
    }
    if spec.modalities != ("text",):
        limits = {"image": 1, "audio": MAX_WINDOWS}
        present = {kind: limit if kind in spec.modalities else 0 for kind, limit in limits.items()}
        options["limit_mm_per_prompt"] = {**present, "video": 0}
        options["mm_processor_cache_gb"] = 0  # no medium is repeated
    return options


def load(family: type[Generator], spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> VllmGenerator:
    """Start vLLM on the GPU. Raises JobError if it is not installed, DeviceError if there is no GPU."""
    assert issubclass(family, ChatGenerator), "see check"
    check_installed()
    if not torch.cuda.is_available():
        raise DeviceError(f"`engine` vllm: torch {torch.__version__} finds no GPU here; check nvidia-smi")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise JobError(f"`engine` vllm: vLLM cannot be imported ({error}): {INSTALL}") from error
    free, total = torch.cuda.mem_get_info(device)
    engine = vllm.LLM(**engine_options(spec, device, dtype, round(MEMORY * free / total, 3)))
    return VllmGenerator(spec, family, device, dtype, engine, vllm.SamplingParams)
