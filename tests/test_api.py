"""`import mmbeam`: models and rows without a pipeline, equal to what a job writes."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import shards
from PIL import Image
from tiny_clip import save_clip

import mmbeam
from mmbeam.config import ModelRef
from mmbeam.corpus.scene import Scene
from mmbeam.corpus.write import members
from mmbeam.errors import JobError, SampleError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.names import EXTENSIONS

COUNT = 5


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[shards.Truth]]:
    root = tmp_path_factory.mktemp("embedded")
    truths = shards.make_truths(COUNT)
    shards.make_webdataset(root / "in", truths, shards=1)
    model = ModelRef(model=str(save_clip(root / "clip")))
    embed(EmbedOptions(input=(str(root / "in"),), output=str(root / "out"), models=(model,), device="cpu"))
    return root, truths


def image_of(truth: shards.Truth) -> bytes:
    return next(data for name, data in truth.members.items() if name in EXTENSIONS["image"])


def test_an_encoder_gives_the_vectors_of_a_job(embedded: tuple[Path, list[shards.Truth]], tmp_path: Path) -> None:
    root, truths = embedded
    table = mmbeam.read_rows(root / "out")
    encoder = mmbeam.load_encoder(str(root / "clip"), device="cpu")
    files = [tmp_path / f"{number}" for number in range(COUNT)]
    for file, truth in zip(files, truths, strict=True):
        file.write_bytes(image_of(truth))
    vectors = encoder.encode(images=files, texts=[truth.text for truth in truths])
    assert list(vectors) == ["image", "text"]
    for modality in ("image", "text"):
        expected = np.stack(table[f"{modality}_embedding"].to_numpy())
        assert vectors[modality].dtype == np.float32
        np.testing.assert_allclose(vectors[modality], expected, atol=1e-5)
    by_bytes = encoder.encode(images=[image_of(truth) for truth in truths])["image"]
    np.testing.assert_allclose(by_bytes, vectors["image"], atol=1e-6)
    assert encoder.encode(texts=[])["text"].shape == (0, encoder.dims["text"])


def test_images_are_also_taken_as_pixels(embedded: tuple[Path, list[shards.Truth]]) -> None:
    encoder = mmbeam.load_encoder(str(embedded[0] / "clip"), device="cpu", modalities=("image",))
    pixels = shards.natural_image(1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    vectors = encoder.encode(images=[pixels, Image.fromarray(pixels), stream.getvalue()])["image"]
    np.testing.assert_allclose(vectors[1:], np.broadcast_to(vectors[0], (2, vectors.shape[1])), atol=1e-6)
    with pytest.raises(UsageError, match=r"images\[0\]: expected uint8 \[height, width, 3\]"):
        encoder.encode(images=[pixels[..., 0]])
    with pytest.raises(SampleError, match=r"images\[1\]: "):
        encoder.encode(images=[pixels, b"not an image"])
    with pytest.raises(UsageError, match=r"`texts`: .* encodes image only"):
        encoder.encode(texts=["a"])


def test_the_shipped_generator_captions_scenes_from_all_their_media() -> None:
    samples = [members(Scene.draw(3, number), 256, 16000) for number in range(3)]
    media = [
        {kind: next(data for name, data in sample.items() if name in EXTENSIONS[kind]) for kind in ("image", "audio")}
        for sample in samples
    ]
    generator = mmbeam.load_generator(device="cpu")
    captions = generator.generate(
        images=[sample["image"] for sample in media], audio=[sample["audio"] for sample in media]
    )
    assert len(captions) == 3
    assert all(caption and caption.endswith(".") for caption in captions)
    assert generator.generate(images=[None, media[0]["image"]])[0] is None


def test_rows_are_those_of_the_output(embedded: tuple[Path, list[shards.Truth]], tmp_path: Path) -> None:
    out = embedded[0] / "out"
    assert mmbeam.read_rows(out).equals(ds.dataset(out / "data").to_table())
    assert mmbeam.read_rows(str(out), ["key"]).column_names == ["key"]
    with pytest.raises(UsageError, match="`columns` nothing: the rows have key"):
        mmbeam.read_rows(out, ["nothing"])
    with pytest.raises(JobError, match="not the output of an mmbeam job"):
        mmbeam.read_rows(tmp_path)


def test_every_public_name_is_there_and_importing_the_package_is_fast() -> None:
    assert sorted(mmbeam.__all__) == mmbeam.__all__ == dir(mmbeam)
    assert all(getattr(mmbeam, name) is not None for name in mmbeam.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mmbeam.nothing  # noqa: B018
    code = "import sys, mmbeam; assert not {'torch', 'apache_beam', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
