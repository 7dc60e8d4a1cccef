"""Texts about videos: by models whose processors take them, as several images, and by the middle frame."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tars
import torch
import transformers
from outputs import is_conserved, read_failures, read_rows
from tiny_audio_text import TOWER
from tiny_captioners import save_vit_gpt2
from tiny_chat_models import SMALL, save_gemma3, save_qwen2_5_vl, save_qwen3_vl, save_smolvlm
from tiny_generators_hub import NEW, chat_tokenizer, generate, ids_of, load_tiny, save, save_whisper
from videos import video

from mmbeam.config import Limits
from mmbeam.decode.video import decode_video
from mmbeam.jobs.caption import CaptionOptions, caption
from mmbeam.models.generators import describe, load
from mmbeam.models.generators.auto import CLASSES, video_metadata
from mmbeam.models.recipes import read_image_processor
from mmbeam.prompts.ask import Decoding, Request

CPU = torch.device("cpu")
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def save_llava_onevision(directory: Path) -> Path:
    """A LLaVA-OneVision of 48 x 48 pixels and 36 patches."""
    tokenizer = chat_tokenizer(image="<image>", image_token="<image>", video_token="<video>")
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**SMALL, **ids_of(tokenizer)).to_dict(),
        vision_config={**TOWER, "model_type": "siglip_vision_model", "image_size": 48, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[48, 48]],
    )
    side = {"height": 48, "width": 48}
    processor: Any = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=[[48, 48]]),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    return save(transformers.LlavaOnevisionForConditionalGeneration, config, directory, processor)


BUILDERS: Mapping[str, tuple[Callable[[Path], Path], str]] = {  # and what the chat template writes for a video
    "qwen2_5_vl": (save_qwen2_5_vl, QWEN_VIDEO),
    "qwen3_vl": (save_qwen3_vl, QWEN_VIDEO),
    "smolvlm": (save_smolvlm, "<video>"),
    "llava_onevision": (save_llava_onevision, "<video>"),
    "gemma3": (save_gemma3, ""),
}


def build(name: str, directory: Path) -> Path:
    """Write a checkpoint whose chat template knows videos."""
    builder, token = BUILDERS[name]
    builder(directory)
    template = directory / "chat_template.jinja"
    image = "{% elif part.type == 'image' %}"
    template.write_text(template.read_text().replace(image, "{% elif part.type == 'video' %}" + token + image))
    return directory


@torch.inference_mode()
@pytest.mark.parametrize("name", BUILDERS)
def test_a_video_equals_the_processor_and_generate(name: str, tmp_path: Path) -> None:
    directory = build(name, tmp_path)
    spec = describe(directory, video=True)
    assert (spec.video, spec.modalities) == ("images" if name == "gemma3" else "video", ("image", "video", "text"))
    clips = [decode_video(video(first_red=first, size=(96, 64)), Limits(), 4) for first in (0, 100)]
    processor: Any = transformers.AutoProcessor.from_pretrained(directory)
    processor.image_processor = read_image_processor(directory)
    model = getattr(transformers, CLASSES[name]).from_pretrained(directory).eval()
    expected = []
    for clip in clips:
        question = {"type": "text", "text": "what moves"}
        if name == "gemma3":
            content = [*({"type": "image"} for _ in clip.frames), question]
            options: dict[str, Any] = {"images": [list(clip.frames)], "input_data_format": "channels_last"}
        else:
            content = [{"type": "video"}, question]
            options = {"videos": [np.stack(clip.frames)], "do_sample_frames": False}
            options |= {"video_metadata": [video_metadata(clip)]}
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], return_tensors="pt", **options)
        [ids] = model.generate(**inputs, do_sample=False, max_new_tokens=NEW).tolist()
        expected.append(ids[inputs["input_ids"].shape[1] :])
    loaded = load(spec, CPU, torch.float32)
    requests = [Request(video=clip, prompt="what moves") for clip in clips]
    for text, ids in zip(generate(loaded, [*requests, Request(prompt="x")]), expected, strict=False):
        assert list(text.token_ids) == ids[: len(text.token_ids)]
        assert text.token_ids
    frames = [replace(clips[0], frames=clips[0].frames[::-1]), clips[0]]
    backward, forward = (loaded.prepare([Request(video=clip, prompt="x")])[0][0] for clip in frames)
    assert any(not torch.equal(backward[key], forward[key]) for key in forward)


def run(
    tmp_path: Path, model: Path, **changes: Any
) -> tuple[Any, dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Caption a tar of videos, one of them damaged, and return the report, the rows and the failures by key."""
    members = [
        ("a.mp4", video(sound="aac")),
        ("b.webm", video("webm", "libvpx")),
        ("c.txt", b"no film"),
        ("d.mp4", video()[:-50]),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "v.tar").write_bytes(tars.write(members))
    options = CaptionOptions(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model=str(model),
        device="cpu",
        max_failure_rate=1.0,
        decoding=Decoding(max_new_tokens=NEW),
    )
    report = caption(replace(options, **changes))
    assert is_conserved(report)
    rows = {row["key"]: row for row in read_rows(tmp_path / "out")}
    return report, rows, {record["key"]: record for record in read_failures(tmp_path / "out")}


def test_a_model_of_one_image_receives_the_middle_frame(tmp_path: Path) -> None:
    directory = save_vit_gpt2(tmp_path / "model")
    report, rows, failures = run(tmp_path, directory)
    assert dict(report.tally.outputs) == {"caption": 2}
    assert (failures["d"]["modality"], failures["d"]["outputs"]) == ("video", ["caption"])
    assert (rows["c"]["caption"], rows["c"]["errors"]) == (None, [])
    middle = decode_video(video(sound="aac"), Limits(), 8).frames[4]
    [text] = generate(load_tiny(directory), [Request(image=middle)])
    assert rows["a"]["caption"] == text.text
    assert rows["a"]["video_seconds"] == pytest.approx(3.0)
    assert any("its middle frame" in note for note in describe(directory, video=True).notes)


def test_a_chat_model_captions_the_videos(tmp_path: Path) -> None:
    report, rows, failures = run(tmp_path, build("smolvlm", tmp_path / "model"))
    assert dict(report.tally.outputs) == {"caption": 2}
    assert set(failures) == {"d"}
    assert rows["a"]["caption"] is not None


def test_the_sound_track_is_transcribed(tmp_path: Path) -> None:
    report, rows, failures = run(tmp_path, save_whisper(tmp_path / "model"), task="transcribe")
    assert report.tally.outputs["transcript"] == 1
    assert rows["a"]["audio_seconds"] == pytest.approx(3.0, abs=0.1)
    assert rows["b"]["transcript"] is None
    assert [failures["d"][name] for name in ("modality", "outputs")] == ["audio", ["transcript"]]
