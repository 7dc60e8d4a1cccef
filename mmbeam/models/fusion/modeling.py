"""The fusion model: from any sources to a shared embedding space, to fused tokens, and from these to text.

Shapes: B batch, T tokens, M fused tokens, D hidden size, E width of the shared space, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BartConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartDecoder
from transformers.utils import ModelOutput

from mmbeam.errors import ModelError
from mmbeam.models.fusion.configuration import BOS, EOS, IGNORED, MASK, PAD, FusionConfig, text_tower
from mmbeam.models.fusion.encoders import Tokens, build_encoder, run_rnn, scatter_rows
from mmbeam.models.fusion.fusers import Fused, build_fuser
from mmbeam.models.fusion.objectives import (
    SINGLE_PROCESS,
    GeneratorAdversary,
    GlobalBatch,
    ModalityAdversary,
    Reconstruction,
    SharedSpace,
    positive_keys,
)


class TransformerDecoder(nn.Module):
    """BART's decoder: cached self-attention, and cross-attention to the fused tokens."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.decoder: Any = BartDecoder(
            BartConfig(
                vocab_size=config.vocab_size,
                d_model=config.hidden_size,
                decoder_layers=config.generator_layers,
                decoder_attention_heads=config.num_attention_heads,
                decoder_ffn_dim=config.ffn_size,
                max_position_embeddings=config.max_target_positions,
                dropout=config.dropout,
                init_std=0.02 * math.sqrt(1024 / config.hidden_size),  # BART's 0.02 is for a width of 1024
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
                decoder_start_token_id=BOS,
                forced_eos_token_id=None,
                attn_implementation="sdpa",
            )
        )
        self.decoder.embed_tokens = nn.Identity()  # FusionModel embeds the tokens

    def forward(
        self, embeddings: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """Return the hidden states [B, T, D] of token embeddings. With a cache, pass only the tokens not in it."""
        out = self.decoder(
            inputs_embeds=embeddings,
            encoder_hidden_states=memory,
            encoder_attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states: torch.Tensor = out.last_hidden_state
        return states


class LstmDecoder(nn.Module):
    """LSTM layers, each followed by attention to the fused tokens (Luong et al., 2015, arXiv:1508.04025, multi-head).

    It has no cache: each step reads all earlier tokens again, which costs little for captions.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)  # without it, training stalls on the small embeddings
        self.layers = nn.ModuleList(_LstmLayer(config) for _ in range(config.generator_layers))

    def forward(
        self, embeddings: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """Return the hidden states [B, T, D] of the embeddings of all tokens so far."""
        states: torch.Tensor = self.norm(embeddings)
        for layer in self.layers:
            states = layer(states, memory, mask)
        return states


class _LstmLayer(nn.Module):
    """LSTM, attention and a feed-forward block, each with a residual connection and layer norm.

    Without the residual connection around attention, 60 % of the captions were correct after 200 steps on texts alone;
    with it, all were.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, config.dropout, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, config.ffn_size), nn.GELU(), nn.Linear(config.ffn_size, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.norms[0](states + self.dropout(run_rnn(self.lstm, states)))
        context, _ = self.attention(states, memory, memory, key_padding_mask=~mask, need_weights=False)
        states = self.norms[1](states + self.dropout(context))
        out: torch.Tensor = self.norms[2](states + self.dropout(self.feed(states)))
        return out


@dataclass
class FusionOutput(ModelOutput):
    """The output of a call. With labels it holds the losses, and their weighted sum in `loss`."""

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None  # by name, not weighted
    logits: torch.Tensor | None = None  # [B, T, V]
    past_key_values: Any = None


@dataclass(frozen=True)
class FusedEncoding:
    """The output of the encoders and the fusion for a batch."""

    memory: torch.Tensor  # [B, M, D]
    memory_mask: torch.Tensor  # bool [B, M]
    embeddings: dict[str, torch.Tensor]  # by source, and "fused": [B, E], not normalised
    present: dict[str, torch.Tensor]  # by the same names: bool [B]
    pretrained_means: dict[str, torch.Tensor]  # means of pretrained encoders' last hidden states, [B, width]


class FusionModel(PreTrainedModel, GenerationMixin):
    """Generates text from any of its sources.

    Inputs are keyword arguments with the names of the sources: `image=`, float [B, C, H, W]; `text=`, ids [B, T];
    `clip_image_embedding=`, float [B, width]. `<name>_mask=` marks the samples that have the source, bool [B],
    or the real tokens of a sequence, bool [B, T] (all False: missing). Without its argument, a source is missing
    in the whole batch.
    """

    config_class = FusionConfig
    config: FusionConfig
    base_model_prefix = "fusion"
    main_input_name = "decoder_input_ids"
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.sources = config.parsed_sources()
        self.pairs = config.aligned_pairs()
        self.weights = {name: weight for name, weight in (config.loss_weights or {}).items() if weight}
        self.text_tower = text_tower(self.sources)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)  # embeds token ids; a checkpoint key
        self.encoders = nn.ModuleDict({name: build_encoder(source, config) for name, source in self.sources.items()})
        self.fuser = build_fuser(list(self.sources), config)
        decoder = TransformerDecoder if config.generator_kind == "transformer" else LstmDecoder
        self.decoder = decoder(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        names = [*self.sources, "fused", *(["caption"] if self.text_tower else [])]
        self.space = SharedSpace(names, self.pairs, config)
        if "reconstruct" in self.weights:
            self.reconstruction = Reconstruction(self.sources, config)
        if "modality_adversary" in self.weights:
            self.modality_adversary = ModalityAdversary(list(self.sources), config)
        if "generator_adversary" in self.weights:
            self.generator_adversary = GeneratorAdversary(config)
        self.built = False
        self.post_init()
        self.built = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise embeddings, which are also the output projection. Other modules keep torch's initialisation.

        A checkpoint trained without some losses lacks their heads: `from_pretrained` initialises them here.
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif self.built and isinstance(module, nn.Linear | nn.GRU):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings."""
        return self.words

    def encode(self, **inputs: torch.Tensor) -> FusedEncoding:
        """Encode and fuse the sources that are present, of which there may be none. Raises ModelError."""
        unknown = [name for name in inputs if name.removesuffix(MASK) not in self.sources]
        if unknown:
            raise ModelError(f"input {unknown[0]}: the model's sources are {', '.join(self.sources)}")
        sizes = {len(value) for value in inputs.values() if value is not None}
        if len(sizes) != 1:
            actual = f"batch sizes {', '.join(map(str, sorted(sizes)))}" if sizes else "no input"
            raise ModelError(f"expected inputs of one batch size for at least one source, found {actual}")
        (batch,) = sizes
        tokens: dict[str, Tokens] = {}
        present: dict[str, torch.Tensor] = {}
        pretrained_means: dict[str, torch.Tensor] = {}
        for name in self.sources:
            if inputs.get(name) is not None:
                mask = self._mask(name, inputs)
                has_source = mask if mask.dim() == 1 else mask.any(1)
                if has_source.any():
                    present[name] = has_source
                    tokens[name], mean = self._encode_source(name, inputs[name], mask, has_source)
                    if mean is not None:
                        pretrained_means[name] = mean
        fused: Fused = self.fuser(tokens, batch)
        embeddings = {name: self.space.project[name](_mean(*source_tokens)) for name, source_tokens in tokens.items()}
        embeddings["fused"] = self.space.project["fused"](fused.pooled)
        present["fused"] = torch.stack([*present.values()]).any(0) if present else fused.mask.new_zeros(batch)
        return FusedEncoding(fused.memory, fused.mask, embeddings, present, pretrained_means)

    def _mask(self, name: str, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the mask of a source among the inputs; by default every value is real."""
        mask: torch.Tensor | None = inputs.get(name + MASK)
        if mask is not None:
            return mask.bool()
        value = inputs[name]
        source = self.sources[name]
        is_sequence = source.tokens or (source.modality == "text" and source.kind != "features")
        return torch.ones(value.shape[: 2 if is_sequence else 1], dtype=torch.bool, device=value.device)

    def _encode_source(
        self, name: str, values: torch.Tensor, mask: torch.Tensor, present: torch.Tensor
    ) -> tuple[Tokens, torch.Tensor | None]:
        """Encode the samples that have the source; the others get zeros.

        Return the tokens, and the mean of the last hidden states of a pretrained encoder.
        """
        source, encoder = self.sources[name], cast(Any, self.encoders[name])
        if source.kind == "features" and values.shape[-1] != source.width:
            raise ModelError(f"features {name}: expected vectors of width {source.width}, found {values.shape[-1]}")
        if mask.dim() > 1 and mask.shape[1] > source.max_tokens:
            raise ModelError(f"source {name}: expected at most {source.max_tokens} tokens, found {mask.shape[1]}")
        if not present.all():
            values, mask = values[present], mask[present]
        if values.is_floating_point():  # not token ids
            values = values.to(self.dtype)
        mean = None
        if source.kind == "pretrained":
            hidden_states, mask = encoder.hidden_states(values, mask)
            mean = scatter_rows(_mean(hidden_states, mask), present)
            tokens, real = encoder(hidden_states, mask)
        elif source.kind == "features":
            tokens, real = encoder(values, mask)
        elif source.modality == "text":
            tokens, real = encoder(self.words(values), mask)
        else:
            tokens, real = encoder(values)
        return (scatter_rows(tokens, present), scatter_rows(real, present)), mean

    def embed(self, name: str, values: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[Tokens, torch.Tensor]:
        """Return the tokens of one source and its vectors in the shared space [B, E]; every sample must have it."""
        mask = self._mask(name, {name: values, name + MASK: mask})
        tokens, _ = self._encode_source(name, values, mask, mask if mask.dim() == 1 else mask.any(1))
        embedding: torch.Tensor = self.space.project[name](_mean(*tokens))
        return tokens, embedding

    def embed_captions(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Return the embeddings [B, E] of captions [B, T] by the model's own text encoder; None without one."""
        if self.text_tower is None:
            return None
        limit = self.sources[self.text_tower].max_tokens
        mask = (labels != IGNORED)[:, :limit]
        tokens = self.encoders[self.text_tower](self.words(labels[:, :limit].clamp(min=0)), mask)
        embedding: torch.Tensor = self.space.project["caption"](_mean(*tokens))
        return embedding

    def forward(
        self,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        groups: torch.Tensor | None = None,
        views: Mapping[str, torch.Tensor] | None = None,
        global_batch: GlobalBatch = SINGLE_PROCESS,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **inputs: torch.Tensor,
    ) -> FusionOutput:
        """Return logits, and with `labels` [B, T] the losses.

        `decoder_input_ids` default to the shifted labels. `encoder_outputs` and `attention_mask` are the memory
        and its mask, as `generate` passes them. Samples of equal non-negative `groups` [B] are positives of the
        alignment. `views` are other views of the sources. If the batch is part of a `global_batch`, the mean of
        the losses over the processes is the loss of the global batch.
        """
        encoding = None
        if encoder_outputs is None:
            encoding = self.encode(**inputs)
            memory, mask = encoding.memory, encoding.memory_mask
        else:
            memory = encoder_outputs[0]
            mask = memory.new_ones(memory.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask
        if decoder_input_ids is None:
            if labels is None:
                raise ModelError("expected `labels` or `decoder_input_ids`, found neither")
            decoder_input_ids = self.shift(labels)
        cache = past_key_values if use_cache else None
        decoder_states = self.decoder(self.words(decoder_input_ids), memory, mask.bool(), cache)
        logits = F.linear(decoder_states, self.words.weight, self.bias)
        output = FusionOutput(logits=logits, past_key_values=cache)
        if labels is not None:
            caption_loss = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=IGNORED,
                label_smoothing=self.config.label_smoothing if self.training else 0.0,
            )
            output.losses = {"caption": global_batch.rescale_by_tokens(caption_loss)}
            if encoding is not None:
                output.losses |= self._auxiliary_losses(
                    encoding, inputs, labels, decoder_states, groups, views or {}, global_batch
                )
            output.loss = sum(
                (self.weights.get(name, 0.0) * loss for name, loss in output.losses.items()), start=logits.new_zeros(())
            )
        return output

    def shift(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the decoder's input for `labels` [B, T]: shifted right by one, with the begin token in front."""
        begin = labels.new_full((len(labels), 1), BOS)
        return torch.cat([begin, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, PAD)], 1)

    def _auxiliary_losses(
        self,
        encoding: FusedEncoding,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        decoder_states: torch.Tensor,
        groups: torch.Tensor | None,
        views: Mapping[str, torch.Tensor],
        global_batch: GlobalBatch,
    ) -> dict[str, torch.Tensor]:
        """Return the configured losses other than the caption loss; `decoder_states` are those on the labels."""
        losses = {}
        if "align" in self.weights:
            embeddings, present = dict(encoding.embeddings), dict(encoding.present)
            captions = self.embed_captions(labels) if any("caption" in pair for pair in self.pairs) else None
            if captions is not None:
                embeddings["caption"] = captions
                present["caption"] = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
            view_embeddings = self.encode(**views).embeddings if views else {}
            keys = positive_keys(labels, groups)
            losses["align"] = self.space.loss(self.pairs, embeddings, present, view_embeddings, keys, global_batch)
        if "reconstruct" in self.weights:
            masks = {f"{name}{MASK}": self._mask(name, inputs) for name in encoding.present if name != "fused"}
            targets = {**inputs, **masks, **encoding.pretrained_means}
            losses["reconstruct"] = self.reconstruction.loss(
                targets, encoding.embeddings, encoding.present, global_batch
            )
        if "modality_adversary" in self.weights:
            losses["modality_adversary"] = self.modality_adversary.loss(
                encoding.embeddings, encoding.present, global_batch
            )
        if "generator_adversary" in self.weights:
            with torch.no_grad():
                sampled = self._sample_tokens(encoding, labels.shape[1])
            sampled_states = self.decoder(self.words(sampled), encoding.memory, encoding.memory_mask)
            before_end = sampled.eq(EOS).cumsum(1) == 0
            loss = self.generator_adversary.loss(decoder_states, labels != IGNORED, sampled_states, before_end)
            losses["generator_adversary"] = global_batch.rescale_by_rows(loss)
        return losses

    def _sample_tokens(self, encoding: FusedEncoding, length: int) -> torch.Tensor:
        """Sample `length` tokens. Return the decoder inputs that produced them, [B, length], beginning with BOS."""
        training = self.decoder.training
        self.decoder.eval()  # the decoder alone: a frozen encoder keeps its mode
        try:
            token_ids: torch.Tensor = super().generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoding.memory.detach()),
                attention_mask=encoding.memory_mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=length,
                use_cache=self.config.generator_kind == "transformer",
            )
        finally:
            self.decoder.train(training)
        return token_ids[:, :length]

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as in transformers, with the sources as keyword arguments; they are encoded once.

        `encoder_outputs` and `attention_mask`, the memory and its mask from `encode`, may be passed instead.
        """
        sources = {name: kwargs.pop(name) for name in list(kwargs) if name.removesuffix(MASK) in self.sources}
        if kwargs.get("encoder_outputs") is None:
            encoding = self.encode(**sources)
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoding.memory)
            kwargs["attention_mask"] = encoding.memory_mask
        if self.config.generator_kind == "lstm":
            kwargs["use_cache"] = False
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        encoder_outputs: Any = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next token; with a cache, only the tokens not in it."""
        if use_cache and past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {
            "decoder_input_ids": input_ids,
            "encoder_outputs": encoder_outputs,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }


def _mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the real tokens, [B, T, D] to [B, D]."""
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
