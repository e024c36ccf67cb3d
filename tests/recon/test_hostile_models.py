"""Models and inputs at the edge of float32: an artifact of finite numbers, or one error that names the place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from recorded import calls_of
from torch import Tensor, nn

from ptq_tdq.artifacts import encode_artifact
from ptq_tdq.calibration import calibrate
from ptq_tdq.config import preset
from ptq_tdq.errors import NonFiniteError
from ptq_tdq.observe import Observer
from ptq_tdq.recon.activations import freeze

Change = Callable[[UNet2DModel, Tensor], None]
LAST, FIRST = slice(0, 4), slice(4, 8)  # samples at t = 999 and at t = 1

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"method": "tdq-thin", "module_start": "static", "weight_iterations": 2},
    "paper": {"method": "tdq", "weight_iterations": 2},
    "qdiff": {"method": "S_2", "rounding": "gptq", "bias_lr": 1e-3, "loss_weights": "relative"},
}


def every(model: UNet2DModel, name: str, value: float) -> None:
    for key, parameter in model.named_parameters():
        if name in key:
            parameter.fill_(value)


FINISHED: dict[str, Change] = {
    "all zeros": lambda model, x: every(model, "", 0.0),
    "zero weights": lambda model, x: every(model, "weight", 0.0),
    "zero inputs": lambda model, x: x.zero_(),
    "a zero channel": lambda model, x: x[:, 0].zero_(),
    "inputs that are zero at one t": lambda model, x: x[FIRST].zero_(),
    "constant inputs": lambda model, x: x.fill_(3.7),
    "equal channels": lambda model, x: x.copy_(x[:, :1].expand_as(x)),
    "dead channels": lambda model, x: model.conv_in.weight[:4].zero_(),
    "tiny inputs": lambda model, x: x.mul_(1e-38),
    "huge inputs at one t": lambda model, x: x[LAST].mul_(1e18),
    "a gain of 1e19": lambda model, x: model.up_blocks[0].resnets[0].norm1.weight.fill_(1e19),
    "a gain of 1e19 of one channel": lambda model, x: model.up_blocks[0].resnets[0].norm1.weight[0].fill_(1e19),
    "huge last weights": lambda model, x: model.conv_out.weight.mul_(1e30),
}
REFUSED: dict[str, tuple[Change, str]] = {
    "inputs of 1e38 at one t": (lambda model, x: x[LAST].mul_(1e38), r"down_blocks\.0\.resnets\.0 .* t = 999"),
    "all gains 1e19": (lambda model, x: every(model, "norm.weight", 1e19), r"up_blocks\.0\.attentions\.\d .* t = 999"),
    "weights of 3e38": (lambda model, x: model.conv_in.weight.fill_(3e38), r"conv_in .* t = 999"),
}


@pytest.fixture
def hostile(tiny_unet: Callable[..., UNet2DModel]) -> Callable[[Change, str], Any]:
    def run(change: Change, name: str) -> Any:
        model = tiny_unet(
            sample_size=4,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("AttnUpBlock2D",),
            add_attention=False,
        )
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([999.0, 1.0]).repeat_interleave(4)
        change(model, x)
        config = preset(name, compute_dtype="float32", activation_iterations=2, batch_size=4, **PRESETS[name])
        return calibrate(model, config, calls_of(model, x, t))

    return run


@pytest.mark.parametrize(
    ("case", "name", "flush"),  # flush: subnormal numbers count as 0, as in the command line
    [
        *((case, "default", False) for case in FINISHED),
        *zip(FINISHED, itertools.cycle(("paper", "qdiff")), itertools.repeat(False)),
        *itertools.product(("all zeros", "tiny inputs"), PRESETS, (True,)),
    ],
)
def test_what_can_be_represented_is_finished(case: str, name: str, flush: bool, hostile: Any) -> None:
    torch.set_flush_denormal(flush)
    artifact = hostile(FINISHED[case], name).to_artifact()
    encode_artifact(artifact)  # which checks every number
    tensors = [*artifact.weight_scale.values(), *(t.scale for t in artifact.tables.values() if t.scale is not None)]
    assert all(bool((tensor >= torch.finfo(torch.float32).tiny).all()) for tensor in tensors)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_represented_names_the_place_and_t(case: str, name: str, hostile: Any) -> None:
    change, said = REFUSED[case]
    with pytest.raises(NonFiniteError, match=said):
        hostile(change, name)


def test_a_weight_whose_range_overflows_names_its_layer(hostile: Any) -> None:
    def change(model: UNet2DModel, x: Tensor) -> None:
        x.zero_()
        model.conv_in.weight[0].fill_(3e38)
        model.conv_in.weight[0, 0].neg_()

    with pytest.raises(NonFiniteError, match="conv_in has weights that are too large for an interval in float32"):
        hostile(change, "paper")


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(hostile: Any, parameter: str, value: float) -> None:
    def change(model: UNet2DModel, x: Tensor) -> None:
        getattr(model.mid_block.resnets[0].conv1, parameter).view(-1)[3] = value

    with pytest.raises(NonFiniteError, match=rf"'mid_block\.resnets\.0\.conv1\.{parameter}' has NaN or Inf"):
        hostile(change, "paper")


def test_a_weight_that_is_computed_and_not_finite_is_named(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model = tiny_unet()
    calls = calls_of(model, torch.zeros(2, 3, 8, 8), torch.zeros(2))
    model.conv_in.weight.zero_()
    torch.nn.utils.parametrizations.weight_norm(model.conv_in).requires_grad_(False)  # 0 / 0
    with pytest.raises(NonFiniteError, match=r"'conv_in\.weight' has NaN or Inf"):
        calibrate(model, preset("default"), calls)


def test_a_tensor_that_calibration_never_visits_is_checked_too(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model = tiny_unet(num_class_embeds=3)
    model.class_embedding.weight[2, 0] = torch.nan
    calls = calls_of(model, torch.zeros(2, 3, 8, 8), torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(NonFiniteError, match=r"'class_embedding\.weight' has NaN or Inf"):
        calibrate(model, preset("default"), calls)


def test_activations_whose_range_overflows_name_layer_and_t() -> None:
    observer = Observer("conv", torch.tensor([3.0, 7.0]))
    observer.see(torch.tensor([[-3e38, 0.0], [0.0, 1.0]]), torch.tensor([7.0, 3.0]))
    observer.see(torch.tensor([[1e38, 0.0]]), torch.tensor([3.0]))
    with pytest.raises(NonFiniteError, match=r"conv has activations from -3e\+38 to 1e\+38, the largest at t = 7:"):
        observer.start_counting()


def test_an_interval_that_is_learned_away_names_layer_and_t(hostile: Any) -> None:
    quantized = hostile(lambda model, x: None, "qdiff")
    name, quantizer = next(iter(quantized.quantizers().items()))
    quantizer.source.scale[5] = torch.inf
    with pytest.raises(NonFiniteError, match=f"{name} has learned an interval that float32 cannot hold at t = 5"):
        freeze(quantizer, 1000)


@pytest.mark.parametrize("one_sign", [False, True])
def test_activations_at_the_end_of_float16_name_the_layer_and_another_dtype(one_sign: bool) -> None:
    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
            self.middle = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            y = self.first(sample)
            h = y.clone()
            h[:, 3, 0, 0], h[:, 4, 0, 0] = 65504.0, -30000.0
            result: Tensor = self.last(y + self.middle(h) / 1000)
            return result

    model, t = Edge().half().requires_grad_(False), torch.tensor([900, 100]).repeat(4)
    model.middle.weight[:, 3:5].mul_(0.05)
    if one_sign:
        model.middle.weight.abs_()
    config = preset("default", scheme="W8A8", method="static", activation_iterations=2, rotate="none")
    with pytest.raises(NonFiniteError, match=r"middle g.* NaN or Inf at t = .*: calibrate the model in bfloat16"):
        calibrate(model, config, calls_of(model, torch.randn(8, 3, 8, 8).half(), t))
