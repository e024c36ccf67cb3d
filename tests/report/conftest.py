"""Two small denoisers, quantized without learning, and their full-precision trajectories.

One is a class-conditional U-Net. The other is of no library: it is guided by prompts, uses a layer twice in a call and
another one only when it is told to, and gives its tokens to a layer with the sequence first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.calib_data import LoadedModel, LoopSampler, Sampled, Sampler
from ptq_tdq.calibration import calibrate
from ptq_tdq.config import Config
from ptq_tdq.evaluate.trajectories import Reference, make_reference
from ptq_tdq.identity import model_sha256
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel

QUICK = Config().changed(
    {
        "rounding": "nearest",
        "activation_iterations": 0,
        "method": "step-table",
        "scheme": "W4A4",
        "weight_only_layers": "time_embedding",
        "samples_per_step": 2,
        "calibration_steps": 3,
        "num_inference_steps": 3,
    }
)
PROMPTS = ("A red fox asleep in fresh snow at the very first light of dawn", "A kite")


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=3,
    )
    unet.eval().requires_grad_(False)
    return LoadedModel(unet, "tiny", model_sha256(unet), sampler=LoopSampler(unet, DDIMScheduler()))


@pytest.fixture(scope="session")
def quantized(model: LoadedModel) -> QuantizedModel:
    """The U-Net at W4A4, x_t quantized too; tests leave it as it is."""
    return calibrate(model, QUICK)


@pytest.fixture(scope="session")
def reference(model: LoadedModel) -> Reference:
    return make_reference(model, samples=4, num_inference_steps=3, seed=0)


class Toy(nn.Module):
    """Predicts tokens [B, 5, 8] from noisy ones, t and the vector of a prompt."""

    extra = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.sequence, self.optional, self.last = (nn.Linear(8, 8) for _ in range(5))
        self.time = nn.Linear(2, 8)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, tokens: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        t = timestep.float().expand(len(tokens)) / 1000
        x = self.first(tokens) + self.time(torch.stack([t.sin(), t.cos()], 1))[:, None] + prompt[:, None]
        x = x + self.twice(self.twice(x).relu())
        x = x + self.sequence(x.transpose(0, 1)).transpose(0, 1)  # 5 rows, however many samples there are
        if self.extra:
            x = x + self.optional(x)
        q = x[:, None]
        x = x + functional.scaled_dot_product_attention(q, q, q)[:, 0]
        return self.last(x), x


class Guided(Sampler):
    """Classifier-free guidance: each call holds every sample twice, without and with its prompt."""

    batch = 4

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler()

    def conditions(self, count: int) -> list[Any]:
        return [PROMPTS[i % 2] for i in range(count)]

    def recipe(self) -> dict[str, Any]:
        return {"prompts": list(PROMPTS)}

    @torch.no_grad()
    def run(
        self,
        denoiser: nn.Module,
        conditions: Sequence[Any],
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        schedule: Any,
    ) -> Sampled:
        schedule.set_timesteps(num_inference_steps)
        x = torch.stack([torch.randn(5, 8, generator=generator) for generator in generators])
        said = torch.tensor([[len(text) / 50] * 8 for text in conditions])
        prompt = torch.cat([torch.zeros_like(said), said])
        for t in schedule.timesteps:
            without, guided = denoiser(torch.cat([x, x]), timestep=t, prompt=prompt)[0].chunk(2)
            x = schedule.step(without + 2 * (guided - without), t, x, return_dict=False)[0]
        return Sampled(x, None)


@pytest.fixture(scope="session")
def toy() -> LoadedModel:
    torch.manual_seed(0)
    denoiser = Toy().eval().requires_grad_(False)
    return LoadedModel(denoiser, "toy", model_sha256(denoiser), sampler=Guided())


@pytest.fixture(scope="session")
def toy_reference(toy: LoadedModel) -> Reference:
    return make_reference(toy, samples=4, num_inference_steps=3, seed=0)


@pytest.fixture(scope="session")
def quantized_toy(toy: LoadedModel, toy_reference: Reference) -> QuantizedModel:
    """The toy with the same interval in every activation quantizer; tests leave it as it is."""
    axis = toy_reference.calls.axis
    quantized = QuantizedModel.copy_of(toy.denoiser, axis, make_plan(toy.denoiser, QUICK, toy_reference.calls).layers)
    for layer in quantized.layers().values():
        scale = layer.weight.abs().amax(1) / 7
        zero = torch.full(scale.shape, 8)
        layer.assign(0, (layer.weight / scale[:, None]).round() + 8, scale, zero)
    for quantizer in quantized.quantizers().values():
        quantizer.source = TableSource(torch.full((axis.length,), 0.3), torch.full((axis.length,), 8))
    return quantized.finalize()
