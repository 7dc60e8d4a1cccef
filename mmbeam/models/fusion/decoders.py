"""The two generators of a fusion model: embedded words and the fused tokens, to hidden states that score words.

Shapes: B batch, T words so far, M fused tokens, D hidden size.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import BartConfig
from transformers.models.bart.modeling_bart import BartDecoder

from mmbeam.models.fusion.configuration import BOS, EOS, PAD, FusionConfig


def build_decoder(config: FusionConfig) -> nn.Module:
    """The generator that the configuration names."""
    return TransformerDecoder(config) if config.generator_kind == "transformer" else LstmDecoder(config)


class TransformerDecoder(nn.Module):
    """The decoder of BART: self-attention with a cache, and cross-attention to the fused tokens."""

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
                init_std=0.02 * math.sqrt(1024 / config.hidden_size),  # BART's own is for its width of 1024
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
                decoder_start_token_id=BOS,
                forced_eos_token_id=None,
                attn_implementation="sdpa",
            )
        )
        self.decoder.embed_tokens = nn.Identity()  # the words are embedded outside

    def forward(self, words: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Of words [B, T, D]; with a cache, of those that are not in it yet."""
        out = self.decoder(
            inputs_embeds=words,
            encoder_hidden_states=memory,
            encoder_attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        states: torch.Tensor = out.last_hidden_state
        return states


class LstmDecoder(nn.Module):
    """LSTM layers, each followed by attention to the fused tokens (Luong et al., 2015, arXiv:1508.04025, multi-head).

    It keeps no cache: it reads the words so far anew at each step, which for captions costs little.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)  # without it the small embeddings never leave the ground
        self.layers = nn.ModuleList(_LstmLayer(config) for _ in range(config.generator_layers))

    def forward(self, words: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Of all words so far, [B, T, D]."""
        states: torch.Tensor = self.norm(words)
        for layer in self.layers:
            states = layer(states, memory, mask)
        return states


class _LstmLayer(nn.Module):
    """LSTM, attention and a feed-forward part, each added to its input and normalised as in a Transformer's layer.

    With the attention fed into the feed-forward part alone, 200 steps on texts alone made 60 % of the captions right;
    so, all of them.
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
        states = self.norms[0](states + self.dropout(self.lstm(states)[0]))
        context, _ = self.attention(states, memory, memory, key_padding_mask=~mask, need_weights=False)
        states = self.norms[1](states + self.dropout(context))
        out: torch.Tensor = self.norms[2](states + self.dropout(self.feed(states)))
        return out
