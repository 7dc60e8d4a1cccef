"""Averages of word vectors against sentence-transformers, and their files with arbitrary bytes."""

# ruff: noqa: RUF001

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_checks import load_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize import TreebankWordTokenizer
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

from mmbeam.errors import ModelError
from mmbeam.models.encoders.word_vectors import read_word_vectors, word_vector_width
from mmbeam.models.loading import digest
from mmbeam.models.placement import get_device
from mmbeam.stages.embed import embed_stage
from mmbeam.types import Batch, Sample, WorkUnit

WIDTH = 5
WORDS = ["the", "cat", "Cat", "dog", "sat", ",", "don't", "naïve", "дом", "家", "u.s.", "\u2028"]
TEXTS = [
    *(
        "the cat sat",
        "The CAT, sat; on the dog!",
        "",
        "unknown words only",
        "  the\tcat\n\nsat ",
        "don't 'don't' \"Cat\"",
    ),
    *("naïve NAÏVE дом Дом 家", "u.s. (u.s.) u.s", ", , .", "the " * 300),
]


def table(rows: int = len(WORDS)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)


def text_lines(words: Sequence[str] = WORDS) -> str:
    rows = table(len(words)).tolist()
    return "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in zip(words, rows, strict=True))


def save_glove(directory: Path) -> Path:
    (directory / "glove.6B.5d.txt").write_text(text_lines(), encoding="utf-8", newline="")
    return directory


def save_fasttext(directory: Path) -> Path:
    """With the header, a space at the end of each line, and CRLF line ends."""
    lines = f"{len(WORDS)} {WIDTH}\n{text_lines()}".replace("\n", " \r\n")
    (directory / "wiki.simple.vec").write_bytes(lines.encode())
    return directory


def save_safetensors(directory: Path) -> Path:
    save_file({"embedding.weight": torch.from_numpy(table())}, directory / "model.safetensors")
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8", newline="")
    return directory


FORMATS = {"glove": save_glove, "fasttext": save_fasttext, "safetensors": save_safetensors}


def reference(directory: Path) -> np.ndarray:
    """Return sentence-transformers' mean for the same file, without stop words."""
    path = save_glove(directory) / "glove.6B.5d.txt"
    words = WordEmbeddings.from_text_file(str(path), tokenizer=WhitespaceTokenizer(stop_words=()))
    model = SentenceTransformer(modules=[words, Pooling(WIDTH, "mean")], device="cpu")
    return model.encode(TEXTS, show_progress_bar=False)


@pytest.mark.parametrize("name", FORMATS)
def test_a_vector_equals_sentence_transformers(name: str, tmp_path: Path, device: torch.device) -> None:
    (tmp_path / "model").mkdir()
    encoder = load_encoder(FORMATS[name](tmp_path / "model"), device, torch.bfloat16)
    assert (encoder.spec.family, dict(encoder.spec.dims)) == ("word-vectors", {"text": WIDTH})
    ids = encoder.tokenize(TEXTS)
    together = encoder.encode_text(ids, tokens=True)
    assert np.abs(together.pooled.cpu().numpy() - reference(tmp_path)).max() < 1e-5
    assert ids[2] == ids[3] == []  # no known word
    assert together.tokens is not None
    for text_ids, vector, tokens in zip(ids, together.pooled, together.tokens, strict=True):
        assert torch.equal(tokens.cpu(), torch.from_numpy(table())[text_ids])
        assert torch.allclose(encoder.encode_text([text_ids]).pooled[0], vector, atol=1e-6)


def test_unknown_words_are_counted(tmp_path: Path) -> None:
    encoder = load_encoder(save_glove(tmp_path), torch.device("cpu"))
    assert encoder.count_tokens(TEXTS[:4]) == [3, 6, 0, 3]
    assert encoder.tokenize([]) == encoder.count_tokens([]) == []
    assert encoder.encode_text([[], []], tokens=True).pooled.shape == (2, WIDTH)


TREEBANK = [
    *("do", "n't", "ca", "wo", "'s", "'ll", "'ve", "we", "should", "can", "not", "gon", "na", "'t", "is"),
    *("cat", "a", "red", "green", "sierra", "beauty", "u.s.", "and/or", "well-known", "café", "o'clock", "5", "c++"),
]


def encoder_of(words: Sequence[str], directory: Path) -> Any:
    directory.mkdir(exist_ok=True)
    (directory / "vectors.txt").write_text(text_lines(words), encoding="utf-8", newline="")
    return load_encoder(directory, torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("“Sierra Beauty”", "sierra beauty"),
        ("cat’s", "cat 's"),
        ("CAT'S «cat» ¿cat? „cat“ …cat… ‘cat’ cat™ ✨cat✨ ❤️cat❤️ \ufeffcat\u200b", "cat 's" + " cat" * 9),
        ("cat—a a–cat cat--a cat…a", "cat a a cat cat a cat a"),
        ("red/green red&green red-green, (red/unknown)", "red green red green red green red"),
        ("and/or well-known o'clock o’clock U.S. c++ $5", "and/or well-known o'clock o'clock u.s. c++ 5"),
        ("don't Don’t DON'T can't won`t shouldn't've", "do n't do n't do n't ca n't wo n't should n't 've"),
        ("we'll cannot gonna 'tis 'TIS don't-cat", "we 'll can not gon na 't is 't is do n't cat"),
        ("“don’t”, (we’ll)", "do n't we 'll"),
        ("cafe\u0301", "café"),
        ("zzz zzz-zzz ... — 'zzz' " + "n't" * 1000, ""),
    ],
)
def test_an_unknown_word_is_split_as_the_table_was(text: str, words: str, tmp_path: Path) -> None:
    encoder = encoder_of(TREEBANK, tmp_path)
    assert [TREEBANK[row] for row in encoder.tokenize([text])[0]] == words.split()


