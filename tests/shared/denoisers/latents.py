"""Transformers that denoise sound, and embeddings of images."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from denoisers.table import Denoiser

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

LATENTS = (
    Denoiser(
        "PriorTransformer",
        HEADS | {"num_layers": 2, "embedding_dim": 16, "num_embeddings": 6},
        lambda rows: {
            "hidden_states": rows(16),
            "proj_embedding": rows(16),
            "encoder_hidden_states": rows(6, 16),
            "attention_mask": rows.mask(6),
        },
        return_dict=None,
    ),
    Denoiser(
        "StableAudioDiTModel",
        HEADS
        | {
            "sample_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "time_proj_dim": 32,
            "global_states_input_dim": 24,
            "cross_attention_input_dim": 20,
        },
        lambda rows: {
            "hidden_states": rows(8, 16),
            "encoder_hidden_states": rows(6, 20),
            "global_hidden_states": rows(1, 24),
            "rotary_embedding": get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False),
        },
        time_scale=1e-3,
    ),
    Denoiser(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 20,
            "global_cond_dim": 24,
            "local_add_cond_dim": 9,
            "timestep_features_dim": 32,
            "num_memory_tokens": 4,
        },
        lambda rows: {
            "hidden_states": rows(8, 16),
            "encoder_hidden_states": rows(6, 20),
            "global_hidden_states": rows(24),
            "encoder_attention_mask": rows.mask(6),
        },
        time_scale=1e-3,
    ),
    Denoiser(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,  # one with a sliding window, one without
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
            "encoder_hidden_size": 24,
        },
        lambda rows: {
            "hidden_states": rows(16, 4),
            "encoder_hidden_states": rows(6, 24),
            "context_latents": rows(16, 8),
            "attention_kwargs": None,
        },
        more_times=("timestep_r",),
        time_scale=1e-3,
    ),
    Denoiser(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 24, "latent_dim": 8},
        lambda rows: {
            "hidden_states": rows(16, 8),
            "encoder_hidden_states": rows(6, 24),
            "encoder_attention_mask": rows.mask(6),
            "attention_mask": torch.ones(len(rows), 16, dtype=torch.bool),
            "latent_cond": rows(16, 8),
        },
        time_scale=1e-3,
        return_dict=None,
    ),
    Denoiser(
        "MiniMaxMusic3Transformer1DModel",
        HEADS
        | {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 32,
        },
        lambda rows: {"hidden_states": rows(8, 16), "encoder_hidden_states": rows(16, 16)},
        time_scale=1e-3,
    ),
    Denoiser(
        "T5FilmDecoder",
        {
            "input_dims": 8,
            "targets_length": 16,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 48,
        },
        lambda rows: {
            "encodings_and_masks": [(rows(6, 32), rows.mask(6)), (rows(4, 32), rows.mask(4))],
            "decoder_input_tokens": rows(16, 8),
        },
        time_argument="decoder_noise_time",
        time_scale=1e-3,
        return_dict=None,
    ),
)
