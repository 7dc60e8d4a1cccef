"""The engine of vLLM: what it is given, what is read of what it gives back; and itself, where it is installed.

Where it is not, prompts are expanded here as vLLM expands them, and an engine of its shape runs a tiny model.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chat_models
import tiny_generators_hub as hub
import tiny_hearing_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import pictures
from shards import natural_sound
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mmbeam.config import Windows
from mmbeam.errors import DeviceError, JobError, LimitError, ModelError, UsageError
from mmbeam.jobs.caption import GPU_WINDOWS, CaptionOptions, _for_device, prepare
from mmbeam.models.generators import check_engine, describe, family_of, vllm
from mmbeam.models.generators.decoding import score
from mmbeam.models.generators.vllm import VllmGenerator
from mmbeam.prompts.ask import Decoding, GeneratorSpec, Request
from mmbeam.stages.generate import GenerateStage, generate_stage
from mmbeam.types import Batch, Sample, WorkUnit

CPU = torch.device("cpu")
GREEDY = Decoding(max_new_tokens=8)
MODELS = {
    **tiny_chat_models.SEEING,
    **{name: save for name, save in tiny_hearing_models.HEARING_MODELS.items() if name != "voxtral"},
    "qwen2": hub.save_qwen2,
}
IMAGES = [image.copy() for image in pictures(((48, 48), (97, 120)))]
SOUNDS = [(natural_sound(1, seconds, 16000), 16000) for seconds in (0.7, 4.3)]  # windows are of 2 s
TEXTS = ["a dog", "the quick brown fox", "x", "two cats in a garden, and a dog"]


@dataclass
class SamplingParams:
    """The parameters of vLLM's that are set here, under their names: another name is a TypeError."""

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
    """vLLM's `LLM` as far as it is used, around a model of transformers: each prompt by itself, greedily."""

    def __init__(self, directory: Path, refuses: Sequence[int] = (), breaks: bool = False) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.refuses = refuses  # lengths of prompts
        self.breaks = breaks
        self.windows: list[int] = []
        self._queue: list[tuple[list[int], SamplingParams]] = []

    def enqueue(self, prompts: Sequence[dict[str, Any]], params: Sequence[SamplingParams], *, use_tqdm: bool) -> None:
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if any(len(each) in self.refuses for each in ids):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        self.windows.append(len(ids))
        self._queue += zip(ids, params, strict=True)

    def wait_for_completion(self, *, use_tqdm: bool) -> list[RequestOutput]:
        if self.breaks:
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


def on_vllm(directory: Path, engine: Any = None) -> VllmGenerator:
    spec = describe(directory)
    family: Any = family_of(spec.family)
    return VllmGenerator(spec, family, CPU, torch.float32, engine, SamplingParams)


def requests_for(spec: GeneratorSpec) -> list[Request]:
    made = [Request(text=text) for text in TEXTS]
    if "image" in spec.modalities:
        made += [Request(image=image, text=text) for image, text in zip(IMAGES, TEXTS, strict=False)]
    if "audio" in spec.modalities:
        made += [Request(audio=sound, text="a") for sound in SOUNDS] + [Request(audio=SOUNDS[0])]
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_the_familys_own_once_its_placeholders_are_expanded(saved: dict[str, Path], name: str) -> None:
    """As vLLM does it: each placeholder, in order, becomes the tokens of its picture or sound.

    Line feeds that meet there are one token to a Gemma 3, in vLLM as well; hence the comparison as text.
    """
    ours: Any = hub.load_tiny(saved[name])
    model = on_vllm(saved[name])
    spell = model.tokenizer._tokenizer.decode
    for request in requests_for(model.spec):
        media = list(ours.media(request))
        places = model.tokenizer.ids_of([medium.tokens for medium in model.media(request)])
        prompt = model.vllm_prompt(request)["prompt_token_ids"]
        expanded = [media.pop(0).tokens if token in places else spell([token]) for token in prompt]
        assert not media
        assert "".join(expanded) == spell(ours.inputs([request])["input_ids"][0])


@pytest.mark.parametrize("name", MODELS)
def test_pictures_and_sounds_lie_beside_the_prompt(saved: dict[str, Path], name: str) -> None:
    model = on_vllm(saved[name])
    for request in requests_for(model.spec):
        data = model.vllm_prompt(request).get("multi_modal_data", {})
        assert set(data) == {kind for kind in ("image", "audio") if getattr(request, kind) is not None}
        if "image" in data:
            np.testing.assert_array_equal(np.asarray(data["image"]), request.image)
        if "audio" in data:
            assert len(data["audio"]) == sum(medium.kind == "audio" for medium in model.media(request))
            assert sum(map(len, data["audio"])) >= len(request.audio[0])  # type: ignore[index]
    assert "multi_modal_data" not in model.vllm_prompt(Request(text="a"))


