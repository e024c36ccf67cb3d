"""What is quantized, against the layers that diffusers' U-Nets are known to have and method section 3's presets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from recorded import calls_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ptq_tdq.calibration import calibrate
from ptq_tdq.calls import Calls
from ptq_tdq.config import Config, preset
from ptq_tdq.errors import ModelError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.plan import Plan, make_plan
from ptq_tdq.records import LayerRecord
from ptq_tdq.wrap import folded_copy

Records = dict[str, LayerRecord]


def plan_of(model: nn.Module, config: Config, *inputs: Tensor, **kwargs: Any) -> Records:
    x, t = inputs or (torch.randn(2, 3, 8, 8), torch.tensor([3, 5]))
    return {r.name: r for r in make_plan(model, config, calls_of(model, x, t, **kwargs)).layers}


def layers_of(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def named(names: set[str], *parts: str) -> set[str]:
    return {n for n in names if any(part in n for part in parts)}


@pytest.fixture
def unet(tiny_unet: Callable[..., UNet2DModel]) -> UNet2DModel:
    return tiny_unet()


def test_qdiff_quantizes_all_layers_and_attention_products_at_the_scheme_bits(unet: UNet2DModel) -> None:
    plan = plan_of(unet, preset("qdiff", scheme="W3A5", method="static"))
    attention = {n for n, r in plan.items() if r.kind == "product"}
    assert set(plan) - attention == layers_of(unet)
    assert attention == {f"{n}.products.0" for n, m in unet.named_modules() if type(m).__name__ == "Attention"}
    assert {plan[n].weight_bits for n in layers_of(unet)} == {3}
    assert {q.bits for n in layers_of(unet) for q in plan[n].inputs} == {5}
    for name in attention:
        q, k, v, softmax = plan[name].inputs
        assert [i.name.removeprefix(name) for i in (q, k, v, softmax)] == [".q", ".k", ".v", ".softmax"]
        assert (q.bits, k.bits, v.bits, softmax.bits) == (5, 5, 5, 8)
        assert [i.from_zero for i in (q, k, v, softmax)] == [False, False, False, True]


def test_paper_leaves_shortcuts_downsampling_and_attention_products_in_floating_point(unet: UNet2DModel) -> None:
    names = layers_of(unet)
    plan = plan_of(unet, preset("paper", scheme="W4A6"))
    assert set(plan) == names - named(names, "conv_shortcut", "downsamplers")
    eight = {"conv_in", "conv_out", "time_embedding.linear_1"}
    for name, record in plan.items():
        assert record.weight_bits == (8 if name in eight else 4), name
        assert [q.bits for q in record.inputs] == [8 if name in eight else 6], name


@pytest.mark.parametrize(("name", "unlearned"), [("paper", 3), ("qdiff", 0), ("default", 0)])
def test_paper_reconstructs_neither_the_ends_nor_the_first_time_embedding(
    unet: UNet2DModel, name: str, unlearned: int
) -> None:
    """As in PTQD's public code, which ignores the reconstruction of exactly these three layers."""
    plan = make_plan(unet, preset(name), calls_of(unet, torch.randn(2, 3, 8, 8), torch.tensor([3, 5])))
    assert len(plan.special.unlearned) == unlearned
    assert plan.special.unlearned <= {"conv_in", "conv_out", "time_embedding.linear_1"}


def test_default_keeps_ends_and_shortcuts_at_8_bits_and_the_inputs_of_model_and_time_embedding_in_floating_point(
    unet: UNet2DModel,
) -> None:
    names = layers_of(unet)
    plan = plan_of(unet, preset("default", scheme="W4A6"))
    weights = {n: r.weight_bits for n, r in plan.items() if r.weight_bits}
    assert set(weights) == names
    assert {n for n, r in plan.items() if not r.inputs} == {"conv_in"} | named(names, "time_emb")
    eight = {"conv_in", "conv_out"} | named(names, "time_emb") | named(names, "conv_shortcut")
    assert {n for n, bits in weights.items() if bits == 8} == eight
    assert {q.bits for n in eight for q in plan[n].inputs} == {8}
    assert any(r.kind == "product" for r in plan.values())
    assert any(len(r.splits) == 3 for r in plan.values())