def test_contractions_equal_nltks_treebank_tokenizer(tmp_path: Path) -> None:
    text = "don't can't won't he's I'm they'd we'll you're I've cannot gimme gonna gotta lemme more'n wanna"
    expected = TreebankWordTokenizer().tokenize(text)
    encoder = encoder_of(sorted({*expected, "'s"}), tmp_path)
    rows = {row: word for word, row in encoder.rows.items()}
    assert [rows[row] for row in encoder.tokenize([text])[0]] == expected


def test_a_table_without_contractions_is_split_at_apostrophes(tmp_path: Path) -> None:
    """As the text of fastText's vectors of Wikipedia was."""
    words = ["don", "t", "cat", "s", "l", "homme"]
    encoder = encoder_of(words, tmp_path)
    assert [words[row] for row in encoder.tokenize(["don't cat’s l’homme"])[0]] == words


def test_a_text_without_a_known_word_is_null_with_a_failure(tmp_path: Path) -> None:
    save_glove(tmp_path)
    texts = ["the cat", "unknown words", "", "sat"]
    samples = tuple(
        Sample(key=str(offset), shard="s", offset=offset, present=frozenset({"text"}), text=text)
        for offset, text in enumerate(texts)
    )
    stage = embed_stage(str(tmp_path))
    batch = Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=samples)
    result = get_device("cpu").run(stage, batch)
    assert [vector is None for vector in result.features["text_embedding"].to_pylist()] == [False, True, True, False]
    assert [(failure.offset, failure.step, failure.outputs) for failure in result.failures] == [
        (offset, "embed", ("text_embedding",)) for offset in (1, 2)
    ]
    assert "none of the text's words is in the table" in result.failures[0].message


def test_a_word_may_contain_spaces_and_the_first_of_a_repeated_word_is_used(tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_bytes(b"a 1 2\n. . . 3 4\n\na 5 6\nb\xff 7 8\nlast 9 1e-1")
    vectors = read_word_vectors(tmp_path)
    assert vectors.rows == {"a": 0, ". . .": 1, "b\ufffd": 3, "last": 4}
    assert vectors.table.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, np.float32(0.1)]]


def test_a_file_of_vectors_is_part_of_the_models_digest(tmp_path: Path) -> None:
    before = digest(save_fasttext(tmp_path))
    (tmp_path / "wiki.simple.vec").write_text("a 1 2 3 4 5\n")
    assert digest(tmp_path) != before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vectors.txt": b"a 1 2\nb 1\n"}, r"vectors.txt, line 2: expected a word and 2 numbers, found b'b 1'"),
        ({"vectors.txt": b"2 2\na 1 2\nb 1 x\n"}, r"line 3: expected a word and 2 numbers, found b'b 1 x'"),
        ({"vectors.txt": b"a 1 2\nb 1 nan\n"}, "row 2 has a number that is not finite"),
        ({"vectors.txt": b"1 " + b"9" * 5000 + b"\n"}, "row 1 has a number that is not finite"),
        ({"vectors.txt": b"a 1e39 1\n"}, "row 1 has a number that is not finite"),
        ({"vectors.txt": b""}, "expected lines of a word and its numbers"),
        ({"vectors.txt": b"3 300\n"}, "expected words and their vectors, found none"),
        ({"vectors.txt": b"a 1\n" + b"b" * (1 << 20)}, "line 2: longer than 1,048,576 bytes"),
        ({"a.vec": b"a 1\n", "glove.txt": b"a 1\n"}, "expected one file of word vectors, found a.vec, glove.txt"),
        ({"model.safetensors": b"x" * 20, "vocab.txt": b"a\n"}, "cannot be read as safetensors"),
        ({"vocab.txt": b"a\n"}, r"expected config.json .* or word vectors .* found neither"),
    ],
)
def test_an_invalid_file_is_an_error_that_names_the_line(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_encoder(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2, 3)}, "expected 2 words, one per line, found 12"),
        ({"a": torch.zeros(12, 3), "b": torch.zeros(12, 3)}, "expected one table"),
        ({"a": torch.zeros(12)}, "expected one table"),
    ],
)
def test_a_table_that_does_not_fit_its_words_is_an_error(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file(tensors, save_safetensors(tmp_path) / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_encoder(tmp_path, torch.device("cpu"))


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=200) | st.text("a1 .-e\n\r\t", max_size=200).map(str.encode))
def test_any_bytes_are_vectors_or_a_model_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "any"
    directory.mkdir(exist_ok=True)
    (directory / "vectors.txt").write_bytes(content)
    try:
        vectors = read_word_vectors(directory)
    except ModelError:
        return
    assert vectors.rows
    assert max(vectors.rows.values()) < len(vectors.table)
    assert np.isfinite(vectors.table).all()
    assert vectors.table.shape[1] == word_vector_width(directory)
