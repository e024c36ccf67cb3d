"""Residual blocks and attention over pixels as one call of C each, against the same layer by layer: to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.native.library import SWITCH
from ptq_tdq.runtime import IntegerModel
from ptq_tdq.runtime.blocks import FusedAttention, FusedResnet
from ptq_tdq.runtime.passes import MOST

WIDTH, BATCH, EMBEDDED, SIZE = 12, 3, 10, (7, 5)
T = torch.tensor(500.0)
WEIGHTS = {"weight_only_layers": ("time_embedding", "modulation")}


class Denoiser(nn.Module):
    """As a U-Net's: a residual block, attention, and a second block that sees its input again beside the first's."""

    def __init__(self, channels: int = 8, *, groups: int = 2, timed: bool = True, **options: Any) -> None:
        super().__init__()
        self.timed = timed
        given = {"temb_channels": EMBEDDED if timed else None, "out_channels": WIDTH, "groups": groups}
        attended = {"residual_connection": True} | {k: options.pop(k) for k in list(options) if k in ATTENDED}
        self.first = ResnetBlock2D(in_channels=channels, **given, **options)
        self.attention = Attention(WIDTH, heads=2, dim_head=6, norm_num_groups=groups, bias=True, **attended)
        self.last = ResnetBlock2D(in_channels=WIDTH + channels, **given, **options)
        self.table = nn.Embedding(1001, EMBEDDED)
        for parameter in self.parameters():  # nothing is 1 or 0 by chance
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        temb = self.table(timestep.long().expand(len(x))) if self.timed else None
        y = self.attention(self.first(x, temb))
        z: Tensor = self.last(torch.cat([y, x], 1), temb)
        return z


ATTENDED = ("residual_connection", "rescale_output_factor")


def image(batch: int = BATCH, channels: int = 8, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(batch)) * 2 + 0.5


@pytest.fixture
def fused(both: Any, library: Any) -> Callable[..., tuple[Any, IntegerModel]]:
    """``fused(model, **choices)``: a simulated and an integer model, whose blocks are fused."""

    def make(model: nn.Module, x: Tensor | None = None, **choices: Any) -> tuple[Any, IntegerModel]:
        x = image() if x is None else x
        return both(
            model, [{"x": x * (1 + t / 400), "timestep": torch.tensor(t)} for t in (1000.0, 500.0, 1.0)], **choices
        )

    return make


def blocks_of(integer: nn.Module) -> list[Any]:
    """What computes in place of its blocks."""
    found = (vars(module).get("forward") for module in integer.modules())
    return [each for each in found if isinstance(each, FusedResnet | FusedAttention)]


def by_plans(integer: nn.Module) -> list[bool]:
    """Which blocks have computed by plans."""
    return [block.planned is not None and bool(block.planned.plans) for block in blocks_of(integer)]


def layer_by_layer(integer: IntegerModel, x: Tensor, t: Tensor) -> Tensor:
    blocks = blocks_of(integer)
    planned = [block.planned for block in blocks]
    for block in blocks:
        block.planned = None
    try:
        found: Tensor = integer(x, t)
        return found
    finally:
        for block, plans in zip(blocks, planned, strict=True):
            block.planned = plans


def assert_alike(simulated: nn.Module, integer: IntegerModel, *images: Tensor) -> None:
    """In one time step for all, and, for several samples, in one for each."""
    for x in images:
        before = x.clone()
        for t in (T, torch.linspace(20, 999, len(x))):
            with torch.no_grad():
                found, expected = integer(x, t), simulated(x, t)
            assert torch.equal(found, layer_by_layer(integer, x, t))
            assert torch.equal(x, before), "the image may be wanted again, as a skip connection"
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert (found - expected).pow(2).mean() < 2e-3 * expected.pow(2).mean()  # a tie here or there


FORMS: dict[str, dict[str, Any]] = {
    "shortcut": {},
    "no shortcut": {"channels": WIDTH},
    "no time": {"timed": False},
    "no time, no shortcut": {"timed": False, "channels": WIDTH},
    "many groups": {"groups": 4},
    "scaled": {"output_scale_factor": 2.0, "rescale_output_factor": 1.5},
    "no residual": {"residual_connection": False},
}


@pytest.mark.parametrize("scheme", ["W4A8", "W8A8"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, scheme: str, fused: Any) -> None:
    torch.manual_seed(0)
    channels = FORMS[name].get("channels", 8)
    x = image(channels=channels)
    simulated, integer = fused(Denoiser(**FORMS[name]), x, scheme=scheme)
    assert_alike(simulated, integer, x, *(image(1, channels, size) for size in (SIZE, (1, 1), (1, 9), (6, 6))))
    assert by_plans(integer) == [True] * 3


CHOICES: dict[str, dict[str, Any]] = {
    "weights of integers": WEIGHTS,
    "of no step": {"method": "static"},
    "rotated": {"rotate": "hadamard"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str, fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser(), **CHOICES[name])
    assert_alike(
        simulated, integer, image(), image(1), image().double(), image().contiguous(memory_format=torch.channels_last)
    )
    assert by_plans(integer) == [True] * 3


def test_ranges_of_a_shortcut_add_up(fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser())
    assert [len(block.block.conv_shortcut.parts) for block in blocks_of(integer)[::2]] == [1, 2]
    assert_alike(simulated, integer, image(), image(1))
    assert by_plans(integer) == [True] * 3


def test_a_shortcut_in_floating_point_is_computed_before(fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser(), float_input_layers=("shortcut",))
    first = blocks_of(integer)[0]
    assert not first.planned.has_shortcut
    assert_alike(simulated, integer, image(), image(1))
    assert by_plans(integer) == [True] * 3


def test_what_has_no_table_is_computed_layer_by_layer(fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser(), method="dynamic")
    assert_alike(simulated, integer, image(), image(1))
    assert by_plans(integer) == [False] * 3


def test_a_gain_behind_a_norm_is_no_pass(fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser(), equalize="channels")
    assert any(module.gain is not None for module in integer.modules() if hasattr(module, "gain"))
    assert_alike(simulated, integer, image(), image(1))
    assert by_plans(integer) == [True, False, True]


def test_images_of_another_form_are_refused(fused: Any) -> None:
    _, integer = fused(Denoiser(timed=False))
    first, attention, _ = blocks_of(integer)
    with integer.step.call(), pytest.raises(ModelError, match="takes 8 channels"):
        first(image(channels=9))
    with integer.step.call(), pytest.raises(ModelError, match="real numbers"):
        first(image().to(torch.complex64))
    with integer.step.call(), pytest.raises(ModelError, match="takes 12 channels"):
        attention(image(channels=11))


def test_a_time_of_another_form_is_refused(fused: Any) -> None:
    _, integer = fused(Denoiser())
    first = blocks_of(integer)[0]
    for shift in (torch.zeros(2, WIDTH), torch.zeros(BATCH, WIDTH + 1), torch.zeros(BATCH, WIDTH, 1)):
        first._shift = lambda temb, shift=shift: shift
        for plans in (first.planned, None):
            first.planned = plans
            with pytest.raises(RuntimeUnsupportedError, match="shift"):
                integer(image(), T)


def test_a_copy_has_plans_of_its_own(fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser(), **WEIGHTS)
    expected = integer(image(), T)
    other = copy.deepcopy(integer)
    assert not any(by_plans(other))
    for mine, theirs in zip(blocks_of(other), blocks_of(integer), strict=True):
        assert mine.planned.block is mine.block and mine.block is not theirs.block
    del integer
    assert torch.equal(other(image(), T), expected) and all(by_plans(other))


def test_without_native_code_it_computes_the_same(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Denoiser()
    simulated, integer = fused(model)
    monkeypatch.setenv(SWITCH, "0")
    plain = IntegerModel(copy.deepcopy(model), simulated.to_artifact())
    found, expected = plain(image(), T), integer(image(), T)
    assert all(by_plans(integer)) and not any(by_plans(plain))
    assert (found - expected).pow(2).mean() < 1e-4 * expected.pow(2).mean()


def test_calls_of_several_threads_do_not_meet(fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser(), **WEIGHTS)
    calls = [(image(1 + i % 3), torch.tensor(float(i))) for i in range(90)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda call: integer(*call), calls))
    assert all(torch.equal(integer(*call), found) for call, found in zip(calls, together, strict=True))


def test_old_plans_make_room_for_new_ones(fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser())
    sizes = [(1, width) for width in range(1, MOST + 3)]
    first = integer(image(size=sizes[0]), T)
    for size in sizes[1:]:
        integer(image(size=size), T)
    assert {len(block.planned.plans) for block in blocks_of(integer)} == {MOST}
    assert torch.equal(integer(image(size=sizes[0]), T), first)
