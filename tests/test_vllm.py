"""The engine vLLM: its inputs and outputs, and, if it is installed, the engine itself.

Without vLLM, the tests expand placeholders as vLLM does, and an engine with the same interface runs a tiny model.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shards
import tiny_audio_models
import tiny_chat_models
import tiny_generators_hub as hub
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import pictures
from shards import natural_sound
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mmbeam.errors import DeviceError, JobError, LimitError, ModelError, UsageError
from mmbeam.jobs.caption import CaptionOptions, prepare
from mmbeam.models.generators import check_engine, describe, family_of, vllm
from mmbeam.models.generators.decoding import score
from mmbeam.models.generators.vllm import VllmGenerator
from mmbeam.prompts.ask import Decoding, GeneratorSpec, Request
from mmbeam.stages.generate import GenerateStage, generate_stage
from mmbeam.types import Batch, Sample, WorkUnit

CPU = torch.device("cpu")
GREEDY = Decoding(max_new_tokens=8)
MODELS = {
    **tiny_chat_models.IMAGE_MODELS,
    **{name: save for name, save in tiny_audio_models.AUDIO_MODELS.items() if name != "voxtral"},
    "qwen2": hub.save_qwen2,
}
IMAGES = [image.copy() for image in pictures(((48, 48), (97, 120)))]
SOUNDS = [(natural_sound(1, seconds, 16000), 16000) for seconds in (0.7, 4.3)]  # windows are of 2 s
TEXTS = ["a dog", "the quick brown fox", "x", "two cats in a garden, and a dog"]


@dataclass
class SamplingParams:
    """The parameters of vLLM's class that mmbeam sets; any other name is a TypeError."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    repetition_penalty: float
    logprobs: int
    detokenize: bool


@dataclass
class CompletionOutput:
    token_ids: Sequence[int]
    cumulative_logprob: float
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Engine:
    """The used part of vLLM's `LLM`, with a model of transformers: single prompts, greedy decoding."""

    def __init__(self, directory: Path, rejected: Sequence[int] = (), is_broken: bool = False) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.rejected = rejected  # lengths of prompts
        self.is_broken = is_broken
        self.windows: list[int] = []
        self._queue: list[tuple[list[int], SamplingParams]] = []

    def enqueue(self, prompts: Sequence[dict[str, Any]], params: Sequence[SamplingParams], *, use_tqdm: bool) -> None:
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if any(len(prompt) in self.rejected for prompt in ids):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        self.windows.append(len(ids))
        self._queue += zip(ids, params, strict=True)

    def wait_for_completion(self, *, use_tqdm: bool) -> list[RequestOutput]:
        if self.is_broken:
            raise RuntimeError("the engine core died")
        queue, self._queue = self._queue, []
        return [self._run(ids, params) for ids, params in queue]

    @torch.inference_mode()
    def _run(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        out = self.model.generate(**inputs, max_new_tokens=params.max_tokens, do_sample=False)[0, len(ids) :].tolist()
        [logprob] = score(self.model, inputs, [out])
        ended = out[-1] == self.model.generation_config.eos_token_id
        return RequestOutput(ids, [CompletionOutput(out, logprob, "stop" if ended else "length")])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, build in MODELS.items()}


def vllm_generator(directory: Path, engine: Any = None) -> VllmGenerator:
    spec = describe(directory)
    family: Any = family_of(spec.family)
    return VllmGenerator(spec, family, CPU, torch.float32, engine, SamplingParams)


def requests_for(spec: GeneratorSpec) -> list[Request]:
    requests = [Request(text=text) for text in TEXTS]
    if "image" in spec.modalities:
        requests += [Request(image=image, text=text) for image, text in zip(IMAGES, TEXTS, strict=False)]
    if "audio" in spec.modalities:
        requests += [Request(audio=sound, text="a") for sound in SOUNDS] + [Request(audio=SOUNDS[0])]
    return requests


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_with_expanded_placeholders_equals_the_familys(saved: dict[str, Path], name: str) -> None:
    """Each placeholder, in order, becomes the tokens of its image or audio, as in vLLM.

    Gemma 3 has one token for adjacent line feeds, hence the comparison of texts.
    """
    family: Any = hub.load_tiny(saved[name])
    model = vllm_generator(saved[name])
    spell = model.tokenizer._tokenizer.decode
    for request in requests_for(model.spec):
        media = list(family.media(request))
        placeholders = model.tokenizer.ids_of([medium.tokens for medium in model.media(request)])
        prompt = model.vllm_prompt(request)["prompt_token_ids"]
        expanded = [media.pop(0).tokens if token in placeholders else spell([token]) for token in prompt]
        assert not media
        assert "".join(expanded) == spell(family.inputs([request])["input_ids"][0])


