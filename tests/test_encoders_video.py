"""Videos through encoders: frame by frame, and by models that read the frames together, against transformers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tars
import torch
from encoder_checks import load_encoder
from outputs import is_conserved, read_failures, read_rows
from tiny_clip import DIM, SIDE, TOWER, save_random
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    TimesformerConfig,
    TimesformerModel,
    TimesformerVideoProcessor,
    VideoMAEConfig,
    VideoMAEModel,
    VideoMAEVideoProcessor,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
    XCLIPConfig,
    XCLIPModel,
)
from videos import video

from mmbeam.config import Limits, ModelRef, Reading, Windows
from mmbeam.decode.video import decode_video
from mmbeam.errors import MissingModalityError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.models.encoders import describe
from mmbeam.types import RunReport, Video

SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
FRAMES = 4


def save_video_encoder(family: str, directory: Path, clip: Path) -> Path:
    """Write a tiny video encoder that takes 4 frames of 48 x 48 pixels."""
    sizes = {**TOWER, "image_size": SIDE, "patch_size": 16, "num_frames": FRAMES}
    match family:
        case "videomae":
            save_random(VideoMAEModel, VideoMAEConfig(**sizes, tubelet_size=2), directory)
            VideoMAEVideoProcessor(**SQUARE).save_pretrained(directory)
        case "timesformer":
            save_random(TimesformerModel, TimesformerConfig(**sizes), directory)
            TimesformerVideoProcessor(**SQUARE).save_pretrained(directory)
        case "vjepa2":
            config = VJEPA2Config(
                **{**TOWER, "mlp_ratio": 2},
                patch_size=16,
                crop_size=SIDE,
                frames_per_clip=FRAMES,
                pred_hidden_size=32,
                pred_num_attention_heads=4,
                pred_num_hidden_layers=1,
            )
            save_random(VJEPA2Model, config, directory)
            VJEPA2VideoProcessor(crop_size=SIDE).save_pretrained(directory)
        case "xclip":
            tokenizer = AutoTokenizer.from_pretrained(clip)
            text = {**TOWER, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
            vision = {**sizes, "mit_hidden_size": DIM, "mit_intermediate_size": 48, "mit_num_hidden_layers": 1}
            vision["mit_num_attention_heads"] = 4
            config = XCLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
            save_random(XCLIPModel, config, directory)
            CLIPImageProcessorPil(**SQUARE).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("video-encoders")
    return {family: save_video_encoder(family, root / family, clip) for family in MODELS}


MODELS = {"videomae": VideoMAEModel, "timesformer": TimesformerModel, "vjepa2": VJEPA2Model, "xclip": XCLIPModel}


def clips() -> list[Video]:
    made = (video(first_red=first, size=size) for first, size in ((0, (64, 48)), (90, (48, 80)), (200, (96, 64))))
    return [decode_video(data, Limits(), FRAMES) for data in made]


@torch.inference_mode()
def reference(family: str, directory: Path, frames: Any) -> torch.Tensor:
    """Return a video's vector by transformers' own processor and model."""
    model = MODELS[family].from_pretrained(directory).eval()
    if family == "xclip":
        pixels = CLIPImageProcessorPil.from_pretrained(directory)(list(frames), return_tensors="pt")["pixel_values"]
        return model.get_video_features(pixels[None]).pooler_output[0]
    kinds = {"videomae": VideoMAEVideoProcessor, "timesformer": TimesformerVideoProcessor}
    processor = kinds.get(family, VJEPA2VideoProcessor).from_pretrained(directory)
    inputs = processor([np.stack(frames)], return_tensors="pt", do_sample_frames=False)
    hidden = model(**inputs).last_hidden_state[0]
    return hidden[0] if family == "timesformer" else hidden.mean(0)


@pytest.mark.parametrize("family", MODELS)
def test_vectors_equal_the_reference(family: str, encoders: Mapping[str, Path]) -> None:
    directory, cpu = encoders[family], torch.device("cpu")
    spec = describe(directory)
    assert (spec.family, spec.frames) == (family, FRAMES)
    encoder = load_encoder(directory, cpu)
    videos = [clip.frames for clip in clips()]
    encoded = encoder.encode_video(encoder.prepare("video", videos), tokens=True)
    assert encoded.tokens is not None
    assert encoded.pooled.shape == (3, spec.dims["video"])
    assert {tokens.shape[-1] for tokens in encoded.tokens} == {spec.token_dims["video"]}
    for index, frames in enumerate(videos):
        expected = reference(family, directory, frames)
        tolerance = 5e-3 if family == "xclip" else 1e-5  # pixels of the kernels and of Pillow differ by one level
        torch.testing.assert_close(encoded.pooled[index], expected, atol=tolerance, rtol=1e-3)
        alone = encoder.encode_video(encoder.prepare("video", [frames])).pooled[0]
        torch.testing.assert_close(alone, encoded.pooled[index], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(encoded.pooled[0], encoded.pooled[1], atol=0.01)


def run(tmp_path: Path, model: Path, **changes: Any) -> RunReport:
    options = EmbedOptions(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        models=(ModelRef(model=str(model)),),
        device="cpu",
        batch_size=16,
        windows=Windows(samples=3),
        max_failure_rate=1.0,
    )
    return embed(replace(options, **changes))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write a tar of videos and other samples, some of them damaged."""
    members = [
        ("a.mp4", video(sound="aac")),
        ("a.txt", b"a red film"),
        ("b.webm", video("webm", "libvpx")),
        ("c.txt", b"no film"),
        ("d.mp4", video()[:-50]),
        ("d.txt", b"a film that breaks off"),
        ("e.mov", video("mov", size=(48, 80))),
        ("f.mp4", video(count=0, sound="aac", seconds=0.5)),
        ("g.xyz", b"?"),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "v.tar").write_bytes(tars.write(members))
    return tmp_path


