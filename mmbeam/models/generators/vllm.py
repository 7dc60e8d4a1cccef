"""vLLM (Kwon et al., 2023, arXiv:2309.06180) as the engine of models that answer a prompt: `--engine vllm`.

It takes a whole window at once and batches by itself: a text that ends makes room for the next one. Prompts are
mmbeam's own, with one placeholder for each picture and sound, in whose place vLLM puts the model's tokens; pictures
and sounds are prepared by the checkpoint's processor. Written against the offline interface of vLLM 0.33 (`LLM`,
`enqueue`, `wait_for_completion`), which brings a torch of its own and is imported when a model is loaded.

Log-probabilities are of the model itself, as elsewhere. What a text depends on beside its sample is vLLM's affair:
in low precision a batch of another size may tip a near-tie (VLLM_BATCH_INVARIANT=1 keeps it from that). A sample's
random stream is its own, but another one than with `--engine transformers`. Beams, `score`, and what is written
without a prompt (Whisper, T5, BLIP) are not here.
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
from mmbeam.models.generators import gemma3, gemma4, qwen2_audio, qwen_omni, qwen_vl, smolvlm
from mmbeam.models.generators.base import Generator
from mmbeam.models.generators.causal import CausalGenerator, answers
from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.prompts import Medium, PromptTokenizer
from mmbeam.models.generators.sounds import MIN_FRAMES, MelReader, lengths_of, windows_of
from mmbeam.models.loading import read_json
from mmbeam.models.recipes import read_gemma_recipe
from mmbeam.ops.log_mel import GEMMA_SECONDS
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Request

INSTALL = "pip install 'vllm>=0.33' on a machine with a GPU (it chooses torch's and transformers' versions)"
MEMORY = 0.9  # of the GPU memory that is free: weights, cache and what the model computes with
MAX_SOUNDS = 16  # windows of sound in one prompt: for so many vLLM sets memory aside
MAX_TEMPERATURE = 2.0  # above it vLLM refuses
SEEDS = 1 << 63  # it takes signed 64 bits, and -1 for none
# It writes its log to stdout and counts its users, unless told otherwise. In one process with us it runs on the
# thread that owns the device, and its errors are seen as they are.
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def _one(kind: str, placeholder: str, bare: str = "") -> Medium:
    """A medium of which the prompt holds the placeholder alone."""
    return Medium(kind, placeholder, placeholder, bare)


_QWEN_VL = (_one("image", qwen_vl.IMAGE, f"<|vision_start|>{qwen_vl.IMAGE}<|vision_end|>"),)
_OMNI = (
    _one("image", qwen_omni.IMAGE, f"<|vision_bos|>{qwen_omni.IMAGE}<|vision_eos|>"),
    _one("audio", qwen_omni.AUDIO, f"<|audio_bos|>{qwen_omni.AUDIO}<|audio_eos|>"),
)
_SMOLVLM = (_one("image", smolvlm.IMAGE),)
# What stands for a picture and for a sound in the prompts of each model_type; models of text alone need no line.
MEDIA: Mapping[str, tuple[Medium, ...]] = {
    "gemma3": (_one("image", gemma3.BEGIN),),
    "gemma4": (_one("image", gemma4.IMAGE), _one("audio", gemma4.AUDIO)),
    "idefics3": _SMOLVLM,
    "qwen2_5_omni": _OMNI,
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_audio": (_one("audio", qwen2_audio.AUDIO, f"<|audio_bos|>{qwen2_audio.AUDIO}<|audio_eos|>"),),
    "qwen2_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "qwen3_vl_moe": _QWEN_VL,
    "smolvlm": _SMOLVLM,
}


def check(family: type[Generator], spec: GeneratorSpec, decoding: Decoding, device: str, explain: bool) -> None:
    """Raise UsageError for what vLLM cannot do with a model, before it is looked for on any machine."""
    if spec.family not in MEDIA and not issubclass(family, CausalGenerator):
        known = ", ".join(MEDIA)
        raise UsageError(f"--engine vllm: expected a decoder of text alone or one of {known}; found {spec.family}")
    if torch.device(device).type != "cuda":
        raise UsageError(f"--engine vllm: it computes on a GPU: expected --device cuda, found {device}")
    if decoding.num_beams > 1 or (decoding.temperature or 0) > MAX_TEMPERATURE:
        raise UsageError(f"--engine vllm: expected no beams and a --temperature of {MAX_TEMPERATURE} at most")
    if explain:
        raise UsageError("--engine vllm: --explain is for the engine of transformers alone")


def check_installed() -> None:
    """Raise JobError unless vLLM is on this machine."""
    if importlib.util.find_spec("vllm") is None:
        raise JobError(f"--engine vllm: vLLM is not installed here: {INSTALL}")


def check_processes(gpus: int, workers: int) -> None:
    """Raise UsageError for processes that would use several GPUs: vLLM uses one in each."""
    if gpus > workers:
        raise UsageError(
            f"--engine vllm: it uses one GPU in each process, and there are {gpus} for {workers} of them: "
            f"--workers {gpus}, or --device cuda:0"
        )


class VllmGenerator(ChatGenerator):
    """A model that vLLM runs. `engine` is its LLM, `sampling_params` its class of that name."""

    schedules = True

    def __init__(
        self,
        spec: GeneratorSpec,
        held_back: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        engine: Any,
        sampling_params: Callable[..., Any],
    ) -> None:
        Generator.__init__(self, spec, device, dtype)  # there is no model of transformers
        directory = Path(spec.directory)
        self.tokenizer = PromptTokenizer(directory, held_back)
        self.engine = engine
        self.window = sound_window(spec)
        self._sampling_params = sampling_params
        self._penalty = repetition_penalty(directory)

    def media(self, request: Request) -> list[Medium]:
        held = {"image": int(request.image is not None), "audio": self._sounds(request)}
        return [medium for medium in MEDIA.get(self.spec.family, ()) for _ in range(held[medium.kind])]

    def _sounds(self, request: Request) -> int:
        return 0 if self.window is None else len(lengths_of(request, *self.window))

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Raises what vLLM says of a prompt that it cannot take, DeviceError for what happens once it runs."""
        prompts = [self.vllm_prompt(request) for request in requests]
        chosen = [self._sampling_params(**sampling(decoding, request.seed, self._penalty)) for request in requests]
        self.engine.enqueue(prompts, chosen, use_tqdm=False)
        try:
            outputs = self.engine.wait_for_completion(use_tqdm=False)
        except Exception as error:  # what it still holds would come out with the next window
            raise DeviceError(f"vLLM failed while it ran: {type(error).__name__}: {error}") from error
        made = [self.read(output, decoding) for output in outputs]
        return answers(self.tokenizer, requests, made)

    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        raise ModelError("with --engine vllm no text is scored")

    def vllm_prompt(self, request: Request) -> dict[str, Any]:
        """The prompt in vLLM's form: token ids, and a picture and sounds at the model's rate beside them."""
        if self._sounds(request) > MAX_SOUNDS:
            raise LimitError(f"a sound of {self._sounds(request)} windows; with --engine vllm at most {MAX_SOUNDS}")
        prompt: dict[str, Any] = {"prompt_token_ids": self.prompt(request)}
        data: dict[str, Any] = {}
        if request.image is not None and "image" in self.spec.modalities:
            data["image"] = Image.fromarray(request.image)
        if self.window is not None and request.audio is not None:
            data["audio"] = [piece.numpy() for piece in windows_of([request], *self.window, torch.device("cpu"))]
        return prompt | {"multi_modal_data": data} if data else prompt

    def read(self, output: Any, decoding: Decoding) -> Generated:
        """One text, out of vLLM's RequestOutput. Raises LimitError for one that its context cut short."""
        [made] = output.outputs
        ids = tuple(made.token_ids)
        if made.finish_reason == "length" and len(ids) < decoding.limit:
            raise LimitError(
                f"a prompt of {len(output.prompt_token_ids):,} tokens leaves room for {len(ids)} of "
                f"{decoding.limit} new ones"
            )
        return Generated(
            text=self.tokenizer.decode(ids),
            token_ids=ids,
            num_tokens=len(ids) - (made.finish_reason == "stop"),  # it stops at an end-of-text token alone
            logprob=float(made.cumulative_logprob),
        )