def test_layers_come_in_the_order_of_the_forward_pass(unet: UNet2DModel) -> None:
    order: list[str] = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, a, o, name=name: order.append(name))
    plan = plan_of(unet, preset("qdiff"))
    order.clear()
    unet(torch.randn(1, 3, 8, 8), 7)
    assert [n for n, r in plan.items() if r.kind != "product"] == order


def test_split_shortcuts_have_the_widths_of_the_stream_and_of_the_skip(unet: UNet2DModel) -> None:
    # skips: conv_in 8, down 8, downsampler 8, down 16, taken from the last; the stream has 16 channels, 8 after up_1.0
    expected = {
        "up_blocks.0.resnets.0.conv_shortcut": (0, 16, 32),
        "up_blocks.0.resnets.1.conv_shortcut": (0, 16, 24),
        "up_blocks.1.resnets.0.conv_shortcut": (0, 16, 24),
        "up_blocks.1.resnets.1.conv_shortcut": (0, 8, 16),
    }
    plan = plan_of(unet, preset("qdiff"))
    assert {n: r.splits for n, r in plan.items() if len(r.splits) > 2} == expected
    for name in expected:
        assert [q.name for q in plan[name].inputs] == [f"{name}.0", f"{name}.1"]
    for name, record in plan.items():
        if name not in expected and record.kind != "product":
            module = unet.get_submodule(name)
            assert record.splits == (0, getattr(module, "in_channels", getattr(module, "in_features", None)))
    whole = plan_of(unet, preset("qdiff", split_shortcuts=False))
    assert all(len(whole[n].inputs) == 1 and whole[n].splits == (0, s[-1]) for n, s in expected.items())


def test_units_are_residual_and_attention_blocks_and_single_layers(unet: UNet2DModel) -> None:
    for name, record in plan_of(unet, preset("qdiff")).items():
        block = [p for p in (".resnets.", ".attentions.") if p in name]
        expected = ".".join(name.split(".")[: name.split(".").index(block[0].strip(".")) + 2]) if block else name
        assert record.unit == expected


class Boxes(nn.Module):
    """Keeps the layers of its blocks in containers, which nobody calls; takes one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 4]."""
        sample = self.first(self.first(sample))
        for block in self.blocks:
            sample = sample + block["b"](block["a"](sample).tanh()) * timestep[:, None]  # type: ignore[index]
        return sample


def test_containers_that_nobody_calls_are_no_units() -> None:
    model = Boxes()
    plan = make_plan(model, preset("qdiff"), calls_of(model, torch.randn(2, 4), torch.tensor([3.0, 5.0])))
    assert len(plan.layers) == 5 and all(record.unit == record.name for record in plan.layers)
    assert "Quantized, but not learned, since they run several times in a call: first." in plan.notices


def test_a_skip_pattern_leaves_its_layers_in_floating_point(unet: UNet2DModel) -> None:
    full, plan = plan_of(unet, preset("qdiff")), plan_of(unet, preset("qdiff", skip="up_blocks.*,conv_out"))
    assert set(full) - set(plan) == {n for n in full if n.startswith("up_blocks.") or n == "conv_out"}


def test_fixed_layers_keep_the_whole_range_and_others_the_method(unet: UNet2DModel) -> None:
    plan = plan_of(unet, preset("qdiff", method="S_4", fixed_layers="first,time_embedding"))
    fixed = {"conv_in"} | named(set(plan), "time_emb")
    for name, record in plan.items():
        expected = ("fixed", "minmax") if name in fixed else ("S_4", "mse")
        assert {(q.method, q.range_method) for q in record.inputs} == {expected}, name


