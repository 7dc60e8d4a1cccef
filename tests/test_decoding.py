"""Decoding with real tiny models of transformers, encoder-decoders and decoders, compared with the models."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mmbeam.models.generators.decoding import GeneratedTokens, decode, score
from mmbeam.models.tokenizing import pad
from mmbeam.prompts.ask import Decoding

VOCABULARY, PAD, EOS = 24, 0, 1
PROMPTS: tuple[tuple[int, ...], ...] = ((5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (15, 16), (5, 6), (20,))
NEW = 12
CPU = torch.device("cpu")
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}


def _bart() -> Any:
    size = {f"{half}_{kind}": 2 for half in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
    size |= {f"{half}_ffn_dim": 32 for half in ("encoder", "decoder")}
    # It must begin with token 2 and never repeat two tokens, for which `generate` changes the logits.
    config = BartConfig(d_model=16, max_position_embeddings=64, decoder_start_token_id=EOS, **size, **TOKENS)
    model = BartForConditionalGeneration(config)
    model.generation_config.update(forced_bos_token_id=2, no_repeat_ngram_size=2)
    return model


def _t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=PAD, **TOKENS)
    )


def _llama() -> Any:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **size, **TOKENS))


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, **TOKENS))


MAKERS: dict[str, Callable[[], Any]] = {"bart": _bart, "t5": _t5, "llama": _llama, "gpt2": _gpt2}
SEQ2SEQ = {"bart", "t5"}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return make(name)


def make(name: str) -> Any:
    """A model with large random weights, so that its texts vary in content and length."""
    torch.manual_seed(3)
    model = MAKERS[name]().eval()
    for value in model.parameters():
        if value.dim() > 1:
            torch.nn.init.normal_(value.data, std=2.0 * value[0].numel() ** -0.5)
    return model


def inputs_of(name: str, prompts: Sequence[Sequence[int]], length: int | None = None) -> dict[str, torch.Tensor]:
    ids, mask = pad(prompts, PAD, CPU, length, side="right" if name in SEQ2SEQ else "left")
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def reference(model: Any, name: str, prompt: Sequence[int], row: GeneratedTokens) -> float:
    """The log-probability of a text, with one forward pass per token and no padding."""
    total = 0.0
    for position, token in enumerate(row.token_ids):
        before = torch.tensor([row.token_ids[:position]], dtype=torch.int64)
        prompt_ids = torch.tensor([prompt])
        if name in SEQ2SEQ:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            logits = model(input_ids=prompt_ids, decoder_input_ids=torch.cat([start, before], 1)).logits
        else:
            logits = model(input_ids=torch.cat([prompt_ids, before], 1)).logits
        total += float(logits[0, -1].log_softmax(-1)[token])
    return total


DECODINGS = {
    "greedy": Decoding(max_new_tokens=NEW),
    "beams": Decoding(max_new_tokens=NEW, num_beams=3),
    "sampling": Decoding(max_new_tokens=NEW, temperature=0.9, top_p=0.9),
}


@pytest.mark.parametrize("method", sorted(DECODINGS))
def test_a_batch_equals_single_prompts_in_any_order(model: Any, name: str, method: str) -> None:
    decoding, seeds = DECODINGS[method], [2**64 - 1 - number for number in range(len(PROMPTS))]
    together = decode(model, inputs_of(name, PROMPTS), decoding, seeds)
    backwards = decode(model, inputs_of(name, PROMPTS[::-1], length=9), decoding, seeds[::-1])[::-1]
    alone = [decode(model, inputs_of(name, [p]), decoding, [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    for others in (backwards, alone):
        assert [row.token_ids for row in others] == [row.token_ids for row in together]
        assert [row.logprob for row in others] == pytest.approx([row.logprob for row in together], abs=1e-4)
    assert len({row.token_ids for row in together}) > 2


@pytest.mark.parametrize("method", sorted(DECODINGS))
def test_the_log_probability_is_that_of_the_model(model: Any, name: str, method: str) -> None:
    """Temperature, top-p, a forced first token and forbidden repetitions do not change it."""
    rows = decode(model, inputs_of(name, PROMPTS), DECODINGS[method], range(len(PROMPTS)))
    expected = [reference(model, name, prompt, row) for prompt, row in zip(PROMPTS, rows, strict=True)]
    assert [row.logprob for row in rows] == pytest.approx(expected, abs=1e-4)
    ids = [row.token_ids for row in rows]
    assert score(model, inputs_of(name, PROMPTS), ids) == pytest.approx(expected, abs=1e-4)


def test_tokens_end_at_the_end_of_text(model: Any, name: str) -> None:
    decoding = Decoding(max_new_tokens=NEW, temperature=4.0)
    rows = decode(model, inputs_of(name, PROMPTS * 8), decoding, range(8 * len(PROMPTS)))
    for row in rows:
        assert EOS not in row.token_ids[:-1]
        assert row.num_tokens == len(row.token_ids) - (row.token_ids[-1] == EOS)
        assert row.token_ids[-1] == EOS or len(row.token_ids) == NEW
    assert len({row.num_tokens for row in rows}) > 2


@pytest.mark.parametrize("beams", [1, 4])
def test_greedy_decoding_and_beam_search_equal_generate(model: Any, name: str, beams: int) -> None:
    for prompt in PROMPTS:
        inputs = inputs_of(name, [prompt])
        with torch.inference_mode():
            [expected] = model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=NEW).tolist()
        [row] = decode(model, inputs, Decoding(max_new_tokens=NEW, num_beams=beams), [0])
        assert expected[1 if name in SEQ2SEQ else len(prompt) :][: len(row.token_ids)] == list(row.token_ids)


@pytest.mark.parametrize("method", sorted(DECODINGS))
def test_embeddings_equal_tokens(method: str) -> None:
    model = make("llama")
    inputs = inputs_of("llama", PROMPTS)
    embedded = {"inputs_embeds": model.model.embed_tokens(inputs["input_ids"])} | {
        "attention_mask": inputs["attention_mask"]
    }
    seeds = range(len(PROMPTS))
    by_token, by_vector = (decode(model, prompts, DECODINGS[method], seeds) for prompts in (inputs, embedded))
    assert [row.token_ids for row in by_token] == [row.token_ids for row in by_vector]
    assert [row.logprob for row in by_token] == pytest.approx([row.logprob for row in by_vector], abs=1e-4)


def test_an_encoder_decoder_continues_decoder_tokens() -> None:
    """Whisper's task and language are forced tokens, which are not part of the generated text."""
    model = make("t5")
    inputs = inputs_of("t5", PROMPTS) | {"decoder_input_ids": torch.tensor([[PAD, 7, 8]] * len(PROMPTS))}
    for method in ("greedy", "beams"):
        rows = decode(model, inputs, DECODINGS[method], range(len(PROMPTS)))
        assert score(model, inputs, [row.token_ids for row in rows]) == pytest.approx(
            [row.logprob for row in rows], abs=1e-4
        )
        assert rows != decode(model, inputs_of("t5", PROMPTS), DECODINGS[method], range(len(PROMPTS)))


