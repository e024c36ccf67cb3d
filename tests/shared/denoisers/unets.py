"""Convolutional denoisers, of images, videos and trajectories."""

from __future__ import annotations

import torch

from denoisers.table import Arguments, Denoiser, Rows

CHANNELS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def stable_diffusion(rows: Rows) -> Arguments:
    return {
        "sample": rows(4, 8, 8),
        "encoder_hidden_states": rows(6, 24),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
    }


def sdxl(rows: Rows) -> Arguments:
    time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(len(rows), 1)
    return stable_diffusion(rows) | {"added_cond_kwargs": {"text_embeds": rows(16), "time_ids": time_ids}}


def kandinsky3(rows: Rows) -> Arguments:
    """16 x 16 pixels: three halvings leave more than one for the attention to choose from."""
    return {"sample": rows(4, 16, 16), "encoder_hidden_states": rows(6, 24), "encoder_attention_mask": rows.mask(6)}


def video(rows: Rows) -> Arguments:
    return {"sample": rows(4, 3, 8, 8), "encoder_hidden_states": rows(6, 24), "cross_attention_kwargs": None}


SD = CHANNELS | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
}
VIDEO = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}

CASCADE_BLOCK = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
CASCADE = {
    "in_channels": 4,
    "out_channels": 4,
    "conditioning_dim": 32,
    "block_out_channels": (16, 32),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "block_types_per_layer": (CASCADE_BLOCK, CASCADE_BLOCK),
    "clip_text_pooled_in_channels": 16,
}

UNETS = (
    Denoiser(
        "UNet2DModel",
        CHANNELS
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        lambda rows: {"sample": rows(3, 8, 8)},
        return_dict=None,
    ),
    Denoiser(
        "UNet2DModel (class labels)",
        CHANNELS
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "attention_head_dim": 8,
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 10,
        },
        lambda rows: {"sample": rows(3, 8, 8), "class_labels": rows.integers(10)},
    ),
    Denoiser("UNet2DConditionModel (SD 1.5)", SD, stable_diffusion),
    Denoiser(
        "UNet2DConditionModel (SDXL)",
        SD
        | {
            "use_linear_projection": True,
            "transformer_layers_per_block": (2, 1),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        sdxl,
    ),
    Denoiser(
        "UNet2DConditionModel (unCLIP)",
        SD | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
        lambda rows: {
            "sample": rows(4, 8, 8),
            "encoder_hidden_states": rows(6, 24),
            "class_labels": rows(16),
            "cross_attention_kwargs": None,
        },
    ),
    Denoiser(
        "UNet2DConditionModel (Kandinsky 2.2)",
        CHANNELS
        | {
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 8,
            "cross_attention_dim": 24,
            "encoder_hid_dim": 20,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image",
        },
        lambda rows: {
            "sample": rows(4, 8, 8),
            "encoder_hidden_states": None,
            "added_cond_kwargs": {"image_embeds": rows(20)},
        },
    ),
    Denoiser(
        "UNet1DModel",
        {
            "in_channels": 14,
            "out_channels": 14,
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1.0,
            "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
            "up_block_types": ("UpResnetBlock1D",),
            "mid_block_type": "MidResTemporalBlock1D",
            "out_block_type": "OutConv1DBlock",
            "block_out_channels": (16, 32),
            "act_fn": "mish",
        },
        lambda rows: {"sample": rows(14, 16)},
        return_dict=None,
    ),
    Denoiser("UNet3DConditionModel", CHANNELS | VIDEO | {"cross_attention_dim": 24, "attention_head_dim": 8}, video),
    Denoiser(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 32,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (16, 16, 16, 32),  # four levels are wired in
            "cross_attention_dim": 24,
            "encoder_hid_dim": 24,
        },
        kandinsky3,
    ),
    Denoiser(
        "UNetSpatioTemporalConditionModel",
        {
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "block_out_channels": (
                64,
                64,
            ),  # the norms have 32 groups, and one of a single channel would cancel the time
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "num_attention_heads": 2,
            "num_frames": 3,
        },
        lambda rows: {
            "sample": rows(3, 8, 8, 8),
            "encoder_hidden_states": rows(1, 24),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(len(rows), 1),
        },
    ),
    Denoiser(
        "UNetMotionModel",
        CHANNELS
        | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 24,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda rows: (
            video(rows) | {"encoder_hidden_states": rows(6, 24).repeat_interleave(3, 0), "added_cond_kwargs": None}
        ),
        return_dict=None,
    ),
    Denoiser(
        "I2VGenXLUNet",
        CHANNELS | VIDEO | {"cross_attention_dim": 32, "attention_head_dim": 8},
        lambda rows: (
            video(rows)
            | {
                "encoder_hidden_states": rows(6, 32),
                "fps": torch.full((len(rows),), 16),
                "image_latents": rows(4, 3, 8, 8),
                "image_embeddings": rows(1, 32),
            }
        ),
    ),
    Denoiser(
        "StableCascadeUNet (prior)",
        CASCADE | {"clip_text_in_channels": 24, "clip_image_in_channels": 20, "switch_level": (False,)},
        lambda rows: {
            "sample": rows(4, 8, 8),
            "clip_text_pooled": rows(1, 16),
            "clip_text": rows(6, 24),
            "clip_img": rows(1, 20),
        },
        time_argument="timestep_ratio",
        time_scale=1e-3,
    ),
    Denoiser(
        "StableCascadeUNet (decoder)",
        CASCADE
        | {"effnet_in_channels": 16, "patch_size": 2, "block_types_per_layer": (CASCADE_BLOCK[:2], CASCADE_BLOCK)},
        lambda rows: {"sample": rows(4, 16, 16), "clip_text_pooled": rows(1, 16), "effnet": rows(16, 4, 4)},
        time_argument="timestep_ratio",
        time_scale=1e-3,
    ),
    Denoiser(
        "DreamLiteUNetModel",
        {
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
            "attention_head_dim": 8,
            "addition_embed_type": "time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16,
        },
        lambda rows: {
            "sample": rows(4, 8, 16),
            "encoder_hidden_states": rows(6, 24),
            "encoder_attention_mask": rows.mask(6).long(),
            "added_cond_kwargs": {"time_ids": torch.full((len(rows), 2), 64.0)},
        },
    ),
)
