"""Whole models with quantizers in them: off they are the original, on they follow each sample's t."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from recorded import calls_of
from torch import Tensor, nn

from ptq_tdq.config import preset
from ptq_tdq.errors import ModelError, TimestepError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.identity import model_sha256
from ptq_tdq.intervals import Observed
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.observe import Observer
from ptq_tdq.plan import make_plan
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon.weights import initialize
from ptq_tdq.search import QParams
from ptq_tdq.wrap import folded_copy

T = 1000
MODELS: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "classes": {"num_class_embeds": 3},
    "timestep-classes": {"class_embed_type": "timestep"},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "no-attention": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
}


def inputs_of(options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs: dict[str, Any] = {"sample": torch.randn(4, 3, 8, 8), "timestep": torch.tensor([999, 3, 500, 3])}
    if "num_class_embeds" in options or "class_embed_type" in options:
        inputs["class_labels"] = torch.tensor([2, 0, 1, 1])
    return inputs


def wrap(model: nn.Module, inputs: dict[str, Any], scheme: str = "W8A8", **choices: Any) -> QuantizedModel:
    config = preset("qdiff", scheme=scheme, method="static", **choices)
    calls = calls_of(model, **inputs)
    quantized = QuantizedModel.copy_of(model, calls.axis, make_plan(model, config, calls).layers)
    for layer in quantized.layers().values():
        initialize(layer, config)
    return quantized


def calibrate(quantized: QuantizedModel, inputs: dict[str, Any], over_time: Tensor) -> None:
    """Static min-max intervals of these inputs, times ``over_time`` [T + 1]."""
    steps = inputs["timestep"].unique().float()
    quantizers = quantized.quantizers()
    for name, quantizer in quantizers.items():
        quantizer.observer = Observer(name, steps)
    quantized(**inputs)
    for quantizer in quantizers.values():
        assert quantizer.observer is not None
        quantizer.observer.start_counting()
    quantized(**inputs)
    for quantizer in quantizers.values():
        observer, quantizer.observer = quantizer.observer, None
        assert observer is not None
        from_zero = quantizer.record.from_zero
        found = Observed(T, steps, observer.histogram(), quantizer.qtype, "minmax", from_zero).static
        quantizer.source = TableSource(found.scale * over_time, found.zero_point.expand(T + 1))
    quantized.quantize()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", [True, False])
def test_with_quantizers_off_the_model_is_the_original_bit_for_bit(
    tiny_unet: Callable[..., UNet2DModel], name: str, attention: bool
) -> None:
    model, inputs = tiny_unet(**MODELS[name]), inputs_of(MODELS[name])
    expected = model(**inputs).sample
    quantized = wrap(model, inputs, attention=attention)
    assert torch.equal(quantized(**inputs).sample, expected)
    assert torch.equal(quantized(**inputs, return_dict=False)[0], expected)
    assert torch.equal(model(**inputs).sample, expected), "the original has no quantizers"


@pytest.mark.parametrize("name", MODELS)
def test_8_bits_are_close_and_3_bits_are_not(tiny_unet: Callable[..., UNet2DModel], name: str) -> None:
    model, inputs = tiny_unet(**MODELS[name]), inputs_of(MODELS[name])
    expected = model(**inputs).sample
    ratio = {}
    for scheme in ("W8A8", "W3A3"):
        quantized = wrap(model, inputs, scheme)
        calibrate(quantized, inputs, torch.ones(T + 1))
        ratio[scheme] = sqnr_db(expected, quantized(**inputs).sample)
    assert ratio["W8A8"] > 25
    # each bit halves the interval: 6 dB; 5 bits make 30
    assert 15 < ratio["W8A8"] - ratio["W3A3"] < 45


def test_samples_of_a_batch_get_the_intervals_of_their_own_time_steps(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model, inputs = tiny_unet(**MODELS["classes"]), inputs_of(MODELS["classes"])
    quantized = wrap(model, inputs)
    calibrate(quantized, inputs, torch.linspace(0.3, 4, T + 1))
    together = quantized(**inputs).sample
    for i, one_t in enumerate(inputs["timestep"].tolist()):
        # the same batch at one t, since a batch of one may sum in another order and flip a code
        at_one_t = quantized(inputs["sample"], one_t, inputs["class_labels"]).sample
        assert torch.equal(at_one_t[i], together[i])
        alone = quantized(**{k: v[i : i + 1] for k, v in inputs.items()}).sample[0]
        scalar = quantized(inputs["sample"][i : i + 1], one_t, inputs["class_labels"][i : i + 1]).sample[0]
        assert torch.equal(scalar, alone)


def test_the_table_entry_of_t_is_used_and_of_no_other_step(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model, inputs = tiny_unet(), inputs_of({})
    quantized = wrap(model, inputs)
    calibrate(quantized, inputs, torch.ones(T + 1))
    expected = quantized(**inputs).sample
    used = inputs["timestep"].unique()
    for quantizer in quantized.quantizers().values():
        assert isinstance(quantizer.source, TableSource)
        others = torch.ones(T + 1, dtype=torch.bool).index_fill(0, used, False)
        quantizer.source.scale = torch.where(others, torch.nan, quantizer.source.scale)
    assert torch.equal(quantized(**inputs).sample, expected)
    assert not bool(quantized(inputs["sample"], 42).sample.isfinite().any())


@pytest.mark.parametrize("t", [1001, -1])
def test_a_time_step_outside_the_tables_is_an_error(tiny_unet: Callable[..., UNet2DModel], t: int) -> None:
    model, inputs = tiny_unet(), inputs_of({})
    quantized = wrap(model, inputs)
    calibrate(quantized, inputs, torch.ones(T + 1))
    with pytest.raises(TimestepError, match="0 to 1000"):
        quantized(inputs["sample"], t)


def test_as_many_time_steps_as_samples(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model, inputs = tiny_unet(), inputs_of({})
    quantized = wrap(model, inputs)
    calibrate(quantized, inputs, torch.ones(T + 1))
    with pytest.raises(TimestepError, match="11 values of timestep for"):
        quantized(inputs["sample"], torch.zeros(11))


def test_other_intervals_hold_inside_the_block_only(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model, inputs = tiny_unet(), inputs_of({})
    quantized = wrap(model, inputs)
    calibrate(quantized, inputs, torch.ones(T + 1))
    expected = quantized(**inputs).sample
    coarse = {n: QParams(q.source(torch.tensor([0]), inputs["sample"])[0][0] * 8, torch.tensor(128, dtype=torch.int32))
              for n, q in quantized.quantizers().items() if q.source is not None}  # fmt: skip
    with pytest.raises(KeyError), quantized.intervals(coarse):
        assert sqnr_db(expected, quantized(**inputs).sample) < 20
        raise KeyError
    assert torch.equal(quantized(**inputs).sample, expected)


def test_finalized_weights_are_the_quantized_ones(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model, inputs = tiny_unet(), inputs_of({})
    quantized = wrap(model, inputs, "W4A8")
    quantized.quantize(weights=True, activations=False)
    expected = quantized(**inputs).sample
    quantized.finalize().quantize(weights=False, activations=False)
    assert torch.equal(quantized(**inputs).sample, expected)
    for name, layer in quantized.layers().items():
        levels = max(row.unique().numel() for row in layer.weight.flatten(1))
        assert levels <= 16 * len(layer.ranges), name


def test_a_plan_of_another_model_is_an_error(tiny_unet: Callable[..., UNet2DModel]) -> None:
    deep, shallow = tiny_unet(layers_per_block=2), tiny_unet()
    calls = calls_of(deep, **inputs_of({}))
    plan = make_plan(deep, preset("qdiff"), calls)
    with pytest.raises(ModelError, match="no layer named"):
        QuantizedModel.copy_of(shallow, calls.axis, plan.layers)


def test_a_custom_model_of_one_dimension_follows_t(tiny_unet: Callable[..., UNet2DModel]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(11, 3, 3, padding=1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            h = self.a(sample).tanh()
            result: Tensor = self.b(torch.cat([h, sample], dim=1))
            return result

    model, inputs = (
        Net().requires_grad_(False),
        {"sample": torch.randn(4, 3, 16), "timestep": torch.tensor([0, 9, 5, 0])},
    )
    expected = model(**inputs)
    quantized = wrap(model, inputs)
    assert list(quantized.layers()) == ["a", "b"]
    assert list(quantized.quantizers()) == ["a", "b.0", "b.1"]
    assert torch.equal(quantized(**inputs), expected)
    calibrate(quantized, inputs, torch.where(torch.arange(T + 1) == 9, 30.0, 1.0))
    found = quantized(**inputs)
    error = [sqnr_db(expected[i], found[i]) for i in range(4)]
    assert min(error[0], error[2], error[3]) > 30 and error[1] < 20, "only the sample at t = 9 has coarse intervals"


def test_the_wrapped_model_shows_what_a_pipeline_asks_for(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model = tiny_unet()
    quantized = wrap(model, inputs_of({}))
    assert quantized.config == model.config
    assert quantized.dtype == torch.float32 and quantized.device == torch.device("cpu")
    with pytest.raises(ModelError, match="not calibrated"):
        quantized.to_artifact()


def test_calls_in_eight_threads_do_not_disturb_each_other(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model, inputs = tiny_unet(), inputs_of({})
    quantized = wrap(model, inputs)
    calibrate(quantized, inputs, torch.linspace(0.3, 4, T + 1))
    x, steps = inputs["sample"], [float(t) for t in torch.linspace(0, T, 24)]
    alone = [quantized(x, t).sample for t in steps]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda t: quantized(x, t).sample, steps))
    assert all(map(torch.equal, together, alone))
    assert not torch.equal(alone[0], alone[-1])


@dataclass
class Output:
    sample: Tensor
    rows: list[Tensor]


class Mixed(nn.Module):
    """Tokens first: inside, no row is of one sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Output:
        y = self.a(sample.transpose(0, 1)).transpose(0, 1)
        return Output(y, list(y))


