"""A small artifact, changes to it by somebody who writes artifacts by other means, and a process that may crash."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from recorded import calls_of, images
from torch import nn
from unets import tiny_unet

from ptq_tdq import calibrate, preset
from ptq_tdq.artifacts import Artifact

STEPS = 10


def small_unet(**changes: Any) -> UNet2DModel:
    """8 and 16 channels, attention, split shortcuts, class labels."""
    return tiny_unet(**{"attention_head_dim": 8, "num_class_embeds": 3, **changes})


def small_dit() -> DiTTransformer2DModel:
    """A transformer of the same images and labels: 16 tokens, two blocks, two heads."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    return DiTTransformer2DModel(**sizes, in_channels=3, num_embeds_ada_norm=3, norm_num_groups=1).eval()


@functools.cache
def small_artifact(make: Callable[[], nn.Module] = small_unet) -> Artifact:
    """W4A8 of a small model everywhere, so that it runs in integers on any processor; not to be changed."""
    model, t, labels = make(), torch.tensor([0.0, 3.0, 6.0, 9.0]), torch.arange(4) % 3
    calls = calls_of(model, images(4), t, class_labels=labels, num_train_timesteps=STEPS)
    config = preset(
        "default",
        method="static",
        eight_bit_layers=(),
        rounding="nearest",
        round_again=False,
        activation_iterations=0,
        weight_range="minmax",
        activation_range="minmax",
    )
    return calibrate(model, config, calls).to_artifact()


def with_layer(artifact: Artifact, name: str, /, **changes: Any) -> Artifact:
    """The artifact with another record of one layer."""
    layers = tuple(replace(layer, **changes) if layer.name == name else layer for layer in artifact.layers)
    return replace(artifact, layers=layers)


def with_tensor(artifact: Artifact, part: str, name: str, tensor: torch.Tensor | None) -> Artifact:
    """The artifact with another tensor in one of its dictionaries, or without it."""
    changed = dict(getattr(artifact, part))
    changed.pop(name, None)
    if tensor is not None:
        changed[name] = tensor
    return replace(artifact, **{part: changed})


def with_config(artifact: Artifact, **changes: Any) -> Artifact:
    """The artifact with other entries in the configuration of its model; None removes one."""
    config = {**artifact.config["model_config"], **changes}
    config = {key: value for key, value in config.items() if value is not None}
    return replace(artifact, config={**artifact.config, "model_config": config})


def run_python(script: str, *args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, which may crash."""
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600)
