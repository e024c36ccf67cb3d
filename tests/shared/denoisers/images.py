"""Transformers that denoise images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from denoisers.table import Arguments, Denoiser, Rows

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENT = {"in_channels": 4, "out_channels": 4}


def image_ids(axes: int = 3) -> Tensor:
    """Row and column of each of 4 x 4 patches in the last two of ``axes`` columns, shared by the batch."""
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return torch.stack([torch.zeros(16)] * (axes - 2) + [row.flatten(), column.flatten()], dim=1)


def packed(rows: Rows, **more: Any) -> Arguments:
    """The call that Flux introduced: packed patches, a prompt, and position ids without a batch dimension."""
    return {
        "hidden_states": rows(16, 8),
        "encoder_hidden_states": rows(6, 24),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": image_ids(),
        **more,
    }


def flux(rows: Rows) -> Arguments:
    guidance = torch.full((len(rows),), 3.5)
    return packed(rows, guidance=guidance, pooled_projections=rows(16), joint_attention_kwargs=None)


def sd3(rows: Rows) -> Arguments:
    return {
        "hidden_states": rows(4, 8, 8),
        "encoder_hidden_states": rows(6, 24),
        "pooled_projections": rows(16),
        "joint_attention_kwargs": None,
    }


def pixart(rows: Rows) -> Arguments:
    return {
        "hidden_states": rows(4, 8, 8),
        "encoder_hidden_states": rows(6, 24),
        "encoder_attention_mask": rows.mask(6),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def z_image(rows: Rows) -> Arguments:
    """Lists with a tensor for each row: prompts differ in length."""
    prompts = [prompt[:length] for prompt, length in zip(rows(6, 24), rows.lengths(6), strict=True)]
    return {"x": list(rows(4, 1, 8, 8)), "cap_feats": prompts, "joint_attention_kwargs": None}


def qwen(rows: Rows) -> Arguments:
    return {
        "hidden_states": rows(16, 16),
        "encoder_hidden_states": rows(6, 24),
        "encoder_hidden_states_mask": rows.mask(6).long(),
        "img_shapes": [[(1, 4, 4)]] * len(rows),
        "guidance": None,
        "attention_kwargs": {},
    }


SD3 = (
    HEADS
    | LATENT
    | {
        "sample_size": 8,
        "num_layers": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
    }
)
FLUX = HEADS | {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}

IMAGES = (
    Denoiser(
        "DiTTransformer2DModel",
        HEADS | {"num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10, "out_channels": 8},
        lambda rows: {"hidden_states": rows(4, 8, 8), "class_labels": rows.integers(10)},
        return_dict=None,
    ),
    Denoiser(
        "PixArtTransformer2DModel",
        HEADS | {"num_layers": 2, "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 24},
        pixart,
    ),
    Denoiser("SD3Transformer2DModel", SD3, sd3),
    Denoiser("SD3Transformer2DModel (3.5)", SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}, sd3),
    Denoiser(
        "FluxTransformer2DModel",
        FLUX | {"pooled_projection_dim": 16, "guidance_embeds": True},
        flux,
        time_scale=1e-3,
    ),
    Denoiser(
        "QwenImageTransformer2DModel",
        HEADS
        | {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        qwen,
        time_scale=1e-3,
    ),
    Denoiser(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 16, 16],
        },
        z_image,
        time_argument="t",
        time_scale=1e-3,
        reversed=True,
    ),
)