def test_an_image_encoder_embeds_the_frames(corpus: Path, clip: Path) -> None:
    report = run(corpus, clip, tokens=True, reading=Reading(frames=3))
    assert is_conserved(report)
    rows = {row["key"]: row for row in read_rows(corpus / "out")}
    assert dict(report.tally.outputs) == {"image_embedding": 0, "text_embedding": 3, "video_embedding": 3}
    assert report.tally.present["video"] == 5
    assert report.tally.members == {".xyz": 1}
    assert {key for key in rows if rows[key]["video_embedding"]} == {"a", "b", "e"}
    assert rows["d"]["errors"] == ["video_embedding"]
    assert rows["a"]["video_seconds"] == pytest.approx(3.0)
    failures = {record["key"]: record for record in read_failures(corpus / "out")}
    assert {key: (record["modality"], record["step"]) for key, record in failures.items()} == {
        "d": ("video", "decode"),
        "f": ("video", "decode"),
    }
    assert "without a video stream" in failures["f"]["message"]
    encoder = load_encoder(clip, torch.device("cpu"))
    frames = decode_video(video(sound="aac"), Limits(), 3).frames
    vectors = torch.nn.functional.normalize(encoder.encode_image(frames).pooled, dim=-1)
    np.testing.assert_allclose(np.array(rows["a"]["video_tokens"]), vectors, atol=1e-5)
    mean = torch.nn.functional.normalize(vectors.mean(0), dim=-1)
    np.testing.assert_allclose(np.array(rows["a"]["video_embedding"]), mean, atol=1e-5)
    with pytest.raises(Exception, match="frames"):
        run(corpus, clip, tokens=True, reading=Reading(frames=4))
    assert run(corpus, clip, tokens=True, reading=Reading(frames=3)).units_kept == 1


def test_a_video_encoder_takes_its_frames(corpus: Path, encoders: Mapping[str, Path]) -> None:
    report = run(corpus, encoders["videomae"], reading=Reading(frames=FRAMES))
    assert dict(report.tally.outputs) == {"video_embedding": 3}
    rows = {row["key"]: row for row in read_rows(corpus / "out")}
    expected = reference("videomae", encoders["videomae"], decode_video(video(sound="aac"), Limits(), FRAMES).frames)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    np.testing.assert_allclose(np.array(rows["a"]["video_embedding"]), expected, atol=1e-5)
    for reading in (Reading(frames=8), Reading(fps=2.0)):
        with pytest.raises(UsageError, match="takes 4 frames"):
            run(corpus, encoders["videomae"], reading=reading)


def test_the_sound_track_is_embedded(corpus: Path, clap: Path) -> None:
    report = run(corpus, clap)
    assert dict(report.tally.outputs) == {"audio_embedding": 2, "text_embedding": 3}
    assert (report.tally.present["audio"], report.tally.rows + report.tally.failed) == (3, 7)
    assert {record["key"] for record in read_failures(corpus / "out")} == {"d"}


def test_a_corpus_without_videos_is_an_error_if_they_are_asked_for(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.tar").write_bytes(tars.write([("a.txt", b"text")]))
    with pytest.raises(MissingModalityError, match="expected video"):
        run(tmp_path, clip, modalities=("video",))
    assert dict(run(tmp_path, clip).tally.outputs) == {"image_embedding": 0, "text_embedding": 1}
