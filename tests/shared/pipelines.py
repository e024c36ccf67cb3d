"""Small pipelines of diffusers with random weights, made on the spot: every kind of call that a denoiser can get.

Layers, schedulers and the order of arguments are those of the published pipelines; only the widths are small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import printable
from typing import Any, Literal

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

CLIP_WIDTH = 16
T5_WIDTH = 32
PROMPT_LENGTH = 64
TWO_STEPS = {"num_inference_steps": 2}
IMAGE = TWO_STEPS | {"height": 16, "width": 16, "output_type": "latent"}


@dataclass(frozen=True)
class SmallPipeline:
    """``save`` writes a folder for ``DiffusionPipeline.from_pretrained``; ``pipe(**condition, **call)`` is a short run.

    Attributes:
        name: the pipeline's class in diffusers.
        components: makes what the class is built from.
        call: the arguments of a run of two steps, besides the condition.
        condition: the argument by which a run is told what to draw, if there is one.
        denoiser: the component that predicts; WanPipeline has a second one, ``transformer_2``, for low noise.
    """

    name: str
    components: Callable[[], dict[str, Any]]
    call: dict[str, Any]
    condition: Literal["prompt", "class_labels"] | None
    denoiser: Literal["unet", "transformer"]

    def save(self, folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = getattr(diffusers, self.name)(**self.components())
        pipe.save_pretrained(folder)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which each byte is a token, the last one of a word marked as such, and "th" is another."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{a}</w>" for a in alphabet), "th"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [("t", "h")], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram model with one token per printable ASCII character."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", *printable.split()[0]]
    return T5Tokenizer([(token, -1.0) for token in tokens], extra_ids=0, model_max_length=PROMPT_LENGTH)


def clip(kind: type[CLIPTextModel | CLIPTextModelWithProjection], tokenizer: CLIPTokenizer) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**t5_options(tokenizer))).eval()


def umt5(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**t5_options(tokenizer))).eval()


def t5_options(tokenizer: T5Tokenizer) -> dict[str, Any]:
    return {"vocab_size": len(tokenizer), "d_model": T5_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


def image_vae(**options: Any) -> diffusers.AutoencoderKL:
    """Halves each side of an image."""
    return diffusers.AutoencoderKL(
        latent_channels=4,
        **options,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )


def stable_diffusion() -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": clip(CLIPTextModel, tokenizer),
        "unet": unet(cross_attention_dim=CLIP_WIDTH, attention_head_dim=2),
        "vae": image_vae(),
        "scheduler": diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion_xl() -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    numbers = 6  # two sizes and a corner, embedded one by one beside the pooled prompt
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": clip(CLIPTextModel, tokenizer),
        "text_encoder_2": clip(CLIPTextModelWithProjection, tokenizer),
        "unet": unet(
            cross_attention_dim=2 * CLIP_WIDTH,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=numbers * 8 + CLIP_WIDTH,
        ),
        "vae": image_vae(),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }


def stable_diffusion_3() -> dict[str, Any]:
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer_3,
        "text_encoder": clip(CLIPTextModelWithProjection, tokenizer),
        "text_encoder_2": clip(CLIPTextModelWithProjection, tokenizer),
        "text_encoder_3": t5(tokenizer_3),
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),  # as in 3.5
            qk_norm="rms_norm",
        ),
        "vae": image_vae(shift_factor=0.1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def flux() -> dict[str, Any]:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": clip(CLIPTextModel, tokenizer),
        "text_encoder_2": t5(tokenizer_2),
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=True,  # as in FLUX.1-dev
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": image_vae(shift_factor=0.1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def pixart_sigma() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5(tokenizer),
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=T5_WIDTH,
            use_additional_conditions=False,
        ),
        "vae": image_vae(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
    }


def dit() -> dict[str, Any]:
    return {
        "transformer": diffusers.DiTTransformer2DModel(
            sample_size=8,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_embeds_ada_norm=1000,  # the pipeline's label of "no class" is 1000
        ),
        "vae": image_vae(),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
    }


def ltx() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5(tokenizer),
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=T5_WIDTH,
        ),
        "vae": diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
    }


def wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=T5_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": umt5(tokenizer),
        "transformer": wan_transformer(),
        "transformer_2": wan_transformer(),
        "boundary_ratio": 0.875,  # as in Wan 2.2
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def stable_audio() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5(tokenizer),
        "projection_model": diffusers.StableAudioProjectionModel(T5_WIDTH, 32, min_value=0, max_value=8),
        "transformer": diffusers.StableAudioDiTModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=32,
            cross_attention_input_dim=32,
            global_states_input_dim=2 * 32,  # the start and the end of the sound
            time_proj_dim=16,
        ),
        "vae": diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            sampling_rate=64,
        ),
        # The published one, CosineDPMSolverMultistepScheduler, needs another library (torchsde) for its noise.
        "scheduler": diffusers.EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type="v_prediction"
        ),
    }


def ddpm() -> dict[str, Any]:
    return {
        "unet": diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ),
        "scheduler": diffusers.DDPMScheduler(),
    }


def kandinsky() -> dict[str, Any]:
    """Of KandinskyV22CombinedPipeline: a prior and a decoder, whose pipelines are in it."""
    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return {
        "unet": image_unet(
            in_channels=4,
            out_channels=8,
            encoder_hid_dim=CLIP_WIDTH,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
        ),
        "scheduler": diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
        ),
        "movq": diffusers.VQModel(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            norm_type="group",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        "prior_prior": image_prior(),
        "prior_image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "prior_text_encoder": clip(CLIPTextModelWithProjection, tokenizer),
        "prior_tokenizer": tokenizer,
        "prior_scheduler": image_prior_scheduler(),
        "prior_image_processor": CLIPImageProcessorPil(),
    }


def unclip() -> dict[str, Any]:
    """Of UnCLIPPipeline: four denoisers and three schedulers, none of which is called scheduler."""
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    tokenizer = clip_tokenizer()
    upscalers = [
        diffusers.UNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            norm_num_groups=4,
        )
        for _ in range(2)
    ]
    return {
        "prior": image_prior(),
        "decoder": image_unet(in_channels=3, out_channels=6, class_embed_type="identity"),
        "text_encoder": clip(CLIPTextModelWithProjection, tokenizer),
        "tokenizer": tokenizer,
        "text_proj": UnCLIPTextProjModel(
            clip_extra_context_tokens=2,
            clip_embeddings_dim=CLIP_WIDTH,
            time_embed_dim=4 * 16,
            cross_attention_dim=24,
        ),
        "super_res_first": upscalers[0],
        "super_res_last": upscalers[1],
        "prior_scheduler": image_prior_scheduler(),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(),
    }


def image_unet(**options: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        cross_attention_dim=24,
        **options,
    )


def image_prior() -> diffusers.PriorTransformer:
    return diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=CLIP_WIDTH, additional_embeddings=4
    )


def image_prior_scheduler() -> diffusers.UnCLIPScheduler:
    return diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
    )


GUIDED = IMAGE | {"guidance_scale": 4.0}
SHORT_PROMPT = {"max_sequence_length": PROMPT_LENGTH}
PIXART = GUIDED | SHORT_PROMPT | {"use_resolution_binning": False, "clean_caption": False}
VIDEO = GUIDED | SHORT_PROMPT | {"height": 64, "width": 64, "num_frames": 9}
AUDIO = TWO_STEPS | {"audio_end_in_s": 2.0, "guidance_scale": 4.0, "output_type": "latent"}

PIPELINES = (
    SmallPipeline("StableDiffusionPipeline", stable_diffusion, GUIDED, "prompt", "unet"),
    SmallPipeline("StableDiffusionXLPipeline", stable_diffusion_xl, GUIDED, "prompt", "unet"),
    SmallPipeline("StableDiffusion3Pipeline", stable_diffusion_3, GUIDED | SHORT_PROMPT, "prompt", "transformer"),
    SmallPipeline("FluxPipeline", flux, GUIDED | SHORT_PROMPT, "prompt", "transformer"),
    SmallPipeline("PixArtSigmaPipeline", pixart_sigma, PIXART, "prompt", "transformer"),
    SmallPipeline("DiTPipeline", dit, TWO_STEPS | {"output_type": "pt"}, "class_labels", "transformer"),
    SmallPipeline("LTXPipeline", ltx, VIDEO, "prompt", "transformer"),
    SmallPipeline("WanPipeline", wan, VIDEO, "prompt", "transformer"),
    SmallPipeline("StableAudioPipeline", stable_audio, AUDIO, "prompt", "transformer"),
    SmallPipeline("DDPMPipeline", ddpm, TWO_STEPS | {"output_type": "np"}, None, "unet"),
)