@pytest.mark.parametrize("name", MODELS)
def test_media_are_passed_beside_the_prompt(saved: dict[str, Path], name: str) -> None:
    model = vllm_generator(saved[name])
    for request in requests_for(model.spec):
        data = model.vllm_prompt(request).get("multi_modal_data", {})
        assert set(data) == {kind for kind in ("image", "audio") if getattr(request, kind) is not None}
        if "image" in data:
            np.testing.assert_array_equal(np.asarray(data["image"]), request.image)
        if "audio" in data:
            assert len(data["audio"]) == sum(medium.kind == "audio" for medium in model.media(request))
            assert sum(map(len, data["audio"])) >= len(request.audio[0])  # type: ignore[index]
    assert "multi_modal_data" not in model.vllm_prompt(Request(text="a"))


def test_audio_of_too_many_windows_raises(saved: dict[str, Path]) -> None:
    long = (np.zeros(2 * 16000 * vllm.MAX_WINDOWS + 1, np.float32), 16000)
    with pytest.raises(LimitError, match="17 windows"):
        vllm_generator(saved["qwen2_audio"]).vllm_prompt(Request(audio=long))


def test_sampling_parameters() -> None:
    greedy = vllm.sampling(GREEDY, 5, 1.0)
    assert greedy == vars(SamplingParams(8, 0.0, 1.0, None, 1.0, 0, detokenize=False))
    sampled = vllm.sampling(Decoding(temperature=0.7, top_p=0.9), 5, 1.3)
    assert sampled == vars(SamplingParams(64, 0.7, 0.9, 5, 1.3, 0, detokenize=False))


@given(st.integers(0, 2**64 - 1))
def test_seeds_are_in_vllms_range(seed: int) -> None:
    """Signed 64 bits; -1 means no seed."""
    assert 0 <= vllm.sampling(Decoding(temperature=1.0), seed, 1.0)["seed"] < 2**63


def test_the_repetition_penalty_of_the_checkpoint(tmp_path: Path) -> None:
    assert vllm.repetition_penalty(tmp_path) == 1.0
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05, "temperature": 0.1}')
    assert vllm.repetition_penalty(tmp_path) == 1.05


def test_outputs_become_texts(saved: dict[str, Path]) -> None:
    model = vllm_generator(saved["qwen2"])
    ids = model.tokenizer.encode_words("a dog")
    end = model.tokenizer._tokenizer.eos_token_id
    ended = model.read(RequestOutput([1], [CompletionOutput([*ids, end], -2.5, "stop")]), GREEDY)
    assert (ended.text, ended.token_ids, ended.num_tokens, ended.logprob) == ("a dog", (*ids, end), len(ids), -2.5)
    cut = model.read(RequestOutput([1], [CompletionOutput(ids, -2.5, "length")]), Decoding(max_new_tokens=len(ids)))
    assert (cut.text, cut.num_tokens) == ("a dog", len(ids))
    with pytest.raises(LimitError, match="a prompt of 1 tokens leaves room for 5 of 8 new ones"):
        model.read(RequestOutput([1], [CompletionOutput(ids, -2.5, "length")]), GREEDY)


def test_engine_options(saved: dict[str, Path]) -> None:
    text = vllm.engine_options(describe(saved["qwen2"]), torch.device("cuda:1"), torch.bfloat16, 0.8)
    assert text == {
        "model": str(saved["qwen2"]),
        "load_format": "safetensors",
        "dtype": "bfloat16",
        "device_ids": [1],
        "gpu_memory_utilization": 0.8,
        "max_model_len": -1,
    }
    images = vllm.engine_options(describe(saved["qwen3_vl"]), torch.device("cuda"), torch.float16, 0.8)
    assert images["device_ids"] == [0]
    assert images["limit_mm_per_prompt"] == {"image": 1, "audio": 0, "video": 0}


# In the stage


def samples_of(texts: Sequence[str]) -> Batch:
    samples = [
        Sample(key=str(number), shard="s", offset=number, present=frozenset({"text"}), text=text)
        for number, text in enumerate(texts)
    ]
    return Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=tuple(samples))


def stage_of(directory: Path) -> GenerateStage:
    return generate_stage(str(directory), decoding=GREEDY, task="caption", batch_size=2)