@pytest.mark.parametrize("method", sorted(DECODINGS))
def test_encoder_outputs_replace_the_input(method: str) -> None:
    model, inputs, seeds = make("bart"), inputs_of("bart", PROMPTS), range(len(PROMPTS))
    with torch.inference_mode():
        memory = {"encoder_outputs": model.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
    for _ in range(2):  # it is not modified
        assert decode(model, memory, DECODINGS[method], seeds) == decode(model, inputs, DECODINGS[method], seeds)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 1.0), (1.0, 0.6)])
def test_sampling_follows_the_models_distribution(temperature: float, top_p: float) -> None:
    """Chi-square over the first token of 4,000 streams; its 99.9 % point for 23 degrees of freedom is 49.7."""
    model, count = make("gpt2"), 4000
    inputs = inputs_of("gpt2", [PROMPTS[0]] * count)
    decoding = Decoding(max_new_tokens=1, temperature=temperature, top_p=top_p)
    counts = Counter(row.token_ids[0] for row in decode(model, inputs, decoding, range(count)))
    with torch.inference_mode():
        expected = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1).double()
    nucleus = expected.sort(descending=True)
    kept = nucleus.indices[(nucleus.values.cumsum(0) - nucleus.values) < top_p]
    assert set(counts) <= set(kept.tolist())
    probabilities = {token: float(expected[token] / expected[kept].sum()) for token in kept.tolist()}
    assert sum((counts[token] - count * p) ** 2 / (count * p) for token, p in probabilities.items()) < 49.7


def test_each_step_has_its_own_random_number() -> None:
    """Two tokens of a stream are independent: given the first, the second follows the model's distribution."""
    model, count = make("gpt2"), 4000
    rows = decode(
        model,
        inputs_of("gpt2", [PROMPTS[0]] * count),
        Decoding(max_new_tokens=2, temperature=1.0),
        range(10_000, 10_000 + count),
    )
    first = Counter(row.token_ids[0] for row in rows if row.token_ids[0] != EOS).most_common(1)[0][0]
    seconds = [row.token_ids[1] for row in rows if row.token_ids[0] == first]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[*PROMPTS[0], first]])).logits[0, -1].softmax(-1).tolist()
    counts = Counter(seconds)
    chi = sum((counts[token] - len(seconds) * p) ** 2 / (len(seconds) * p) for token, p in enumerate(expected))
    assert chi < 49.7


def test_nan_logits_give_nan_log_probabilities() -> None:
    model = make("gpt2")
    model.lm_head.weight.data[3] = math.nan
    for method in DECODINGS:
        rows = decode(model, inputs_of("gpt2", PROMPTS), DECODINGS[method], range(len(PROMPTS)))
        assert all(math.isnan(row.logprob) for row in rows)