def test_a_skip_pattern_without_a_layer_is_an_error(unet: UNet2DModel) -> None:
    with pytest.raises(ModelError, match=r"'conv_inn' matches no layer"):
        plan_of(unet, preset("qdiff", skip="conv_inn"))


def test_a_plan_without_layers_is_an_error(unet: UNet2DModel) -> None:
    with pytest.raises(ModelError, match="0 layers"):
        plan_of(unet, preset("qdiff", skip="*"))


# models that diffusers does not have


class Joined(nn.Module):
    """Joins x [B, C, ...] with itself along ``dim`` and gives the result, through ``between``, to ``layer``."""

    def __init__(self, layer: nn.Module, dim: int = 1, between: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.dim, self.between = layer, dim, between or nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.layer(self.between(torch.cat([sample, sample], dim=self.dim)))
        return result


def joined_splits(model: nn.Module, *shape: int) -> tuple[int, ...]:
    return plan_of(model, preset("qdiff"), torch.randn(shape), torch.tensor([1, 2]))["layer"].splits


def test_concatenated_channels_are_split_also_in_one_dimension() -> None:
    assert joined_splits(Joined(nn.Conv1d(6, 2, 3)), 2, 3, 10) == (0, 3, 6)


def test_concatenated_features_of_a_linear_layer_are_split() -> None:
    assert joined_splits(Joined(nn.Linear(6, 2)), 2, 3) == (0, 3, 6)


def test_concatenated_tokens_are_no_channels() -> None:
    """[B, N, C] joined along N has 2 N tokens of C features: a linear layer's input is not split, whatever N is."""
    assert joined_splits(Joined(nn.Linear(6, 2)), 2, 5, 6) == (0, 6)
    assert joined_splits(Joined(nn.Linear(6, 2)), 2, 3, 6) == (0, 6)


def test_a_concatenation_that_is_normalized_first_is_not_split() -> None:
    assert joined_splits(Joined(nn.Conv2d(6, 2, 1), between=nn.GroupNorm(2, 6)), 2, 3, 4, 4) == (0, 6)


def test_a_concatenation_along_space_is_not_split() -> None:
    assert joined_splits(Joined(nn.Conv2d(3, 2, 1), dim=2), 2, 3, 4, 4) == (0, 3)


def test_a_grouped_convolution_is_not_split() -> None:
    """Its weight [O, C / groups, ...] has no columns for the second range."""
    assert joined_splits(Joined(nn.Conv2d(6, 2, 1, groups=2)), 2, 3, 4, 4) == (0, 6)


def test_first_and_last_are_the_ends_of_the_spatial_layers() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b, self.c = nn.Linear(1, 4), *(nn.Conv1d(4, 4, 1) for _ in range(3))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            shift = self.embed(timestep[:, None].float())
            result: Tensor = self.c(self.b(self.a(sample) + shift[:, :, None]))
            return result

    config = preset("qdiff", scheme="W4A4", eight_bit_layers="first,last", float_layers="time_embedding")
    plan = plan_of(Timed(), config, torch.randn(2, 4, 6), torch.tensor([1, 2]))
    assert {n: r.weight_bits for n, r in plan.items()} == {"a": 8, "b": 4, "c": 8}
    assert {r.kind for r in plan.values()} == {"conv1d"}


class Parts(nn.Module):
    """Layers by what their inputs depend on, and by how they are called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.of_t, self.of_text, self.of_both, self.of_nothing = (nn.Linear(4, 4) for _ in range(4))
        self.first, self.twice, self.keyword, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.never = nn.Linear(4, 4)
        self.experts = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("frames", torch.randn(1, 4))
        self.frames: Tensor

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        t = self.of_t(timestep.float()[:, None].expand(-1, 4) / 1000)
        text = self.of_text(text)
        y = self.first(sample) + self.of_both(t * text) + self.of_nothing(self.frames)
        y = self.twice(self.twice(y).tanh()) @ self.experts
        result: Tensor = self.last(self.keyword(input=y))
        return result


def parts_plan(**choices: Any) -> Plan:
    torch.manual_seed(0)
    model = Parts().requires_grad_(False)
    calls = calls_of(model, torch.randn(4, 4), torch.tensor([999, 500, 3, 1]), torch.randn(4, 4))
    return make_plan(model, preset("default", scheme="W4A6", **choices), calls)


def test_roles_are_what_inputs_depend_on() -> None:
    found = {r.name: (r.weight_bits, [q.bits for q in r.inputs]) for r in parts_plan().layers}
    assert found == {
        "of_t": (8, []),  # the time embedding
        "of_text": (4, [6]),
        "of_both": (4, []),  # modulation
        "of_nothing": (8, []),  # the same at each t
        "first": (8, []),
        "twice": (4, [6]),
        "keyword": (4, [6]),
        "last": (8, [8]),
    }


def test_what_stays_in_floating_point_is_named_and_counted() -> None:
    plan = parts_plan()
    assert plan.coverage == pytest.approx(0.9)
    notices = "\n".join(plan.notices)
    assert "never, since no call of any recorded form reaches them" in notices
    # 16 of the 16 products of each of ten uses of layers, and as many outside
    assert "no linear layer or convolution holds stay in floating point (10.0% of" in notices
    assert "the model itself" in notices and "No attention products were found" in notices
    some = parts_plan(skip="twice")
    assert some.coverage == pytest.approx(0.7)


class Attending(nn.Module):
    """torch's own attention, of tokens among themselves, to others, or in its encoder."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.last = kind, nn.Linear(4, 8), nn.Linear(8, 4)
        if kind == "encoder":
            self.attention: nn.Module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        else:
            self.attention = nn.MultiheadAttention(
                8, 2, batch_first=True, **{"cross": {"kdim": 4, "vdim": 4}}.get(kind, {})
            )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, N, 4]."""
        y = self.first(sample) + timestep.float()[:, None, None] / 1000
        if self.kind == "encoder":
            y = self.attention(y)
        else:
            other = sample[:, 1:] if self.kind == "cross" else y
            y = self.attention(y, other, other, need_weights=False)[0]
        result: Tensor = self.last(y)
        return result


@pytest.mark.parametrize("kind", ["self", "cross", "encoder"])
def test_attention_in_one_function_is_counted_once_and_named(kind: str) -> None:
    model = Attending(kind).eval().requires_grad_(False)
    x, t = torch.randn(2, 5, 4), torch.tensor([3, 5])
    plan = make_plan(model, preset("qdiff"), calls_of(model, x, t))
    (notice,) = plan.notices
    assert all(name in notice for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    planned = {record.name for record in plan.layers}
    assert planned == {name for name in layers_of(model) if not name.endswith("out_proj")}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(x[:1], t[:1])  # what is fused otherwise is no operation that torch counts
    layers = sum(model.get_submodule(name).weight.numel() for name in planned) * x[0, :, 0].numel()
    assert plan.coverage == pytest.approx(2 * layers / counter.get_total_flops())


class Standardized(nn.Conv2d):
    """Computes its weight in its own forward pass, as ResNets with weight standardization do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_a_layer_that_computes_its_weight_is_refused_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), Standardized(4, 4, 3), nn.ConvTranspose2d(4, 3, 2)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            result: Tensor = self.c(self.b(self.a(sample)).tanh())
            return result

    model = Net().requires_grad_(False)
    plan = make_plan(model, preset("qdiff"), calls_of(model, torch.randn(2, 3, 6, 6), torch.tensor([3, 5])))
    assert [(r.name, r.kind) for r in plan.layers] == [("a", "conv2d"), ("c", "conv_transpose2d")]
    assert any("b, since each is not the plain" in notice for notice in plan.notices)
    a, b, c = 12 * 36, 144 * 16, 16 * 12 * 4
    assert plan.coverage == pytest.approx((a + c) / (a + b + c))