def sampling(decoding: Decoding, seed: int, penalty: float) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams for one sample."""
    return {
        "max_tokens": decoding.limit,
        "temperature": decoding.temperature or 0.0,  # 0: the most likely token
        "top_p": decoding.top_p,
        "seed": seed % SEEDS if decoding.is_sampled else None,
        "repetition_penalty": penalty,
        "logprobs": 0,  # that of the chosen token alone
        "detokenize": False,
    }


def repetition_penalty(directory: Path) -> float:
    """What the checkpoint asks of every text; what else its generation_config may forbid, vLLM does not know."""
    return float(read_json(directory, "generation_config.json", required=False).get("repetition_penalty") or 1.0)


def sound_window(spec: GeneratorSpec) -> tuple[int, int, int] | None:
    """Rate in Hz, and samples of a window of sound, at most and at least; None for a model that does not hear."""
    if "audio" not in spec.modalities:
        return None
    directory = Path(spec.directory)
    if spec.family == "gemma4":
        gemma = read_gemma_recipe(directory)
        return gemma.sampling_rate, GEMMA_SECONDS * gemma.sampling_rate, gemma.frame_length // 2 + 1
    mel = MelReader(directory).recipe
    return mel.sampling_rate, mel.n_samples, MIN_FRAMES * mel.hop_length


def engine_options(spec: GeneratorSpec, device: torch.device, dtype: torch.dtype, memory: float) -> dict[str, Any]:
    """The arguments of vLLM's LLM; `memory` is the share of the whole GPU that it may take."""
    limits = {"image": 1, "audio": MAX_SOUNDS}
    options: dict[str, Any] = {
        "model": spec.directory,
        "load_format": "safetensors",  # data is never code
        "dtype": str(dtype).removeprefix("torch."),
        "device_ids": [device.index or 0],  # of those that the process sees; one for each process
        "gpu_memory_utilization": memory,
        "max_model_len": -1,  # the model's own context, or what of it fits into the memory
    }
    if spec.family in MEDIA:
        held = {kind: limit if kind in spec.modalities else 0 for kind, limit in limits.items()}
        options |= {"limit_mm_per_prompt": {**held, "video": 0}, "mm_processor_cache_gb": 0}  # none comes twice
    return options


def load(family: type[Generator], spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> VllmGenerator:
    """Start vLLM on the GPU. Raises JobError if it is not installed, DeviceError if there is no GPU."""
    check_installed()
    if not torch.cuda.is_available():
        raise DeviceError(f"--engine vllm: torch {torch.__version__} sees no GPU here; check nvidia-smi")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise JobError(f"--engine vllm: vLLM cannot be imported ({error}): {INSTALL}") from error
    free, total = torch.cuda.mem_get_info(device)
    engine = vllm.LLM(**engine_options(spec, device, dtype, round(MEMORY * free / total, 3)))
    held_back = getattr(family, "held_back", ())
    return VllmGenerator(spec, held_back, device, dtype, engine, vllm.SamplingParams)