def test_samples_at_several_time_steps_are_right_also_where_rows_are_of_no_sample() -> None:
    model = Mixed().requires_grad_(False)
    x, t = torch.randn(4, 2, 4), torch.tensor([0.0, 999.0, 999.0, 0.0])
    inputs = {"sample": x, "timestep": t}
    quantized = wrap(model, inputs)
    quantized.provenance = {"one_step": True}
    calibrate(quantized, inputs, torch.linspace(0.3, 9, T + 1))
    together = quantized(x, t)
    for i in range(4):
        alone = quantized(x, t[i]).sample
        assert torch.equal(together.sample[i], alone[i]) and torch.equal(together.rows[i], alone[i])


def test_times_per_token_stay_those_of_their_sample_where_rows_are_of_no_sample() -> None:
    class Timed(Mixed):
        def forward(self, sample: Tensor, timestep: Tensor) -> Output:
            return super().forward(sample + timestep[..., None] / 1000, timestep)

    model = Timed().requires_grad_(False)
    inputs = {"sample": torch.randn(3, 2, 4), "timestep": torch.tensor([[0.0, 999.0], [999.0, 500.0], [7.0, 0.0]])}
    quantized = wrap(model, inputs)
    quantized.provenance = {"one_step": True}
    calibrate(quantized, inputs, torch.linspace(0.3, 9, T + 1))
    together = quantized(**inputs).sample
    for i in range(3):
        alone = quantized(**{name: x[i : i + 1] for name, x in inputs.items()}).sample
        torch.testing.assert_close(together[i], alone[0])