class Switched(nn.Linear):
    """Another layer while it is on."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (3 if self.on else 1)


class Further(nn.Conv1d):
    """Takes another argument, and leaves it alone."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Weighing(nn.Module):
    """A convolution's weight that is computed in the forward pass, in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None], padding=1)


def hooked(layer: nn.Module, *, before: bool) -> nn.Module:
    if before:
        layer.register_forward_pre_hook(lambda module, args: (args[0].clamp(-0.5, 0.5),))
    else:
        layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def as_tokens(run: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    return run(y.transpose(1, 2)).transpose(1, 2)


def at_t(body: Any, y: Tensor, t: Tensor) -> Tensor:
    body.on = bool(t[0] < 5)
    return as_tokens(body, y)


def twice(body: Any, y: Tensor, t: Tensor) -> Tensor:
    body.on = False
    y = as_tokens(body, y).tanh()
    body.on = True
    return as_tokens(body, y)


Use = Callable[[Any, Tensor, Tensor], Tensor]
OF_TOKENS: Use = lambda body, y, t: as_tokens(body, y)  # noqa: E731
AS_IT_IS: Use = lambda body, y, t: body(y)  # noqa: E731
MORE, LOOSE = "is not the plain operation", "no linear layer or convolution holds"
# what is in the middle, how it is used, its multiply-accumulates for a sample of [4, 8], and what is said of it
MIDDLES: dict[str, tuple[Callable[[], nn.Module], Use, int, str]] = {
    "hook before": (lambda: hooked(nn.Conv1d(4, 4, 1), before=True), AS_IT_IS, 16 * 8, MORE),
    "hook behind": (lambda: hooked(nn.Conv1d(4, 4, 1), before=False), AS_IT_IS, 16 * 8, MORE),
    "another at another t": (lambda: Switched(4, 4), at_t, 16 * 8, MORE),
    "another at another use": (lambda: Switched(4, 4), twice, 2 * 16 * 8, MORE),
    "output size": (
        lambda: nn.ConvTranspose1d(4, 4, 2, stride=2),
        lambda body, y, t: body(y[..., ::2], output_size=y.shape[-1:]),
        4 * 4 * 8,
        MORE,
    ),
    "further argument": (lambda: Further(4, 4, 1), lambda body, y, t: body(y, y), 16 * 8, MORE),
    "another keyword": (lambda: Further(4, 4, 1), lambda body, y, t: body(x=y), 16 * 8, MORE),
    "weight of the caller's": (
        lambda: nn.Conv1d(4, 4, 1),
        lambda body, y, t: torch.func.functional_call(body, {"weight": body.weight * 2}, (y,)),
        16 * 8,
        MORE,
    ),
    "complex": (
        lambda: nn.Linear(4, 4, dtype=torch.complex64),
        lambda body, y, t: as_tokens(body, y.to(torch.complex64)).real,
        16 * 8,
        MORE,
    ),
    "lstm": (
        lambda: nn.LSTM(4, 2, batch_first=True, bidirectional=True),
        lambda body, y, t: as_tokens(lambda z: body(z)[0], y),
        2 * (4 + 2) * 4 * 2 * 8,
        LOOSE,
    ),
    "bilinear": (
        lambda: nn.Bilinear(4, 4, 4),
        lambda body, y, t: as_tokens(lambda z: body(z.contiguous(), z.contiguous()), y),
        64 * 8,
        LOOSE,
    ),
    "computed weight": (Weighing, AS_IT_IS, 48 * 8, LOOSE),
}


class Middle(nn.Module):
    def __init__(self, body: nn.Module, use: Use) -> None:
        super().__init__()
        self.first, self.body, self.last, self.use = nn.Conv1d(3, 4, 1), body, nn.Conv1d(4, 3, 1), use

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y = (self.first(sample) + timestep[:, None, None] / 1000).tanh()
        result: Tensor = self.last(self.use(self.body, y, timestep))
        return result


@pytest.mark.parametrize("name", MIDDLES)
def test_what_is_no_plain_operation_stays_in_floating_point_and_counts(name: str) -> None:
    torch.manual_seed(0)
    make, use, macs, said = MIDDLES[name]
    model = Middle(make(), use).eval().requires_grad_(False)
    calls = calls_of(model, torch.randn(3, 3, 8), torch.tensor([900.0, 500.0, 3.0]))
    plan = make_plan(model, preset("qdiff"), calls)
    assert [record.name for record in plan.layers] == ["first", "last"]
    assert plan.coverage == pytest.approx(2 * 12 * 8 / (2 * 12 * 8 + macs))
    assert [notice for notice in plan.notices if said in notice and "body" in notice]
    assert not [notice for notice in plan.notices if "Products of activations" in notice or "never" in notice]


class Experts(nn.Module):
    """One for early steps, one for late ones, and one that only some calls ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.early, self.late, self.extra = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.first(sample) + timestep[:, None] / 1000
        y = y if extra is None else y + self.extra(extra)
        result: Tensor = (self.early if timestep[0] > 500 else self.late)(y)
        return result


