"""The models that the runtime benchmarks run, and how they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor

from ptq_tdq import load_model, record
from ptq_tdq.calls import Calls


def make_model(name: str, folder: Path) -> Any:
    """What :func:`load_model` finds, the embedded U-Net for "embedded".

    "random" is a U-Net 64-128-128 at 32x32 with heads of 64 channels and random weights.
    """
    if name != "random":
        return load_model("reference" if name == "embedded" else name)
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    ).save_pretrained(folder / name)
    DDIMScheduler().save_pretrained(folder / name)
    return load_model(str(folder / name))


def conditional_unet() -> tuple[UNet2DConditionModel, Calls]:
    """A U-Net of Stable Diffusion 1.5's proportions at a quarter of its width, random weights, with calls of it."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=64, block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=16
    )
    model.eval().requires_grad_(False)
    with torch.no_grad(), record(model, num_train_timesteps=1000) as calls:
        for t in (900, 600, 300, 1):
            model(torch.randn(1, 4, 64, 64), torch.full((1,), t), encoder_hidden_states=torch.randn(1, 77, 192))
    return model, calls


def call_of(calls: Calls, batch: int, t: float) -> dict[str, Any]:
    """A call of ``batch`` rows, all at time step ``t``: those that were recorded nearest to it."""
    away = (calls.axis.t(calls.groups[0].leaf(calls.axis.argument)) - t).abs()
    nearest = torch.nonzero(away == away.min()).flatten()
    arguments = calls.inputs(nearest[torch.arange(batch) % len(nearest)])
    return {**arguments, calls.axis.argument: at(calls, batch, t)}


def at(calls: Calls, batch: int, t: float) -> Tensor:
    """The model's own time argument for ``batch`` rows at ``t``, of the dtype that was recorded."""
    value = calls.axis.value(torch.full((batch,), float(t)))
    return value.to(calls.groups[0].leaf(calls.axis.argument).dtype)
