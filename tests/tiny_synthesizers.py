"""Tiny models that make images and sounds of texts, from their configurations, with all their files."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tiny_clip import DIM, TOWER, save_clip, save_random
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, VitsConfig, VitsModel, VitsTokenizer

RATE = 16_000


def save_diffusion(directory: Path, scheduler: str = "PNDMScheduler") -> Path:
    """Write a StableDiffusionPipeline of 16 x 16 pixels; return its directory."""
    import diffusers

    tokenizer = CLIPTokenizer.from_pretrained(save_clip(directory / "clip"))
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TOWER["hidden_size"],
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    text = CLIPTextConfig(**TOWER, vocab_size=len(tokenizer), max_position_embeddings=77, projection_dim=DIM)
    steps: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if scheduler == "PNDMScheduler":
        steps["skip_prk_steps"] = True
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=getattr(diffusers, scheduler)(steps_offset=1, clip_sample=False, **steps)
        if scheduler == "DDIMScheduler"
        else getattr(diffusers, scheduler)(steps_offset=1, **steps),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(directory / "clip")
    pipeline.save_pretrained(directory)
    return directory


def save_vits(directory: Path) -> Path:
    """Write a VITS of 16 kHz and letters; return its directory."""
    config = VitsConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=16,
        spectrogram_bins=9,
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1,
        duration_predictor_filter_channels=16,
        depth_separable_num_layers=1,
        upsample_initial_channel=16,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        sampling_rate=RATE,
    )
    save_random(VitsModel, config, directory)
    letters = "_ abcdefghijklmnopqrstuvwxyz'-"
    path = directory / "letters.json"
    path.write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    VitsTokenizer(str(path), pad_token="_", unk_token="_", phonemize=False).save_pretrained(directory)
    path.unlink()
    return directory