def test_a_window_is_enqueued_whole_and_yields_the_same_texts(saved: dict[str, Path]) -> None:
    stage, engine = stage_of(saved["qwen2"]), Engine(saved["qwen2"])
    batch = samples_of(TEXTS)
    expected = stage.run(stage.load(), batch)
    result = stage.run(vllm_generator(saved["qwen2"], engine), batch)
    assert engine.windows == [len(TEXTS)]
    for name in ("caption", "caption_num_tokens", "text_num_tokens"):
        assert result.features[name].to_pylist() == expected.features[name].to_pylist()
    logprobs = [batch.features["caption_logprob"].to_pylist() for batch in (result, expected)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
    assert stage.run(vllm_generator(saved["qwen2"], engine), samples_of([])).features["caption"].to_pylist() == []


def test_a_prompt_that_vllm_rejects_is_one_failure(saved: dict[str, Path]) -> None:
    model = vllm_generator(saved["qwen2"])
    length = len(model.encode_prompt(Request(text=TEXTS[1])))
    engine = Engine(saved["qwen2"], rejected=[length])
    result = stage_of(saved["qwen2"]).run(vllm_generator(saved["qwen2"], engine), samples_of(TEXTS))
    assert [(failure.key, failure.error) for failure in result.failures] == [("1", "ValueError")]
    assert [text is None for text in result.features["caption"].to_pylist()] == [False, True, False, False]


def test_a_broken_engine_is_a_device_error(saved: dict[str, Path]) -> None:
    with pytest.raises(DeviceError, match="RuntimeError: the engine core died"):
        stage_of(saved["qwen2"]).run(
            vllm_generator(saved["qwen2"], Engine(saved["qwen2"], is_broken=True)), samples_of(TEXTS)
        )


# Errors


@pytest.mark.parametrize(
    ("model", "device", "options", "explain", "message"),
    [
        ("qwen2", "cpu", {}, False, "expected `device` cuda, found cpu"),
        ("qwen2", "cuda", {"num_beams": 2}, False, "`num_beams` 1"),
        ("qwen2", "cuda", {"temperature": 2.5}, False, "a `temperature` of at most 2.0"),
        ("qwen3_vl", "cuda:0", {}, True, "`explain`"),
        ("t5", "cuda", {}, False, "families gemma3, .*; found t5"),
    ],
)
def test_unsupported_models_and_options(
    saved: dict[str, Path],
    tmp_path: Path,
    model: str,
    device: str,
    options: dict[str, Any],
    explain: bool,
    message: str,
) -> None:
    directory = hub.save_t5(tmp_path) if model == "t5" else saved[model]
    with pytest.raises(UsageError, match=f"`engine` vllm: .*{message}"):
        check_engine("vllm", describe(directory), replace(GREEDY, **options), device, explain)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "qwen2_5_omni"])
def test_supported_models(saved: dict[str, Path], name: str) -> None:
    check_engine("vllm", describe(saved[name]), GREEDY, "cuda", explain=False)


def test_engines_do_not_share_a_loaded_model(saved: dict[str, Path]) -> None:
    stage = stage_of(saved["qwen2"])
    assert replace(stage, engine="vllm").key != stage.key


def test_one_process_per_gpu() -> None:
    vllm.check_processes(1, 1)
    vllm.check_processes(2, 3)
    with pytest.raises(UsageError, match="set `workers` to 4, or `device` to cuda:0"):
        vllm.check_processes(4, 1)


def test_score_is_unsupported(saved: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="`engine` vllm"):
        vllm_generator(saved["qwen2"]).score([], [])


def test_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"vLLM is not installed here: pip install 'vllm>=0\.33'"):
        vllm.check_installed()


def test_a_job_on_the_cpu_fails_before_it_writes(saved: dict[str, Path], tmp_path: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(1), shards=1)
    options = CaptionOptions(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model=str(saved["qwen2"]),
        device="cpu",
        engine="vllm",
    )
    with pytest.raises(UsageError, match=r"`engine` vllm: .*expected `device` cuda"):
        prepare(options)
    assert not (tmp_path / "out").exists()


# The engines themselves: transformers, and vLLM if it is installed on a machine with a GPU

ENGINES = ["transformers"]
if torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
    ENGINES.append("vllm")


@pytest.fixture(scope="module")
def heads_of_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with heads of 64, which vLLM's kernels support."""
    tokenizer = hub.chat_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, **hub.ids_of(tokenizer))
    return hub.save(Qwen2ForCausalLM, config, tmp_path_factory.mktemp("model"), tokenizer)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_equals_the_model_itself(heads_of_64: Path, engine: Any) -> None:
    device = "cuda" if engine == "vllm" else "cpu"
    stage = generate_stage(str(heads_of_64), decoding=GREEDY, device=device, dtype="float32", engine=engine)
    model = stage.load()
    texts = model.generate([Request(text=text) for text in TEXTS], GREEDY)
    reference = Engine(heads_of_64)
    for words, text in zip(TEXTS, texts, strict=True):
        ids = vllm_generator(heads_of_64).encode_prompt(Request(text=words))
        [expected] = reference._run(ids, SamplingParams(8, 0.0, 1.0, None, 1.0, 0, detokenize=False)).outputs
        assert list(text.token_ids) == expected.token_ids
        assert text.logprob == pytest.approx(expected.cumulative_logprob, abs=1e-2)
    sampling = Decoding(max_new_tokens=8, temperature=1.0)
    requests = [Request(text=text, seed=2**63 + number) for number, text in enumerate(TEXTS)]
    together = model.generate(requests, sampling)
    alone = [model.generate([request], sampling)[0] for request in requests]
    assert [text.token_ids for text in together] == [text.token_ids for text in alone]
    assert all(math.isfinite(text.logprob) for text in together)