def test_a_sound_of_more_windows_than_there_is_room_for_is_refused(saved: dict[str, Path]) -> None:
    long = (np.zeros(2 * 16000 * vllm.MAX_WINDOWS + 1, np.float32), 16000)
    with pytest.raises(LimitError, match="17 windows"):
        on_vllm(saved["qwen2_audio"]).vllm_prompt(Request(audio=long))


def test_decoding_in_vllms_words() -> None:
    greedy = vllm.sampling(GREEDY, 5, 1.0)
    assert greedy == vars(SamplingParams(8, 0.0, 1.0, None, 1.0, 0, detokenize=False))
    drawn = vllm.sampling(Decoding(temperature=0.7, top_p=0.9), 5, 1.3)
    assert drawn == vars(SamplingParams(64, 0.7, 0.9, 5, 1.3, 0, detokenize=False))


@given(st.integers(0, 2**64 - 1))
def test_a_samples_seed_is_one_that_vllm_takes(seed: int) -> None:
    """Signed 64 bits; -1 would be no seed."""
    assert 0 <= vllm.sampling(Decoding(temperature=1.0), seed, 1.0)["seed"] < 2**63


def test_what_a_checkpoint_asks_of_every_text(tmp_path: Path) -> None:
    assert vllm.repetition_penalty(tmp_path) == 1.0
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05, "temperature": 0.1}')
    assert vllm.repetition_penalty(tmp_path) == 1.05


def test_a_text_is_read_from_what_comes_back(saved: dict[str, Path]) -> None:
    model = on_vllm(saved["qwen2"])
    ids = model.tokenizer.encode_words("a dog")
    end = model.tokenizer._tokenizer.eos_token_id
    ended = model.read(RequestOutput([1], [CompletionOutput([*ids, end], -2.5, "stop")]), GREEDY)
    assert (ended.text, ended.token_ids, ended.num_tokens, ended.logprob) == ("a dog", (*ids, end), len(ids), -2.5)
    full = model.read(RequestOutput([1], [CompletionOutput(ids, -2.5, "length")]), Decoding(max_new_tokens=len(ids)))
    assert (full.text, full.num_tokens) == ("a dog", len(ids))
    with pytest.raises(LimitError, match="a prompt of 1 tokens leaves room for 5 of 8 new ones"):
        model.read(RequestOutput([1], [CompletionOutput(ids, -2.5, "length")]), GREEDY)


def test_what_the_engine_is_started_with(saved: dict[str, Path]) -> None:
    text = vllm.engine_options(describe(saved["qwen2"]), torch.device("cuda:1"), torch.bfloat16, 0.8)
    assert text == {
        "model": str(saved["qwen2"]),
        "load_format": "safetensors",
        "dtype": "bfloat16",
        "device_ids": [1],
        "gpu_memory_utilization": 0.8,
        "max_model_len": -1,
    }
    seen = vllm.engine_options(describe(saved["qwen3_vl"]), torch.device("cuda"), torch.float16, 0.8)
    assert seen["device_ids"] == [0]
    assert seen["limit_mm_per_prompt"] == {"image": 1, "audio": 0, "video": 0}


# Behind the same step


def samples_of(texts: Sequence[str]) -> Batch:
    samples = [
        Sample(key=str(number), shard="s", offset=number, present=frozenset({"text"}), text=text)
        for number, text in enumerate(texts)
    ]
    return Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=tuple(samples))


def stage_of(directory: Path) -> GenerateStage:
    return generate_stage(str(directory), decoding=GREEDY, task="caption", batch_size=2)


def test_a_window_goes_to_the_engine_at_once_and_gives_the_same_texts(saved: dict[str, Path]) -> None:
    stage, engine = stage_of(saved["qwen2"]), Engine(saved["qwen2"])
    batch = samples_of(TEXTS)
    expected = stage.run(stage.load(), batch)
    found = stage.run(on_vllm(saved["qwen2"], engine), batch)
    assert engine.windows == [len(TEXTS)]
    for name in ("caption", "caption_num_tokens", "text_num_tokens"):
        assert found.features[name].to_pylist() == expected.features[name].to_pylist()
    logprobs = [each.features["caption_logprob"].to_pylist() for each in (found, expected)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
    assert stage.run(on_vllm(saved["qwen2"], engine), samples_of([])).features["caption"].to_pylist() == []


def test_a_prompt_that_it_refuses_is_one_failure(saved: dict[str, Path]) -> None:
    model = on_vllm(saved["qwen2"])
    refused = len(model.prompt(Request(text=TEXTS[1])))
    engine = Engine(saved["qwen2"], refuses=[refused])
    result = stage_of(saved["qwen2"]).run(on_vllm(saved["qwen2"], engine), samples_of(TEXTS))
    assert [(failure.key, failure.error) for failure in result.failures] == [("1", "ValueError")]
    assert [text is None for text in result.features["caption"].to_pylist()] == [False, True, False, False]


def test_an_engine_that_breaks_is_no_samples_fault(saved: dict[str, Path]) -> None:
    with pytest.raises(DeviceError, match="RuntimeError: the engine core died"):
        stage_of(saved["qwen2"]).run(on_vllm(saved["qwen2"], Engine(saved["qwen2"], breaks=True)), samples_of(TEXTS))


# What it is not for, said before anything is done


@pytest.mark.parametrize(
    ("model", "device", "options", "explain", "message"),
    [
        ("qwen2", "cpu", {}, False, "expected device cuda, found cpu"),
        ("qwen2", "cuda", {"num_beams": 2}, False, "num_beams 1"),
        ("qwen2", "cuda", {"temperature": 2.5}, False, "a temperature of at most 2.0"),
        ("qwen3_vl", "cuda:0", {}, True, "explain"),
        ("t5", "cuda", {}, False, "families gemma3, .*; found t5"),
    ],
)
def test_what_it_cannot_do(
    saved: dict[str, Path],
    tmp_path: Path,
    model: str,
    device: str,
    options: dict[str, Any],
    explain: bool,
    message: str,
) -> None:
    directory = hub.save_t5(tmp_path) if model == "t5" else saved[model]
    with pytest.raises(UsageError, match=f"engine vllm: .*{message}"):
        check_engine("vllm", describe(directory), replace(GREEDY, **options), device, explain)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "qwen2_5_omni"])
