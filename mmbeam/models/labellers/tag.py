"""Taggers: the entities or parts of speech of a text, with character offsets.

Adjacent tokens of one tag are one entity, and B- begins a new one, as in transformers' aggregation_strategy "simple".
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbeam.config import Labelling
from mmbeam.models.labellers.base import Labeller, LabellerSpec, Record, class_names, finite_or_error, load_model
from mmbeam.models.labellers.classify import alike
from mmbeam.models.tokenizing import TextTokenizer, Tokens, pad, text_limit, vocabulary_size
from mmbeam.names import Modality
from mmbeam.ops.transfer import to_host, upload_ids
from mmbeam.types import Sample

OUTSIDE = "O"  # the label of a token that is in no entity


class Tagger(Labeller):
    """BERT, RoBERTa, DistilBERT, DeBERTa and every other class of AutoModelForTokenClassification."""

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.tokenizer = TextTokenizer(Path(spec.directory))
        self.vocabulary = vocabulary_size(model)

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the tokenizer's files."""
        TextTokenizer(directory).check_offsets(directory)
        return LabellerSpec(
            family=config.model_type,
            directory=str(directory),
            labelling=labelling,
            modalities=("text",),
            classes=class_names(directory, config, labelling),
            max_text_tokens=text_limit(directory, config.get_text_config()),
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "Tagger":
        """Load tokenizer and weights."""
        return cls(spec, load_model(spec, device, dtype))

    def items(self, modality: Modality, samples: Sequence[Sample]) -> list[Any]:
        """Return the tokens of each text with their places, truncated to the model's limit."""
        assert self.spec.max_text_tokens is not None
        texts = [sample.model_text or "" for sample in samples]
        return list(self.tokenizer.encode_with_offsets(texts, self.spec.max_text_tokens))

    def weight(self, modality: Modality, item: Tokens) -> int:
        """Return the number of tokens."""
        return len(item.ids)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        return self.tokenizer.count(texts)

    def prepare(self, modality: Modality, items: Sequence[Tokens]) -> Any:
        """Return the tokens, and their ids on the device."""
        ids = [item.ids for item in items]
        return items, (ids if self.device.type == "cpu" else upload_ids(ids, self.device))

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> Any:
        """Return the tokens, and the best label of each with its score."""
        items, all_ids = inputs
        parts = []
        for positions in alike(all_ids, self.model.config):
            ids = all_ids if len(positions) == len(all_ids) else [all_ids[position] for position in positions]
            ids_BL, mask_BL = pad(ids, self.tokenizer.pad_id, self.device, vocabulary=self.vocabulary)
            logits_BLC = self.model(input_ids=ids_BL, attention_mask=mask_BL).logits.float()
            scores_BL, labels_BL = logits_BLC.softmax(-1).max(-1)
            parts.append((positions, to_host(scores_BL), to_host(labels_BL)))
        return items, parts

    def split(self, modality: Modality, computed: Any, samples: Sequence[Sample]) -> list[Any]:
        """Return the tags of each text."""
        items, parts = computed
        tags: dict[int, Any] = {}
        for positions, scores_BL, labels_BL in parts:
            for position, scores, labels in zip(positions, scores_BL.numpy(), labels_BL.tolist(), strict=True):
                tokens, text = items[position], samples[position].model_text or ""
                scores = scores[: len(tokens.ids)]
                error = finite_or_error(None, scores)
                tags[position] = error or list(self._tags(tokens, scores, labels[: len(tokens.ids)], text))
        return [tags[position] for position in range(len(samples))]

    def _tags(self, tokens: Tokens, scores: np.ndarray[Any, Any], labels: Sequence[int], text: str) -> Iterator[Record]:
        groups: list[tuple[str, list[int]]] = []  # tag, tokens
        for index, (offset, label) in enumerate(zip(tokens.offsets, labels, strict=True)):
            if offset is None:  # a special token
                continue
            name = self.spec.classes[label]
            tag = name[2:] if name[:2] in ("B-", "I-") else name
            if groups and groups[-1][0] == tag and not name.startswith("B-"):
                groups[-1][1].append(index)
            else:
                groups.append((tag, [index]))
        for tag, indices in groups:
            first, last = tokens.offsets[indices[0]], tokens.offsets[indices[-1]]
            assert first is not None
            assert last is not None
            score = float(np.mean(scores[indices]))
            if tag != OUTSIDE and score >= (self.spec.labelling.threshold or 0.0):
                start, end = first[0], last[1]
                yield {"label": tag, "score": score, "start": start, "end": end, "text": text[start:end]}

    def finish(self, values: Sequence[list[Record]]) -> list[Record]:
        """Return the `top_k` tags of the highest score, in the order of the text."""
        [tags] = values
        best = sorted(range(len(tags)), key=lambda index: -tags[index]["score"])[: self.spec.labelling.top_k]
        return [tags[index] for index in sorted(best)]
