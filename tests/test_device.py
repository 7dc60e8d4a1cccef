"""What a job does to a GPU, on a simulated one: what overlaps, and the kernels, copies and waits of every family.

The simulation raises for tensors on different devices and for tensors that are used before they are complete, and the
results must equal those of the CPU.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shards
import tiny_audio_models
import tiny_audio_text
import tiny_captioners
import tiny_chat_models
import tiny_generators
import tiny_generators_hub as hub
import tiny_labellers
import tiny_models
import torch
from simulated_cuda import Gpu, simulated_gpu
from tiny_clip import save_clip
from tiny_gemma import save_embedding_gemma2
from transformers import BatchEncoding, BatchFeature

from mmbeam.errors import DeviceError
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.models.placement import Device
from mmbeam.process import reset
from mmbeam.prompts.ask import Decoding
from mmbeam.stages.base import ModelStage
from mmbeam.stages.embed import embed_stage
from mmbeam.stages.generate import generate_stage
from mmbeam.stages.label import label_stage
from mmbeam.stages.packing import Pack
from mmbeam.types import Audio, Batch, Sample, WorkUnit

# Overlap

PREPARE, COMPUTE = 0.012, 0.024  # seconds per pack: preparing takes half as long as computing


@dataclass(frozen=True, kw_only=True)
class Timed(ModelStage):
    """A stage whose packs take time to prepare on the host, to copy, and to compute."""

    gpu: Gpu
    packs_per_window: int
    memory: int = 4  # items of a pack that fit

    model: str = "timed"
    spec: Any = None
    digest: str = "timed"
    key: str = "timed"  # type: ignore[misc]

    def load(self) -> None:
        return None

    def packs(self, model: None, batch: Batch) -> Iterator[Pack[int]]:
        for number in range(self.packs_per_window):
            items = [4 * number + item for item in range(4)]
            yield Pack(group="numbers", positions=items, items=items, weights=[1] * 4)

    def transfer(self, model: None, group: str, items: Any) -> list[int]:
        time.sleep(PREPARE * 0.8)
        self.gpu.copy(PREPARE * 0.2)
        return list(items)

    def compute(self, model: None, group: str, inputs: list[int]) -> list[int]:
        if len(inputs) > self.memory and 4 in inputs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.gpu.kernel(COMPUTE * len(inputs) / 4)
        return [-item for item in inputs]

    def collect(self, model: None, batch: Batch, results: Any) -> Batch:
        done = [(part, values) for result in results for part, values in result.done]
        assert sorted(position for part, _ in done for position in part) == list(range(4 * self.packs_per_window))
        assert all(values == [-position for position in part] for part, values in done)
        return batch


def window_of(unit: str) -> Batch:
    return Batch(unit=WorkUnit(id=unit, inputs=()), index=0, last=False)


def run_units(stage: Timed, units: int, windows: int) -> list[Batch]:
    """Run windows of units that are in flight at a time, each on its own thread."""
    device = Device("cuda:0")

    def run(unit: int) -> list[Batch]:
        return [device.run(stage, window_of(str(unit))) for _ in range(windows)]

    with ThreadPoolExecutor(units) as pool:
        return [batch for batches in pool.map(run, range(units)) for batch in batches]


@pytest.mark.parametrize(
    ("units", "windows", "packs", "memory"),
    [(1, 1, 24, 4), (2, 12, 1, 4), (2, 6, 2, 4), (2, 1, 16, 3)],
    ids=["one unit", "two units of short windows", "two units", "out of memory"],
)
def test_the_device_is_idle_less_than_a_tenth_of_the_time(units: int, windows: int, packs: int, memory: int) -> None:
    reset()
    with simulated_gpu() as gpu:
        stage = Timed(gpu=gpu, packs_per_window=packs, memory=memory, device="cuda")
        begin = time.perf_counter()
        batches = run_units(stage, units, windows)
        wall = time.perf_counter() - begin
    work = units * windows * packs
    assert gpu.idle_share < 0.1
    computed = sum(batch.tally.seconds["compute"] for batch in batches)
    assert work * COMPUTE <= computed * 1.001
    assert computed <= wall  # the model utilisation is at most 1
    assert wall < 0.8 * work * (PREPARE + COMPUTE)  # less than one after the other
    assert gpu.stats["waits for events"] >= work  # more after a pack was halved
    reset()


def test_a_device_error_ends_both_units_and_is_reported_by_each() -> None:
    with simulated_gpu() as gpu:
        stage, device = Timed(gpu=gpu, packs_per_window=4, device="cuda"), Device("cuda:0")
        with ThreadPoolExecutor(2) as pool:
            device.run(stage, window_of("0"))
            gpu.error = torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with TORCH_USE...")
            futures = [pool.submit(device.run, stage, window_of(str(unit))) for unit in range(2)]
            for future in futures:
                with pytest.raises(DeviceError, match=r"cuda:0.*device-side assert triggered$"):
                    future.result(timeout=10)
        gpu.error = None
        with pytest.raises(DeviceError, match="failed before: CUDA error: device-side assert triggered"):
            device.run(stage, window_of("0"))


# Budgets


@pytest.fixture
def host_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The calls of tokenizers ("BatchEncoding"), processors ("BatchFeature") and of a GPU's thread to either."""
    calls = Counter[str]()

    def count(cls: Any, method: str, name: str) -> None:
        original = getattr(cls, method)

        def counted(*args: Any, **options: Any) -> Any:
            on_device = threading.current_thread().name.startswith("mmbeam-cuda")
            calls[f"{name} on the device's thread" if on_device else name] += 1
            return original(*args, **options)

        monkeypatch.setattr(cls, method, counted)

    count(BatchEncoding, "__init__", "BatchEncoding")
    count(BatchFeature, "__init__", "BatchFeature")
    count(FusionProcessor, "token_ids", "BatchEncoding")
    count(FusionProcessor, "input_ids", "BatchEncoding")
    return calls


