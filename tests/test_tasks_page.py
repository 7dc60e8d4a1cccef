"""The examples of docs/tasks.md, with tiny models in directories of the hub's names."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_chat_models import save_smolvlm
from tiny_clip import save_clip, save_random
from tiny_labellers import DETECTORS, IMAGES, SEGMENTERS, SOUNDS, TAGGERS, TEXTS, save_owlv2
from tiny_synthesizers import save_diffusion, save_vits
from transformers import VideoMAEConfig, VideoMAEModel, VideoMAEVideoProcessor
from videos import video

from mmbeam.cli import main
from mmbeam.corpus.write import write_corpus


def save_videomae(directory: Path) -> None:
    """Write a VideoMAE of 4 frames."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_random(VideoMAEModel, VideoMAEConfig(**sizes, image_size=48, num_frames=4), directory)
    square = {"height": 48, "width": 48}
    VideoMAEVideoProcessor(size={"shortest_edge": 48}, crop_size=square).save_pretrained(directory)


PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
MODELS: dict[str, Callable[[Path], object]] = {
    "google/vit-base-patch16-224": IMAGES["vit"],
    "MIT/ast-finetuned-audioset-10-10-0.4593": SOUNDS["ast"],
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": TEXTS["distilbert"],
    "openai/clip-vit-base-patch32": save_clip,
    "facebook/detr-resnet-50": DETECTORS["detr"],
    "google/owlv2-base-patch16-ensemble": save_owlv2,
    "nvidia/segformer-b0-finetuned-ade-512-512": SEGMENTERS["segformer"],
    "facebook/mask2former-swin-tiny-coco-instance": SEGMENTERS["mask2former"],
    "dslim/bert-base-NER": TAGGERS["bert"],
    "MCG-NJU/videomae-base": save_videomae,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": save_smolvlm,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": save_diffusion,
    "facebook/mms-tts-eng": save_vits,
}


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.torture)])
def test_every_example_runs(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "shards", samples=2, shards=1, image_side=64, rate=8000)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes(video(sound="aac"))
    for name, save in MODELS.items():
        save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    commands = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", "").splitlines()
    assert len(commands) == len(MODELS)
    for command in commands:
        _, program, *arguments = shlex.split(command)
        assert program == "mmbeam"
        runs = whole or "areas" in arguments  # that the Python example reads; others: the launch only
        assert main([*arguments, "--device", "cpu", *([] if runs else ["--dry-run"])]) == 0, command
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(example, {})
