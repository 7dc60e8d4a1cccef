"""The example in docs/families.md: the file is written to a copy of the package and serves real models."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import shards
import tiny_generators_hub as hub
import torch
from tiny_audio_text import TOWER
from tiny_models import SQUARE
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import mmbeam
from mmbeam.config import Limits
from mmbeam.decode.image import decode_image
from mmbeam.errors import ModelError
from mmbeam.models.generators import describe, family_of

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
SAMPLES = 6
ASKED = "what is it"
CHECK = """
import sys
from pathlib import Path
import tiny_generators_hub as hub
from pictures import pictures
from mmbeam.cli import main
from mmbeam.prompts.ask import Request
images = [image.copy() for image in pictures(((48, 48), (97, 120), (60, 41)))]
requests = [Request(image=image, text=text) for image, text in zip(images, ("what is it", "a", "two cats"))]
requests += [Request(image=images[1]), Request(text="say a word"), Request(text="x")]
model = hub.load_tiny(Path(sys.argv[1]))
hub.check_scores(model, requests, hub.check_batches(model, requests))
hub.check_batches(model, requests, num_beams=2)
words = model.encode_prompt(Request(image=images[0], text="a<image>b"))
assert words.count(model.model.config.image_token_id) == model.tokens
sys.exit(main(sys.argv[2:]))
"""  # the checks of every family, then a command


def save_llava(directory: Path) -> Path:
    """Save a LLaVA of 48 x 48 pixels, 36 tokens an image."""
    tokenizer = hub.chat_tokenizer(image="<image>", image_token="<image>")
    sizes = TOWER | {"num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, **hub.ids_of(tokenizer)).to_dict(),
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 48, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor: Any = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=SQUARE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return hub.save(LlavaForConditionalGeneration, config, directory, processor)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the example's file."""
    root = tmp_path_factory.mktemp("tree")
    package = Path(mmbeam.__file__).parent
    shutil.copytree(package, root / "mmbeam", ignore=shutil.ignore_patterns("__pycache__"))
    [(path, code)] = re.findall(r"`(mmbeam/models/generators/\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert not (root / path).exists()
    (root / path).write_text(code)
    return root


def test_without_the_file_the_checkpoint_runs_by_its_own_processor(llava: Path) -> None:
    assert describe(llava).notes == (
        "llava has no family of its own: it runs by LlavaForConditionalGeneration with the checkpoint's own "
        "LlavaProcessor, slower than a family",
    )


def test_the_error_for_a_type_that_transformers_lacks_explains_how_to_add_the_family() -> None:
    with pytest.raises(ModelError, match=r"unsupported model_type 'llawa' with architecture 'X'") as caught:
        family_of("llawa", "X")
    message = str(caught.value)
    assert "one file, mmbeam/models/generators/<model_type>.py: a subclass of" in message
    assert "docs/families.md" in message


@pytest.mark.parametrize("model_type", ["base", "vllm", "media", "os", "..errors", "a/b", "a.b", "__init__", ""])
def test_a_type_named_like_another_module_has_no_family(model_type: str) -> None:
    with pytest.raises(ModelError, match="unsupported model_type"):
        family_of(model_type)


def test_with_the_file_a_job_equals_the_models_own_processor_and_generate(
    llava: Path, tree: Path, tmp_path: Path
) -> None:
    """Run in a process that imports the copy, after the checks of every family."""
    truths = [shards.make_truth(index, image="jpg", audio="wav") for index in range(SAMPLES)]
    shards.make_webdataset(tmp_path / "in", truths, shards=1)
    job = ["caption", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(llava)]
    options = ["--device", "cpu", "--prompt", ASKED, "--max-new-tokens", str(hub.NEW)]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(llava), *job, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(Path(__file__).parent)])},
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = ds.dataset(tmp_path / "out" / "data").to_table().to_pylist()
    reference: Any = LlavaForConditionalGeneration.from_pretrained(llava)
    processor: Any = LlavaProcessor.from_pretrained(llava)
    images = [decode_image(truth.members["jpg"], Limits())[0] for truth in truths]
    expected = [reference_text(reference, processor, image) for image in images]
    assert [row["caption"] for row in rows] == expected


@torch.inference_mode()
def reference_text(reference: Any, processor: Any, image: np.ndarray[Any, Any]) -> str:
    content = [{"type": "image"}, {"type": "text", "text": ASKED}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    ids = reference.generate(**inputs, do_sample=False, max_new_tokens=hub.NEW)[0]
    return str(processor.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_the_file_passes_the_linter(tree: Path) -> None:
    file = tree / "mmbeam" / "models" / "generators" / "llava.py"
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "120", str(file)])
    assert done.returncode == 0