def check_threads(calls: Counter[str]) -> None:
    """Fail if a GPU's thread called a tokenizer or a processor."""
    assert not [name for name in calls if "device" in name], calls


ENCODERS: dict[str, tuple[Callable[[Path], Path], int]] = {  # kernels of a window, at most
    "clip": (save_clip, 145),
    "siglip": (tiny_models.save_siglip, 145),
    "siglip2": (tiny_models.save_siglip2, 235),
    "blip": (tiny_models.save_blip, 180),
    "vit": (tiny_models.BACKBONES["vit"], 80),
    "dinov2": (tiny_models.BACKBONES["dinov2"], 70),
    "dinov3_vit": (tiny_models.BACKBONES["dinov3_vit"], 90),
    "dinov3_convnext": (tiny_models.BACKBONES["dinov3_convnext"], 68),
    "resnet": (tiny_models.BACKBONES["resnet"], 90),
    "convnext": (tiny_models.BACKBONES["convnext"], 70),
    "clap": (tiny_audio_text.save_clap, 320),
    "clap-fusion": (lambda path: tiny_audio_text.save_clap(path, fusion=True), 370),
    "whisper": (tiny_audio_text.save_whisper, 175),
    "ast": (tiny_audio_text.save_ast, 160),
    "wav2vec2": (lambda path: tiny_audio_text.save_speech(path, "wav2vec2"), 205),
    "wavlm": (lambda path: tiny_audio_text.save_speech(path, "wavlm"), 265),
    "bert": (tiny_audio_text.save_bert, 75),
    "modernbert": (tiny_audio_text.save_modernbert, 125),
    "mpnet": (tiny_audio_text.save_mpnet, 125),
    "t5": (tiny_audio_text.save_t5, 120),
    "embedding_gemma2": (save_embedding_gemma2, 1450),
}
WAITS = {  # of transformers' own code, for values that decide what it computes
    "clap-fusion": 1,  # which clips are longer than a window
    "embedding_gemma2": 5,  # which positions hold media
}


