"""Transformers that denoise videos."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor

from denoisers.table import Arguments, Denoiser, Rows

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENT = {"in_channels": 4, "out_channels": 4}


def prompted(rows: Rows) -> Arguments:
    return {"hidden_states": rows(4, 2, 8, 8), "encoder_hidden_states": rows(6, 24)}


def masked(rows: Rows) -> Arguments:
    return prompted(rows) | {"encoder_attention_mask": rows.mask(6).long(), "attention_kwargs": None}


def wan(rows: Rows) -> Arguments:
    return prompted(rows) | {"attention_kwargs": None}


def wan_image(rows: Rows) -> Arguments:
    """The attention to an image takes the last 512 tokens for the prompt, so that there have to be 512."""
    return wan(rows) | {"encoder_hidden_states": rows(512, 24), "encoder_hidden_states_image": rows(3, 20)}


def cogvideox(rows: Rows) -> Arguments:
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), temporal_size=2)
    return {
        "hidden_states": rows(2, 4, 8, 8),
        "encoder_hidden_states": rows(6, 24),
        "image_rotary_emb": rotary,
        "attention_kwargs": None,
    }


def allegro(rows: Rows) -> Arguments:
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (4, 4)), (4, 4), temporal_size=2, interpolation_scale=(2.2, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1)
    return prompted(rows) | {
        "encoder_attention_mask": rows.mask(6).long(),
        "image_rotary_emb": (tuple(frequencies), tuple(positions)),
    }


def hunyuan_video_15(rows: Rows) -> Arguments:
    return {
        "hidden_states": rows(9, 2, 4, 4),
        "image_embeds": rows(3, 20),
        "attention_kwargs": {},
        "encoder_hidden_states": rows(6, 24),
        "encoder_attention_mask": rows.mask(6).long(),
        "encoder_hidden_states_2": rows(5, 16),
        "encoder_attention_mask_2": rows.mask(5).long(),
    }


def edges(rows: Rows, axes: int, tokens: int) -> Tensor:
    """Where each token begins and ends on each axis, shape ``[batch, axes, tokens, 2]``."""
    begin = torch.arange(float(tokens)).expand(len(rows), axes, -1)
    return torch.stack([begin, begin + 1], dim=-1)


def ltx2(rows: Rows) -> Arguments:
    mask = rows.mask(6).long()
    return {
        "hidden_states": rows(32, 8),
        "audio_hidden_states": rows(6, 8),
        "encoder_hidden_states": rows(6, 24),
        "audio_encoder_hidden_states": rows(6, 24),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "fps": 24.0,
        "audio_num_frames": 6,
        "video_coords": edges(rows, 3, 32),
        "audio_coords": edges(rows, 1, 6),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
    }


def helios(rows: Rows) -> Arguments:
    """Two new frames after seven earlier ones, the older the coarser."""

    def frames(first: int, last: int) -> Tensor:
        return torch.arange(first, last).expand(len(rows), -1)

    return wan(rows) | {
        "indices_hidden_states": frames(7, 9),
        "indices_latents_history_short": frames(6, 7),
        "indices_latents_history_mid": frames(4, 6),
        "indices_latents_history_long": frames(0, 4),
        "latents_history_short": rows(4, 1, 8, 8),
        "latents_history_mid": rows(4, 2, 8, 8),
        "latents_history_long": rows(4, 4, 8, 8),
    }


def framepack(rows: Rows) -> Arguments:
    """Two new frames after one clean, two halved and four quartered ones."""

    return masked(rows) | {
        "pooled_projections": rows(16),
        "image_embeds": rows(3, 20),
        "indices_latents": torch.arange(7, 9),
        "guidance": torch.full((len(rows),), 6000.0),
        "latents_clean": rows(4, 1, 8, 8),
        "indices_latents_clean": torch.arange(6, 7),
        "latents_history_2x": rows(4, 2, 8, 8),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": rows(4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(0, 4),
    }


COGVIDEOX = (
    HEADS
    | LATENT
    | {
        "time_embed_dim": 32,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": 6,
        "use_rotary_positional_embeddings": True,
    }
)
WAN = HEADS | LATENT | {"text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}
HUNYUAN = (
    HEADS
    | LATENT
    | {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 24,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    }
)
SANA = (
    HEADS
    | LATENT
    | {
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "sample_size": 8,
    }
)

VIDEOS = (
    Denoiser("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox),
    Denoiser(
        "ConsisIDTransformer3DModel",
        COGVIDEOX
        | {
            "num_attention_heads": 3,  # the width of a face's features is two thirds of the transformer's
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 16,
            "LFE_vit_dim": 16,
            "LFE_depth": 5,  # one for each of the five scales
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 32,
            "LFE_ff_mult": 1,
        },
        lambda rows: cogvideox(rows) | {"id_cond": rows(16), "id_vit_hidden": [rows(4, 16) for _ in range(5)]},
    ),
    Denoiser("WanTransformer3DModel", WAN, wan),
    Denoiser("WanTransformer3DModel (image to video)", WAN | {"image_dim": 20, "added_kv_proj_dim": 32}, wan_image),
    Denoiser(
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0, 1], "vace_in_channels": 6},
        lambda rows: (
            wan(rows) | {"control_hidden_states": rows(6, 2, 8, 8), "control_hidden_states_scale": torch.ones(2)}
        ),
    ),
    Denoiser("SkyReelsV2Transformer3DModel", WAN, wan),
    Denoiser("ChronoEditTransformer3DModel", WAN | {"image_dim": 20, "added_kv_proj_dim": 32}, wan_image),
    Denoiser(
        "HeliosTransformer3DModel",
        WAN | {"rope_dim": (8, 4, 4), "is_amplify_history": True},
        helios,
    ),
    Denoiser(
        "LTXVideoTransformer3DModel",
        HEADS
        | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 24},
        lambda rows: {
            "hidden_states": rows(32, 8),
            "encoder_hidden_states": rows(6, 24),
            "encoder_attention_mask": rows.mask(6),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "rope_interpolation_scale": (8 / 25, 32, 32),
            "attention_kwargs": None,
        },
    ),
    Denoiser(
        "LTX2VideoTransformer3DModel",
        HEADS
        | {
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 24,
        },
        ltx2,
        more_times=("sigma",),
    ),
    Denoiser(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        lambda rows: masked(rows) | {"pooled_projections": rows(16), "guidance": torch.full((len(rows),), 6000.0)},
    ),
    Denoiser(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 20, "has_clean_x_embedder": True},
        framepack,
    ),
    Denoiser(
        "HunyuanVideo15Transformer3DModel",
        HEADS
        | {
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "text_embed_2_dim": 16,  # projected to 2048 whatever the width
            "image_embed_dim": 20,
            "rope_axes_dim": (4, 6, 6),
        },
        hunyuan_video_15,
    ),
    Denoiser(
        "MochiTransformer3DModel",
        HEADS
        | {
            "num_layers": 3,  # the last one leaves the prompt alone
            "in_channels": 4,
            "pooled_projection_dim": 16,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
        },
        lambda rows: masked(rows) | {"encoder_attention_mask": rows.mask(6)},
    ),
    Denoiser(
        "CosmosTransformer3DModel",
        HEADS
        | LATENT
        | {
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (4, 8, 8),
            "concat_padding_mask": False,  # its resizing needs torchvision
            "extra_pos_embed_type": "learnable",
        },
        lambda rows: prompted(rows) | {"fps": 24, "padding_mask": torch.zeros(1, 1, 8, 8)},
        time_scale=1e-3,
    ),
    Denoiser(
        "LatteTransformer3DModel",
        HEADS
        | LATENT
        | {
            "num_layers": 2,
            "cross_attention_dim": 32,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 24,
            "video_length": 2,
        },
        lambda rows: prompted(rows) | {"enable_temporal_attentions": True},
    ),
    Denoiser(
        "AllegroTransformer3DModel",
        LATENT
        | {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 24,
        },
        allegro,
    ),
    Denoiser(
        "EasyAnimateTransformer3DModel",
        HEADS
        | LATENT
        | {
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 32,
            "add_norm_text_encoder": True,
            "text_embed_dim": 24,
        },
        prompted,
    ),
    Denoiser(
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": 24,
            "in_text_dim2": 16,
            "time_dim": 32,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        lambda rows: {
            "hidden_states": rows(2, 8, 8, 4),
            "encoder_hidden_states": rows(6, 24),
            "pooled_projections": rows(16),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(6),
            "scale_factor": (1, 2, 2),
            "sparse_params": None,
        },
        return_dict=True,
    ),
    Denoiser("SanaVideoTransformer3DModel", SANA, masked),
    Denoiser(
        "MotifVideoTransformer3DModel",
        HEADS
        | LATENT
        | {
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "text_embed_dim": 24,
            "image_embed_dim": 20,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda rows: masked(rows) | {"image_embeds": rows(3, 20)},
    ),
    Denoiser(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 24,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda rows: {"hidden_states": rows(2, 4, 1, 8, 8), "encoder_hidden_states": rows(6, 24)},
    ),
    Denoiser(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda rows: wan(rows) | {"hidden_states": rows(2, 4, 8, 8)},
        more_times=("r_timestep",),
        time_repeats=2,
    ),
    Denoiser(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 24,
            "in_text_dim2": 16,
            "time_dim": 32,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 8,
            "out_audio_dim": 8,
        },
        lambda rows: {
            "hidden_states": rows(2, 8, 8, 4),
            "audio_hidden_states": rows(6, 8),
            "encoder_hidden_states": rows(6, 24),
            "pooled_projections": rows(16),
            "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
            "encoder_attention_mask": rows.mask(6),
            "visual_token_type_ids": None,
        },
    ),
)