def test_what_it_can(saved: dict[str, Path], name: str) -> None:
    check_engine("vllm", describe(saved[name]), GREEDY, "cuda", explain=False)


def test_another_engine_is_another_model_to_the_device(saved: dict[str, Path]) -> None:
    stage = stage_of(saved["qwen2"])
    assert replace(stage, engine="vllm").key != stage.key


def test_a_process_for_each_gpu() -> None:
    vllm.check_processes(1, 1)
    vllm.check_processes(2, 3)
    with pytest.raises(UsageError, match="set workers to 4, or device to cuda:0"):
        vllm.check_processes(4, 1)


def test_no_text_is_scored(saved: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="engine vllm"):
        on_vllm(saved["qwen2"]).score([], [])


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"vLLM is not installed here: pip install 'vllm>=0\.33'"):
        vllm.check_installed()


def test_a_job_on_the_cpu_is_refused_before_anything_is_written(saved: dict[str, Path], tmp_path: Path) -> None:
    options = CaptionOptions(
        input=(str(tmp_path),), output=str(tmp_path / "out"), model=str(saved["qwen2"]), device="cpu", engine="vllm"
    )
    with pytest.raises(UsageError, match=r"engine vllm: .*expected device cuda"):
        prepare(options)
    assert not (tmp_path / "out").exists()


def test_on_a_gpu_windows_are_larger_unless_they_are_chosen() -> None:
    options = CaptionOptions(input=("in",), output="out")
    chosen = replace(options, windows=Windows(samples=7))
    assert [_for_device(options, device).windows for device in ("cpu", "cuda")] == [options.windows, GPU_WINDOWS]
    assert _for_device(chosen, "cuda:0") == chosen
    assert GPU_WINDOWS.decoded_bytes > options.windows.decoded_bytes


# The engines themselves: vLLM where it is installed beside a GPU, transformers everywhere

ENGINES = ["transformers"]
if torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
    ENGINES.append("vllm")


@pytest.fixture(scope="module")
def of_usual_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with heads of 64, which vLLM's kernels take."""
    tokenizer = hub.chat_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, **hub.ids_of(tokenizer))
    return hub.save(Qwen2ForCausalLM, config, tmp_path_factory.mktemp("model"), tokenizer)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_writes_what_the_model_itself_does(of_usual_heads: Path, engine: Any) -> None:
    device = "cuda" if engine == "vllm" else "cpu"
    stage = generate_stage(str(of_usual_heads), decoding=GREEDY, device=device, dtype="float32", engine=engine)
    model = stage.load()
    found = model.generate([Request(text=text) for text in TEXTS], GREEDY)
    reference = Engine(of_usual_heads)
    for text, made in zip(TEXTS, found, strict=True):
        ids = on_vllm(of_usual_heads).prompt(Request(text=text))
        [expected] = reference._run(ids, SamplingParams(8, 0.0, 1.0, None, 1.0, 0, detokenize=False)).outputs
        assert list(made.token_ids) == expected.token_ids
        assert made.logprob == pytest.approx(expected.cumulative_logprob, abs=1e-2)
    drawing = Decoding(max_new_tokens=8, temperature=1.0)
    requests = [Request(text=text, seed=2**63 + number) for number, text in enumerate(TEXTS)]
    drawn, alone = model.generate(requests, drawing), [model.generate([each], drawing)[0] for each in requests]
    assert [each.token_ids for each in drawn] == [each.token_ids for each in alone]
    assert all(math.isfinite(each.logprob) for each in drawn)