def test_layers_of_other_calls_than_the_first_are_named_and_counted() -> None:
    model, x, t = Experts().requires_grad_(False), torch.randn(3, 4), torch.tensor([900.0, 700.0, 100.0])
    parts = [calls_of(model, x, t), calls_of(model, x, t, torch.randn(3, 4))]
    plan = make_plan(model, preset("qdiff", scheme="W4A4"), Calls.join(parts, parts[0].axis))
    assert [record.name for record in plan.layers] == ["first", "early"]
    assert plan.coverage == pytest.approx(0.5)
    assert plan.weight_bits == pytest.approx((2 * 4 + 2 * 32) / 4)
    assert "late, extra (50.0% of the multiply-accumulates), since only some calls" in plan.notices[0]


class ByAll(Experts):
    """An expert is chosen by the t of all samples, at a mean above ``least``."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, sample: Tensor, timestep: Tensor, extra: Tensor | None = None) -> Tensor:
        late = timestep.float().mean() > self.least
        return super().forward(sample, torch.where(late, 900, 100).expand(len(sample)))


def test_experts_of_all_samples_of_a_call_stay_in_floating_point() -> None:
    model, x, t = ByAll(500).requires_grad_(False), torch.randn(3, 4), torch.tensor([900.0, 900.0, 0.0])
    plan = make_plan(model, preset("qdiff", scheme="W4A4"), calls_of(model, x, t))
    assert [record.name for record in plan.layers] == ["first"]
    assert "late, early (66.7% of the multiply-accumulates), since only some calls" in plan.notices[0]


def test_experts_that_no_call_of_many_samples_reaches_are_one_sentence() -> None:
    model, x, t = ByAll(400).requires_grad_(False), torch.randn(4, 4), torch.tensor([900.0, 0.0, 0.0, 0.0])
    with pytest.raises(ModelError, match="early is reached by calls of one sample and by none of several"):
        calibrate(model, preset("default", scheme="W8A8", activation_iterations=1), calls_of(model, x, t))


class OfTokens(nn.Module):
    """Discrete diffusion: x are numbers of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Embedding(12, 8), nn.Linear(1, 8)
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = self.embed(x) + self.time(timestep[:, None] / 1000)[:, None]
        result: Tensor = self.last(self.middle(self.first(y).tanh()).tanh())
        return result