def window() -> Batch:
    """Eight samples with images of four sizes, clips of four lengths and texts of eight lengths."""
    samples = tuple(
        Sample(
            key=str(number),
            shard="s.tar",
            offset=number,
            present=frozenset({"image", "audio", "text"}),
            image=shards.natural_image(number, 40 + 9 * (number % 4), 52),
            audio=Audio(
                waves={16_000: tiny_audio_text.noise(16_000, 0.5 + 0.6 * (number % 4), number).astype(np.float32)},
                seconds=0.5 + 0.6 * (number % 4),
            ),
            text="a word or two " * (1 + number % 8),
        )
        for number in range(8)
    )
    return Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=samples)


def cosine(a: Any, b: Any) -> float:
    """The cosine of all numbers of `a` and `b`; 1 if both are null. CUDA resizes pictures within one level of 256."""
    if a is None or b is None:
        return float(a is b)
    a, b = (np.asarray(values, np.float64).ravel() for values in (a, b))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own attention
@pytest.mark.filterwarnings("ignore:At least one mel filter")  # the tiny AST's
@pytest.mark.parametrize("family", ENCODERS)
def test_a_window_of_an_encoder_keeps_its_budget(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None], host_calls: Counter[str]
) -> None:
    """Vectors and tokens. One copy to the device and one wait per pack, two copies to the host."""
    build, kernels = ENCODERS[family]
    stage = embed_stage(str(build(tmp_path / family)), dtype="float32", tokens=True)
    cpu = Device("cpu")
    expected = cpu.run(stage, window())
    if "text" in stage.modalities:
        model, texts = cpu._models[stage.key], ["", "a word", "\u00e9 </s> [SEP] b", "long " * 10_000]
        counts = [model.count_encoded(ids) for ids in model.tokenize(texts)]
        assert counts == [*model.count_tokens(texts[:3]), None]  # texts are tokenized once, if they are not truncated
    with simulated_gpu() as gpu:
        device = Device("cuda:0")
        device.run(stage, window())  # copies constants, once
        gpu.stats.clear()
        gpu.sites.clear()
        host_calls.clear()
        result = device.run(stage, window())
    check_threads(host_calls)
    record_property("device", f"{family}: {', '.join(f'{count} {what}' for what, count in sorted(gpu.stats.items()))}")
    assert result.failures == expected.failures == ()
    for column, values in expected.features.items():
        for wanted, found in zip(values.to_pylist(), result.features[column].to_pylist(), strict=True):
            assert cosine(wanted, found) > 0.999, column
    packs = len(stage.modalities)
    assert gpu.stats["kernels"] <= kernels
    assert gpu.stats["waits for events"] == packs
    assert gpu.stats["copies to the host"] == 2 * packs
    assert gpu.stats["copies to the device"] <= 4 * packs
    assert sum(count for lines in gpu.sites.values() for count in lines.values()) <= WAITS.get(family, 0), gpu.sites


def test_the_number_of_sizes_hardly_adds_kernels(clip: Path, record_property: Callable[[str, object], None]) -> None:
    """43 pictures of 43 sizes: one kernel per size pads them, and a few resize them together."""
    samples = tuple(
        Sample(
            key=str(number),
            shard="s.tar",
            offset=number,
            present=frozenset({"image"}),
            image=shards.natural_image(number, 40 + number, 90 - number),
        )
        for number in range(43)
    )
    with simulated_gpu() as gpu:
        stage, device = embed_stage(str(clip), modalities=("image",), dtype="float32"), Device("cuda:0")
        device.run(stage, replace(window(), samples=samples))
        gpu.stats.clear()
        device.run(stage, replace(window(), samples=samples))
    record_property("device", f"43 sizes: {gpu.stats['kernels']} kernels")
    assert gpu.stats["kernels"] < 43 + 100


LABELLERS: dict[str, tuple[Any, Callable[[Path], Path], int]] = {  # task, and kernels of a window, at most
    "vit": ("classify", tiny_labellers.IMAGES["vit"], 65),
    "ast": ("classify", tiny_labellers.SOUNDS["ast"], 160),
    "bert": ("classify", tiny_labellers.TEXTS["bert"], 70),
    "detr": ("detect", tiny_labellers.DETECTORS["detr"], 950),
    "segformer": ("segment", tiny_labellers.SEGMENTERS["segformer"], 60),
    "tagger": ("tag", tiny_labellers.TAGGERS["bert"], 70),
}


