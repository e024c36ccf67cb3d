"""Transformers that denoise images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
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


def cogview(rows: Rows) -> Arguments:
    size = torch.full((len(rows), 2), 64.0)
    return {
        "hidden_states": rows(4, 8, 8),
        "encoder_hidden_states": rows(6, 24),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(len(rows), 2),
    }


def omnigen(rows: Rows) -> Arguments:
    """Six words, one token of the time and 16 patches, in one sequence."""
    tokens = 6 + 1 + 16
    return {
        "hidden_states": rows(4, 8, 8),
        "input_ids": rows.integers(64, 6),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(len(rows), tokens, tokens),
        "position_ids": torch.arange(tokens).repeat(len(rows), 1),
    }


def ideogram(rows: Rows) -> Arguments:
    """Six words and 16 patches in one sequence, told apart by an indicator."""
    tokens = 6 + 16
    words = torch.arange(tokens) < 6
    positions = torch.cat([torch.arange(6)[:, None].repeat(1, 3), image_ids().long() + 65536])
    return {
        "hidden_states": rows(tokens, 8) * ~words[:, None],
        "encoder_hidden_states": rows(tokens, 24) * words[:, None],
        "position_ids": positions.repeat(len(rows), 1, 1),
        "segment_ids": torch.ones(len(rows), tokens, dtype=torch.long),
        "indicator": torch.where(words, 3, 2).repeat(len(rows), 1),
        "attention_kwargs": None,
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

COGVIEW = (
    HEADS
    | LATENT
    | {
        "num_layers": 2,
        "text_embed_dim": 24,
        "time_embed_dim": 32,
        "condition_dim": 8,
        "sample_size": 8,
    }
)

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
    Denoiser(
        "Transformer2DModel",
        HEADS
        | {
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000,
            "attention_bias": True,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "norm_elementwise_affine": False,
        },
        pixart,
    ),
    Denoiser(
        "FluxTransformer2DModel (schnell)",
        FLUX | {"pooled_projection_dim": 16},
        lambda rows: flux(rows) | {"guidance": None},
        time_scale=1e-3,
    ),
    Denoiser(
        "Flux2Transformer2DModel",
        FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        lambda rows: packed(
            rows,
            guidance=torch.full((len(rows),), 4.0),
            img_ids=image_ids(4).expand(len(rows), -1, -1),
            txt_ids=torch.zeros(len(rows), 6, 4),
            joint_attention_kwargs=None,
        ),
        time_scale=1e-3,
    ),
    Denoiser(
        "ChromaTransformer2DModel",
        FLUX | {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2},
        lambda rows: packed(
            rows,
            attention_mask=torch.cat([rows.mask(6), torch.ones(len(rows), 16, dtype=torch.bool)], dim=1),
            joint_attention_kwargs=None,
        ),
        time_scale=1e-3,
    ),
    Denoiser("BriaTransformer2DModel", FLUX, lambda rows: packed(rows, attention_kwargs=None)),
    Denoiser(
        "BriaFiboTransformer2DModel",
        FLUX | {"text_encoder_dim": 20},
        lambda rows: packed(rows, text_encoder_layers=[rows(6, 20), rows(6, 20)], joint_attention_kwargs=None),
    ),
    Denoiser(
        "LongCatImageTransformer2DModel",
        FLUX | {"pooled_projection_dim": 24},
        lambda rows: packed(rows, guidance=None),
        time_scale=1e-3,
    ),
    Denoiser(
        "OvisImageTransformer2DModel",
        FLUX | {"out_channels": 8},
        lambda rows: packed(rows, joint_attention_kwargs=None),
        time_scale=1e-3,
    ),
    Denoiser(
        "AuraFlowTransformer2DModel",
        HEADS
        | LATENT
        | {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        lambda rows: {"hidden_states": rows(4, 8, 8), "encoder_hidden_states": rows(6, 24), "attention_kwargs": None},
        time_scale=1e-3,
    ),
    Denoiser(
        "SanaTransformer2DModel",
        HEADS
        | LATENT
        | {
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
        lambda rows: {
            "hidden_states": rows(4, 8, 8),
            "encoder_hidden_states": rows(6, 24),
            "encoder_attention_mask": rows.mask(6).long(),
            "attention_kwargs": None,
        },
    ),
    Denoiser(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 24,
        },
        lambda rows: {
            "hidden_states": rows(4, 8, 8),
            "encoder_hidden_states": rows(6, 24),
            "encoder_attention_mask": rows.mask(6).long(),
            "attention_kwargs": None,
        },
        time_scale=1e-3,
        reversed=True,
    ),
    Denoiser(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": 24,
        },
        lambda rows: {
            "hidden_states": rows(4, 8, 8),
            "encoder_hidden_states": rows(6, 24),
            "encoder_mask": rows.mask(6).long(),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
            "cross_attention_kwargs": {},
        },
        time_scale=1e-3,
        reversed=True,
    ),
    Denoiser(
        "HunyuanDiT2DModel",
        HEADS
        | {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 4,  # the last one has a skip connection
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 24,
            "text_len": 6,
            "text_len_t5": 5,
        },
        lambda rows: {
            "hidden_states": rows(4, 8, 8),
            "encoder_hidden_states": rows(6, 24),
            "text_embedding_mask": rows.mask(6).long(),
            "encoder_hidden_states_t5": rows(5, 16),
            "text_embedding_mask_t5": rows.mask(5).long(),
            "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).repeat(len(rows), 1),
            "style": torch.zeros(len(rows), dtype=torch.long),
            "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
        },
    ),
    Denoiser("CogView3PlusTransformer2DModel", COGVIEW | {"pos_embed_max_size": 8}, cogview),
    Denoiser(
        "CogView4Transformer2DModel",
        COGVIEW | {"rope_axes_dim": (8, 8)},
        lambda rows: cogview(rows) | {"attention_kwargs": None},
    ),
    Denoiser(
        "GlmImageTransformer2DModel",
        HEADS
        | LATENT
        | {
            "num_layers": 2,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 32,
        },
        lambda rows: {
            "hidden_states": rows(4, 8, 8),
            "encoder_hidden_states": rows(6, 24),
            "prior_token_id": rows.integers(32, 16),
            "prior_token_drop": torch.zeros(len(rows), 16, dtype=torch.bool),
            "target_size": torch.full((len(rows), 2), 64.0),
            "crop_coords": torch.zeros(len(rows), 2),
            "attention_kwargs": None,
            "kv_caches": None,
        },
    ),
    Denoiser(
        "HiDreamImageTransformer2DModel",
        HEADS
        | LATENT
        | {
            "patch_size": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [24, 20],
            "text_emb_dim": 16,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
        },
        lambda rows: {
            "hidden_states": rows(4, 8, 8),
            "encoder_hidden_states_t5": rows(6, 24),
            "encoder_hidden_states_llama3": rows(2, 6, 20).transpose(0, 1),
            "pooled_embeds": rows(16),
            "attention_kwargs": None,
        },
        time_argument="timesteps",
    ),
    Denoiser(
        "HunyuanImageTransformer2DModel (refiner)",
        HEADS
        | LATENT
        | {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "guidance_embeds": True,
            "text_embed_dim": 24,
            "rope_axes_dim": (4, 6, 6),
            "patch_size": (1, 2, 2),
        },
        lambda rows: {
            "hidden_states": rows(4, 1, 8, 8),
            "guidance": torch.full((len(rows),), 4000.0),
            "attention_kwargs": {},
            "encoder_hidden_states": rows(6, 24),
            "encoder_attention_mask": rows.mask(6).long(),
        },
    ),
    Denoiser(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 64,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 8,
            "time_step_dim": 32,
        },
        omnigen,
        time_scale=1e-3,
        reversed=True,
    ),
    Denoiser(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda rows: {
            "hidden_states": rows(4, 8, 8),
            "encoder_hidden_states": rows(6, 24),
            "attention_mask": rows.mask(6),
        },
        time_scale=1e-3,
    ),
    Denoiser(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda rows: {
            "hidden_states": rows(4, 4, 4),
            "text_bth": rows(6, 24),
            "text_lens": torch.tensor(rows.lengths(6)),
        },
    ),
    Denoiser(
        "Krea2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 24,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda rows: {
            "hidden_states": rows(16, 8),
            "encoder_hidden_states": rows(6, 2, 24),
            "position_ids": torch.cat([torch.zeros(6, 3), image_ids()]),
            "encoder_attention_mask": rows.mask(6),
            "attention_kwargs": None,
        },
        time_scale=1e-3,
    ),
    Denoiser(
        "NucleusMoEImageTransformer2DModel",
        HEADS
        | {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 5,  # all but the first three and the last one have experts
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "mlp_ratio": 6.0,  # the hidden layer is rounded down to a multiple of 128
            "num_experts": 4,
            "moe_intermediate_dim": 24,
            "capacity_factors": [2.0] * 5,
        },
        lambda rows: {
            "hidden_states": rows(16, 16),
            "img_shapes": [(1, 4, 4)] * len(rows),
            "encoder_hidden_states": rows(6, 24),
            "encoder_hidden_states_mask": rows.mask(6).long(),
            "attention_kwargs": {},
        },
        time_scale=1e-3,
    ),
    Denoiser(
        "Ideogram4Transformer2DModel",
        HEADS
        | {
            "in_channels": 8,
            "num_layers": 2,
            "intermediate_size": 48,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        ideogram,
        time_scale=1e-3,
        reversed=True,
    ),
    Denoiser(
        "QwenImage21Transformer2DModel",
        HEADS
        | {
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "context_in_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda rows: {
            "hidden_states": rows(16, 8),
            "encoder_hidden_states": rows(6, 24),
            "encoder_hidden_states_mask": rows.mask(6).long(),
            "img_shapes": [[(1, 4, 4)]] * len(rows),
            "img_mask": (torch.arange(6 + 4) >= 6).repeat(len(rows), 1),  # four slots of 2 x 2 tokens
            "attention_kwargs": {},
            "kv_cache": None,
            "kv_cache_mode": None,
        },
        time_scale=1e-3,
    ),
    Denoiser(
        "Flux3Transformer2DModel",
        HEADS
        | {
            "in_channels": 8,
            "cond_in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 24,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda rows: packed(
            rows,
            img_ids=image_ids(4),
            txt_ids=torch.zeros(6, 4),
            attention_kwargs=None,
        ),
        time_scale=1e-3,
    ),
)