class LabelFirst(OfTokens):
    def forward(self, label: Tensor, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep) + label[:, None, None]


@pytest.mark.parametrize("model", [OfTokens(), LabelFirst()])
def test_whole_numbers_are_varied_as_x(model: nn.Module) -> None:
    given = [torch.randint(0, 12, (3, 10))]
    if isinstance(model, LabelFirst):
        given.insert(0, torch.tensor([1, 2, 3]))
    calls = calls_of(model, *given, torch.tensor([900.0, 700.0, 100.0]))
    plan = make_plan(model.requires_grad_(False), preset("default", scheme="W4A6"), calls)
    found = {r.name: (r.weight_bits, [q.bits for q in r.inputs]) for r in plan.layers}
    assert found == {"time": (8, []), "first": (8, []), "middle": (4, [6]), "last": (8, [8])}


class OwnLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Weighing()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.body(sample) + timestep[:, None, None]
        return result


def test_a_model_without_layers_of_torch_is_an_error() -> None:
    model = OwnLayers().requires_grad_(False)
    with pytest.raises(ModelError, match="torch's own linear layers and convolutions, and classes derived"):
        make_plan(model, preset("qdiff"), calls_of(model, torch.randn(2, 4, 8), torch.tensor([3, 5])))


def test_without_layers_of_torch_the_classes_that_hold_weights_are_named() -> None:
    model = OwnLayers()
    model.body = nn.Sequential(Weighing(), Weighing())
    with pytest.raises(ModelError, match=r"The weights here are held by Weighing: .* nn\.Conv2d or nn\.Linear"):
        make_plan(folded_copy(model), preset("qdiff"), calls_of(model, torch.randn(2, 4, 8), torch.tensor([3, 5])))