def test_layers_that_share_a_weight_are_quantized_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.a, self.b = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.weight = self.b.weight = self.embed.weight

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(sample).tanh()) + self.embed(timestep.long() % 4)
            return result

    model = Tied().requires_grad_(False)
    inputs = {"sample": torch.randn(4, 4), "timestep": torch.tensor([999, 3, 500, 3])}
    quantized, expected = wrap(model, inputs, "W3A8"), model.embed.weight.clone()
    quantized.quantize(weights=True, activations=False)
    before = quantized(**inputs)
    quantized.finalize().quantize(weights=False, activations=False)
    assert torch.equal(quantized(**inputs), before)
    assert torch.equal(quantized.model.embed.weight, expected) and torch.equal(model.embed.weight, expected)


REPARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "pruning": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrized_weights_are_made_plain(name: str) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = REPARAMETRIZED[name](nn.Conv1d(3, 4, 3))
            self.b = nn.Conv1d(4, 3, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(sample))
            return result

    model = Normed().eval()
    inputs = {"sample": torch.randn(4, 3, 8), "timestep": torch.tensor([999, 3, 500, 3])}
    expected = model(**inputs).detach()  # with gradients, so that a weight that a hook computes is no leaf
    folded = folded_copy(model)
    torch.testing.assert_close(folded(**inputs), expected)
    quantized = wrap(folded, inputs)
    assert list(quantized.layers()) == ["a", "b"]
    assert torch.equal(quantized(**inputs), folded(**inputs))
    with torch.no_grad():
        assert torch.equal(model(**inputs), expected), "the original stays as it is"