@pytest.mark.filterwarnings("ignore:At least one mel filter")  # the tiny AST's
@pytest.mark.parametrize("family", LABELLERS)
def test_a_window_of_a_labeller_keeps_its_budget(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None], host_calls: Counter[str]
) -> None:
    """One wait per pack, and no processor or tokenizer on the device's thread."""
    task, build, kernels = LABELLERS[family]
    stage = label_stage(str(build(tmp_path / family)), task=task, dtype="float32")
    expected = Device("cpu").run(stage, window())
    with simulated_gpu() as gpu:
        device = Device("cuda:0")
        device.run(stage, window())  # copies constants, once
        gpu.stats.clear()
        gpu.sites.clear()
        host_calls.clear()
        result = device.run(stage, window())
    check_threads(host_calls)
    record_property("device", f"{family}: {', '.join(f'{count} {what}' for what, count in sorted(gpu.stats.items()))}")
    assert result.failures == expected.failures == ()
    for values in zip(*(batch.features[stage.column].to_pylist() for batch in (expected, result)), strict=True):
        names, scores = ([[part[key] for part in value] for value in values] for key in ("label", "score"))
        assert names[0] == names[1]
        assert np.allclose(scores[0], scores[1], atol=0.02)
    assert gpu.stats["kernels"] <= kernels
    assert gpu.stats["waits for events"] == 1
    assert gpu.stats["copies to the device"] <= 2 * len(window().samples)
    assert not gpu.sites, gpu.sites


ALIKE = {"mbart", "marian", "pegasus", "gpt2", "blip-2-t5", "idefics3", "qwen2_5_omni"}  # the code of another family
DAILY = {"t5", "llama", "blip", "smolvlm", "whisper", "mmbeam-fusion"}
GENERATORS: dict[str, Callable[[Path], Path]] = {
    **hub.SEQ2SEQ,
    **hub.CAUSAL,
    **tiny_captioners.CAPTIONERS,
    **tiny_chat_models.IMAGE_MODELS,
    **tiny_audio_models.AUDIO_MODELS,
    "whisper": hub.save_whisper,
    "mmbeam-fusion": tiny_generators.save_fusion,
}


PER_TOKEN = {"whisper": 8}  # it decodes the windows of a clip one after the other


@pytest.mark.parametrize(
    "family",
    [
        *sorted(DAILY),
        *(pytest.param(name, marks=pytest.mark.torture) for name in sorted(GENERATORS.keys() - ALIKE - DAILY)),
    ],
)
def test_a_generator_writes_the_same_text_and_waits_once_per_token(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None], host_calls: Counter[str]
) -> None:
    """The wait is for whether every text has ended. The rest is once per window, and of the model's own code."""
    task: Any = "summarize" if family == "qwen2" else None
    stage = generate_stage(str(GENERATORS[family](tmp_path)), dtype="float32", task=task)
    few, more = (replace(stage, decoding=Decoding(max_new_tokens=count)) for count in (2, 4))
    batch = replace(window(), samples=window().samples[1:3])
    texts = Device("cpu").run(more, batch).features[stage.column]
    stats: list[Counter[str]] = []
    with simulated_gpu() as gpu:
        device = Device("cuda:0")
        for measured in (few, few, more):
            gpu.stats.clear()
            host_calls.clear()
            result = device.run(measured, batch)
            if stats:  # the model is loaded
                check_threads(host_calls)
            stats.append(Counter({what: count for what, count in gpu.stats.items() if what != "kernels"}))
    assert result.features[stage.column].to_pylist() == texts.to_pylist()
    per_token = {what: (count - stats[1][what]) / 2 for what, count in stats[2].items()}
    record_property("device", f"{family}: {gpu.stats['kernels']} kernels for 4 tokens; per token {per_token}")
    assert sum(per_token.values()) <= PER_TOKEN.get(family, 1), per_token