def test_a_forward_that_is_a_function_of_the_object_is_named() -> None:
    model, x = OwnLayers().requires_grad_(False), torch.randn(2, 4, 8)
    model.body, forward = nn.Linear(8, 8), model.forward
    model.forward = lambda sample, timestep: forward(sample, timestep)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"The forward of OwnLayers was replaced by a function, .* define it"):
        make_plan(folded_copy(model), preset("qdiff"), calls_of(model, x, torch.tensor([3, 5])))


class Styled(nn.Module):
    """A linear layer on a learned vector, and a convolution on one image without an axis of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.of_style, self.of_image, self.last = (
            nn.Linear(4, 8), nn.Linear(6, 8), nn.Conv2d(2, 8, 3), nn.Linear(8, 4)
        )  # fmt: skip
        self.style, self.image = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        scale = self.of_style(self.style) + self.of_image(self.image).flatten()
        result: Tensor = self.last((self.first(sample) * scale + timestep[:, None] / 1000).tanh())
        return result


def test_layers_that_are_given_no_samples_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, t = Styled().requires_grad_(False), torch.tensor([900.0, 500.0, 100.0]).repeat(4)
    calls = calls_of(model, torch.randn(12, 4), t)
    config = preset("default", scheme="W8A8", activation_iterations=2, fixed_layers=())
    quantized = calibrate(model, config, calls)
    assert [record.name for record in quantized.plan] == ["first", "last"]
    assert any("of_style, of_image, since what each is given has no axis" in notice for notice in quantized.notices)
    x, t = torch.randn(2, 4), torch.tensor([500.0, 100.0])
    assert sqnr_db(model(x, t), quantized(x, t)) > 25


class Folded(nn.Module):
    """Rows inside are not one sample after the other: ``forward`` says how."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inside = way, nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 3, 4]."""
        if self.way == "tokens first":
            y = self.inside(sample.transpose(0, 1)).transpose(0, 1)
        elif self.way == "tokens outside":
            y = self.inside(sample.transpose(0, 1).reshape(-1, 4)).view(3, -1, 4).transpose(0, 1)
        elif self.way == "one by one":
            y = torch.stack([self.inside(row) for row in sample])
        else:
            y = self.inside(sample.flatten(0, 1)).view(-1, 3, 4)
        return y