@torch.no_grad()
def test_compiled_parts_are_what_they_were_compiled_from() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.SiLU())), torch.randn(2, 4)
    expected, sha256, names = model(x), model_sha256(model), list(model.state_dict())
    inner = model[1]
    inner[0] = torch.compile(inner[0], backend="eager")
    model[1] = torch.compile(inner, backend="eager")
    model.append(model[1])
    copied = folded_copy(model)
    assert [type(part) for part in copied] == [nn.Linear, nn.Sequential, nn.Sequential] and copied[1] is not inner
    assert list(copied[:2].state_dict()) == names
    assert torch.equal(copied[:2](x), expected)
    assert copied[1][0].weight.data_ptr() == inner[0].weight.data_ptr()
    assert model_sha256(model[:2]) == sha256


@torch.no_grad()
def test_hooks_of_a_compiled_part_are_those_of_the_copy() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    model.register_forward_pre_hook(lambda _, args: args[0] + 1)
    model.register_forward_hook(lambda _, args, y: y + args[0])
    around = torch.compile(model, backend="eager")
    around.register_forward_pre_hook(lambda _, args, given: ((3 * args[0],), given), with_kwargs=True)
    around.register_forward_hook(lambda _, args, given, y: 2 * y, with_kwargs=True)
    assert torch.equal(folded_copy(around)(x), around(x))
    assert torch.equal(folded_copy(nn.Sequential(around))(x), around(x))


def test_a_compiled_forward_is_that_of_the_copy() -> None:
    class Inside(nn.Sequential):
        def forward(self, sample: Tensor) -> Tensor:
            y: Tensor = super().forward(sample)
            return y

    model, x = Inside(nn.Linear(4, 4)), torch.randn(2, 4)
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    copied = folded_copy(model)
    assert copied.forward.__self__ is copied  # type: ignore[attr-defined]
    assert torch.equal(copied(x), copied[0](x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.jit.script(nn.Linear(4, 4)), "'0' is TorchScript"),
        (lambda: nn.LazyLinear(4), "lazy layer '0' was never called"),
    ],
)
def test_what_cannot_be_copied_is_said_to_be(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        folded_copy(nn.Sequential(make(), nn.Linear(4, 4)))


@pytest.mark.parametrize("held", [Lock(), (i for i in range(3))], ids=["lock", "generator"])
def test_an_attribute_that_cannot_be_copied_is_named(held: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].held, model.fn = held, model[1].forward  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"cannot be copied, because of '1\.held' \(cannot pickle .* to None first"):
        folded_copy(model)


def test_a_weight_that_a_hook_of_ones_own_sets_is_said_to_stay() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.raw = self.a.weight
            del self.a.weight
            self.a.register_forward_pre_hook(lambda layer, args: setattr(layer, "weight", 2 * layer.raw))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(sample).tanh())
            return result

    model = Hooked().requires_grad_(False)
    calls = calls_of(model, sample=torch.randn(2, 4), timestep=torch.tensor([999, 3]))
    plan = make_plan(folded_copy(model), preset("default", scheme="W8A8"), calls)
    assert [record.name for record in plan.layers] == ["b"]
    assert "In floating point: a, since" in plan.notices[0]
