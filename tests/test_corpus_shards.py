"""The procedural corpus as shards: read by webdataset and tarfile, decoded by Pillow and soundfile."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmbeam.corpus.render import render_audio, render_image
from mmbeam.corpus.scene import Scene, generate_scenes, tag
from mmbeam.corpus.write import write_corpus
from mmbeam.errors import UsageError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_corpus(tmp_path_factory.mktemp("100% corpus"), samples=13, shards=4, seed=3, image_side=96)


def test_shards_are_complete_tars(corpus: list[Path]) -> None:
    assert [path.name for path in corpus] == [f"corpus-{shard:05d}.tar" for shard in range(4)]
    counts = []
    for path in corpus:
        with tarfile.open(path) as tar:
            keys = [member.name.split(".")[0] for member in tar]
        counts.append(len(keys))
        assert all(keys.count(key) == 4 for key in keys)
    assert counts == [12, 12, 12, 16]


def test_webdataset_reads_the_written_shards(corpus: list[Path]) -> None:
    samples = []
    for path in corpus:
        with path.open("rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}]))
    assert [sample["__key__"] for sample in samples] == [f"3-{index:06d}" for index in range(13)]
    for scene, sample in zip(generate_scenes(3), samples, strict=False):
        assert sample["txt"].decode() == tag(scene)
        truth = json.loads(sample["json"])
        assert truth["caption"] == scene.caption()
        assert truth["clauses"] == scene.clauses()
        assert [shape["form"] for shape in truth["shapes"]] == [shape.form for shape in scene.shapes]
        assert truth["license"] == "CC0-1.0"


def test_codecs_keep_image_and_audio(corpus: list[Path]) -> None:
    seen = set()
    for path in corpus:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, codec = member.name.partition(".")
                scene, data = Scene.draw(3, int(key.split("-")[1])), tar.extractfile(member)
                assert data is not None
                seen.add(codec)
                _check_media(scene, codec, data.read())
    assert seen == {"jpg", "png", "webp", "wav", "flac", "ogg", "mp3", "txt", "json"}


def _check_media(scene: Scene, codec: str, data: bytes) -> None:
    if codec in ("jpg", "png", "webp"):
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(image.astype(float) - render_image(scene, 96)).mean() < (0.1 if codec == "png" else 6)
    if codec in ("wav", "flac", "ogg", "mp3"):
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        truth = render_audio(scene, 16000)
        assert rate == 16000
        assert len(wave) == pytest.approx(16000, abs=1200)
        assert np.sqrt(np.square(wave).mean()) == pytest.approx(np.sqrt(np.square(truth).mean()), rel=0.1)


def test_ranges_of_a_corpus_can_be_joined(tmp_path: Path) -> None:
    (path,) = write_corpus(tmp_path, samples=2, shards=1, seed=3, start=12, image_side=32)
    with tarfile.open(path) as tar:
        assert {name.split(".")[0] for name in tar.getnames()} == {"3-000012", "3-000013"}


def test_a_shard_without_samples_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 to 3 shards"):
        write_corpus(tmp_path, samples=3, shards=4)


def test_rendering_needs_no_torch() -> None:
    code = "import sys, mmbeam.corpus; sys.exit(bool({'torch', 'apache_beam', 'webdataset'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