@pytest.mark.parametrize(
    ("way", "single"),
    [("tokens first", True), ("tokens outside", True), ("one by one", True), ("samples outside", False)],
)
def test_units_whose_rows_are_of_no_one_sample_run_at_one_t(way: str, single: bool) -> None:
    model = Folded(way).requires_grad_(False)
    plan = make_plan(model, preset("qdiff"), calls_of(model, torch.randn(2, 3, 4), torch.tensor([3, 5])))
    assert plan.special.single == ({"inside"} if single else set())


@pytest.mark.parametrize("reads", [lambda t: t[:1], lambda t: t], ids=["of the first", "of each"])
def test_a_time_step_that_is_read_for_a_whole_batch_is_said(reads: Callable[[Tensor], Tensor]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = self.layer(sample) * reads(timestep)[:, None] / 1000
            return out

    model, t = Gated().requires_grad_(False), torch.tensor([3.0, 900.0])
    notices = make_plan(model, preset("qdiff"), calls_of(model, torch.randn(2, 4), t)).notices
    assert any("time step of another one" in notice for notice in notices) == (len(reads(t)) == 1)


class Routed(nn.Module):
    """Two layers, each for some of the samples or, with ``tokens``, of their tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens, self.above, self.below = tokens, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample [B, 3, 4]."""
        x = sample.flatten(0, 1) if self.tokens else sample
        y, high = torch.zeros_like(x), x.flatten(1)[:, 0] > 0
        y[high], y[~high] = self.above(x[high]), self.below(x[~high])
        return y.view_as(sample)


@pytest.mark.parametrize(("tokens", "others"), [(True, range(1, 11)), (False, range(1, 11)), (False, [20])])
def test_rows_that_are_chosen_by_what_they_hold_run_at_one_t(tokens: bool, others: Iterable[int]) -> None:
    """Also where the first sample and the one that is farthest from it in time choose alike."""
    model, sample = Routed(tokens).requires_grad_(False), torch.rand(40, 3, 4) + 0.1
    sample[:, -1] *= -1
    sample[list(others)] *= -1
    plan = make_plan(model, preset("qdiff"), calls_of(model, sample, torch.arange(40.0)))
    assert plan.special.single == {"above", "below"}


def test_calls_that_the_model_refuses_are_one_sentence(tiny_unet: Callable[..., UNet2DModel]) -> None:
    model, labels = tiny_unet(num_class_embeds=3), torch.tensor([0, 1])
    calls = calls_of(model, torch.randn(2, 3, 8, 8), torch.tensor([3, 5]), class_labels=labels)
    calls.groups[0].leaf("class_labels")[1] = 99
    with pytest.raises(ModelError, match="UNet2DModel refuses the recorded calls"):
        make_plan(model, preset("default"), calls)


class Alone(nn.Module):
    """Takes one sample at a time, and says nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        if len(sample) != 1:
            raise AssertionError
        result: Tensor = self.layer(sample)
        return result


def test_a_refusal_without_words_is_one_sentence() -> None:
    model = Alone()
    parts = [calls_of(model, torch.randn(1, 4), torch.tensor([t])) for t in (3, 5)]
    calls = Calls.join(parts, parts[0].axis)
    with pytest.raises(ModelError, match=r"2 rows .* for each \(AssertionError\)"):
        make_plan(model, preset("default"), calls)


@pytest.mark.parametrize("features", [2, 3, 4])
def test_a_model_of_one_time_for_all_samples_is_told_to_take_one_for_each(features: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(features, features)

        def forward(self, sample: Tensor, sigma: Tensor) -> Tensor:
            result: Tensor = self.layer(sample / (sigma**2 + 0.25).sqrt())
            return result

    calls = calls_of(Scaled(), torch.randn(6, features), torch.tensor(3.0))
    with pytest.raises(ModelError, match=r"sigma a tensor with one value for each \(The size.*sigma.view\(-1, 1"):
        make_plan(Scaled(), preset("default"), calls)
