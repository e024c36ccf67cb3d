"""Every interval source of the registry, started from one activation whose range changes with t."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ptq_tdq.errors import ConfigError, NonFiniteError
from ptq_tdq.intervals import IntervalOptions, IntervalSource, Observed, source_class
from ptq_tdq.intervals.base import LearnedScale
from ptq_tdq.intervals.mlp import inverse_softplus, start
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.intervals.tdq import TimeEncoding, make_net
from ptq_tdq.observe import Observer
from ptq_tdq.scheme import QType
from ptq_tdq.search import weight_qparams

T = 1000
STEPS = torch.linspace(1, 961, 25).round()
QUICK = ["static", "S_1", "S_2", "S_4", "S_7", "S_20", "S_1000", "step-table", "step-lsq"]
MODULES: list[tuple[str, dict[str, Any]]] = [
    *(("tdq", {"encoding": e}) for e in ("normalize", "fourier", "frequency")),
    *(("tdq", {"weights": w}) for w in ("zero", "xavier")),
    *(("tdq-thin", {"activation": a}) for a in ("relu", "silu", "tanh")),
]


def activation(t: Tensor) -> Tensor:
    """Normal with a standard deviation that grows from 0.5 to 2 over t: one draw, scaled, so that only t tells."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 0.3
    return x * (0.5 + 1.5 * (t / T))[:, None]


def observe(steps: Tensor = STEPS, bits: int = 4, drift: float = 0.0, **options: Any) -> Observed:
    observer = Observer("layer", steps)
    x = activation(steps) + drift * (steps / T)[:, None]
    observer.see(x, steps)
    observer.start_counting()
    observer.see(x, steps)
    return Observed(T, steps, observer.histogram(), QType(bits), options=IntervalOptions(**options))


def build(method: str, observed: Observed) -> IntervalSource:
    torch.manual_seed(0)
    return source_class(method).build(method, observed).eval()


def scales(source: IntervalSource) -> Tensor:
    return source.table(T)[0]


@pytest.mark.parametrize("zero_point", ["fixed", "step"])
@pytest.mark.parametrize("parameter", ["raw", "log"])
@pytest.mark.parametrize("method", QUICK)
def test_tables_hold_a_positive_interval_and_a_code_for_each_time_step(
    method: str, parameter: str, zero_point: str
) -> None:
    check_table(build(method, observe(parameter=parameter, zero_point=zero_point)))


@pytest.mark.parametrize("weights", ["he", "gaussian", "zero", "xavier"])
@pytest.mark.parametrize("encoding", ["none", "normalize", "fourier", "frequency"])
@pytest.mark.parametrize("start", ["as-is", "static"])
def test_tdq_has_a_positive_table_for_each_encoding_and_initialisation(encoding: str, weights: str, start: str) -> None:
    check_table(build("tdq", observe(encoding=encoding, weights=weights, start=start)))


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_tdq_thin_has_a_positive_table_for_each_activation(activation: str) -> None:
    check_table(build("tdq-thin", observe(activation=activation, start="as-is")))


def check_table(source: IntervalSource) -> None:
    scale, zero_point = source.table(T)
    assert scale.shape == zero_point.shape == (T,)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert bool(torch.isfinite(scale).all() and (scale > 0).all())
    assert bool(((zero_point >= 0) & (zero_point <= 15)).all())


# static and S_N


def test_static_is_the_search_over_all_samples() -> None:
    observed = observe(bits=8)
    direct = weight_qparams(activation(STEPS).reshape(1, -1), QType(8))  # the same search, on the raw values
    scale, zero_point = build("static", observed).table(T)
    assert scale.unique().numel() == zero_point.unique().numel() == 1
    torch.testing.assert_close(scale[:1], direct.scale, rtol=0.02, atol=0)


def test_s_1_is_static() -> None:
    observed = observe()
    for ours, theirs in zip(build("S_1", observed).table(T), build("static", observed).table(T), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bins", [2, 4, 7, 20, T])
def test_s_n_is_constant_in_each_nth_of_the_time_axis(bins: int) -> None:
    source = build(f"S_{bins}", observe())
    owner = next(m for m in source.modules() if isinstance(m, LearnedScale))
    assert owner.value.shape == (bins,)
    with torch.no_grad():
        owner.value.copy_(torch.arange(1.0, bins + 1).log())
    expected = [t * bins // T + 1 for t in range(T)]
    torch.testing.assert_close(scales(source), torch.tensor(expected, dtype=torch.float32))


def test_each_bin_is_the_search_over_its_own_samples_and_an_unseen_one_copies_its_nearest() -> None:
    steps = torch.tensor([10.0, 20.0, 600.0, 990.0])
    scale, zero_point = build("S_10", observe(steps)).table(T)
    for member, t in ((steps[:2], 0), (steps[2:3], 650), (steps[3:], 950)):
        direct = weight_qparams(activation(steps)[torch.isin(steps, member)].reshape(1, -1), QType(4))
        torch.testing.assert_close(scale[t : t + 1], direct.scale, rtol=0.05, atol=0)
    assert scale[150] == scale[0] and scale[250] == scale[0]  # bins 1 and 2: bin 0 is nearer than bin 6
    assert scale[450] == scale[650] and scale[750] == scale[650] and scale[850] == scale[950]
    assert zero_point[850] == zero_point[950]


# per-step sources


@pytest.mark.parametrize("method", ["step-table", "step-lsq"])
@pytest.mark.parametrize("zero_point", ["fixed", "step"])
def test_step_sources_hold_the_steps_and_are_linear_in_between(method: str, zero_point: str) -> None:
    observed = observe(zero_point=zero_point, drift=2.0)
    expected = np.interp(np.arange(T), STEPS.numpy(), observed.steps.scale.numpy())
    scale, zero = build(method, observed).table(T)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-5)
    at_steps = observed.steps.zero_point if zero_point == "step" else observed.static.zero_point.expand(len(STEPS))
    assert torch.equal(zero[STEPS.long()], at_steps.to(torch.int32))
    assert (zero.unique().numel() == 1) == (zero_point == "fixed")


def test_step_sources_accept_integer_steps() -> None:
    observed = observe()
    integers = replace(observed, t=observed.t.long())
    for method in ("step-table", "step-lsq", "S_4", "tdq-thin"):
        torch.testing.assert_close(scales(build(method, integers)), scales(build(method, observed)))


# modules


def test_the_tdq_module_is_that_of_supp_table_3() -> None:
    source = build("tdq", observe(start="as-is"))
    net = source.net
    assert isinstance(net, nn.Sequential)
    layers = [(type(m).__name__, getattr(m, "out_features", getattr(m, "p", None))) for m in net]
    hidden = [("Linear", 64), ("ReLU", None)]
    assert layers == [*hidden, *hidden, *hidden, ("Dropout", 0.2), ("Linear", 1)]
    first = net[0]
    assert isinstance(first, nn.Linear) and first.in_features == 128
    with torch.no_grad():  # ... and softplus
        output = net(source.encode(torch.tensor([5.0])))
    assert source.table(T)[0][5].item() == pytest.approx(np.log1p(np.exp(output.item())), rel=1e-5)


def test_the_thin_module_has_three_layers_with_16_hidden_units_on_u() -> None:
    source = build("tdq-thin", observe(start="as-is"))
    widths = [(m.in_features, m.out_features) for m in source.modules() if isinstance(m, nn.Linear)]
    assert widths == [(1, 16), (16, 16), (16, 1)]
    assert source.encode(torch.tensor([0, 250, 999])).squeeze(1).tolist() == pytest.approx([0, 0.25, 0.999])


@pytest.mark.parametrize("encoding", ["none", "normalize", "fourier", "frequency"])
def test_the_thin_module_takes_each_encoding(encoding: str) -> None:
    source = build("tdq-thin", observe(thin_encoding=encoding, encoding="none", start="static"))
    assert next(m for m in source.modules() if isinstance(m, nn.Linear)).in_features == source.encode.width
    assert source.encode.kind == encoding
    check_table(source)


def test_dropout_acts_in_training_only() -> None:
    source = build("tdq", observe(start="as-is"))
    t, x = torch.full((64,), 500), torch.empty(64, 0)
    assert source(t, x)[0].unique().numel() == 1
    assert source.train()(t, x)[0].unique().numel() > 1


def test_frequency_encoding_is_that_of_diffusers() -> None:
    t = torch.tensor([0.0, 1.0, 37.5, 500.0, 999.0])
    expected = get_timestep_embedding(t, 128, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(TimeEncoding("frequency", T)(t), expected, rtol=1e-4, atol=1e-4)


def test_the_other_encodings() -> None:
    t = torch.tensor([0, 500, 999])
    assert TimeEncoding("none", T)(t).tolist() == [[0.0], [500.0], [999.0]]
    assert TimeEncoding("normalize", T)(t).squeeze(1).tolist() == pytest.approx([0.0, 0.5, 0.999])
    torch.manual_seed(0)
    fourier = TimeEncoding("fourier", T)(t)
    cos, sin = fourier.chunk(2, dim=1)
    assert fourier.shape == (3, 128)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(3, 64))


@pytest.mark.parametrize("weights", ["he", "gaussian", "zero", "xavier"])
def test_initial_weights_have_the_named_distribution(weights: str) -> None:
    source = build("tdq", observe(start="as-is", weights=weights))
    for layer in (m for m in source.modules() if isinstance(m, nn.Linear) and m.out_features == 64):
        inputs, outputs = layer.in_features, layer.out_features
        deviation = {"he": (2 / inputs) ** 0.5, "gaussian": 1.0, "zero": 0.0, "xavier": (2 / (inputs + outputs)) ** 0.5}
        assert layer.weight.std().item() == pytest.approx(deviation[weights], rel=0.1)
        assert bool((layer.bias == 0).all())


def test_with_zero_weights_the_module_starts_as_the_static_interval() -> None:
    """The last bias is softplus^-1 of the static interval (method section 2)."""
    observed = observe(start="as-is", weights="zero")
    torch.testing.assert_close(scales(build("tdq", observed)), observed.static.scale.expand(T))


@pytest.mark.parametrize(("method", "options"), MODULES)
def test_start_steps_reproduces_the_intervals_of_the_steps(method: str, options: dict[str, Any]) -> None:
    observed = observe(start="steps", **options)
    found = scales(build(method, observed))[STEPS.long()]
    off = (found / observed.steps.scale).log().abs()
    static = (observed.static.scale / observed.steps.scale).log().abs()
    if options.get("weights") == "zero":  # all hidden units stay alike: only the bias can move
        assert off.mean() < static.mean() * 1.05
        return
    assert off.mean() < 0.05
    assert off.mean() < static.mean() / 3, "the static interval is far away"


@pytest.mark.parametrize(("method", "options"), MODULES)
def test_start_static_is_the_static_interval_at_the_observed_steps(method: str, options: dict[str, Any]) -> None:
    observed = observe(start="static", **options)
    found = scales(build(method, observed))[STEPS.long()]
    torch.testing.assert_close(found, observed.static.scale.expand(len(STEPS)), rtol=0.05, atol=0)


def test_a_fit_that_diverges_says_what_to_do() -> None:
    observed = observe()
    with pytest.raises(NonFiniteError, match="choose another time encoding"):
        start(make_net(1), torch.full((len(STEPS), 1), torch.inf), observed)


@pytest.mark.parametrize("y", [1e-6, 1e-3, 0.1, 1.0, 20.0, 80.0])
def test_inverse_softplus(y: float) -> None:
    value = torch.tensor(y)
    torch.testing.assert_close(nn.functional.softplus(inverse_softplus(value)), value, rtol=1e-4, atol=0)


# all of them


ALL = [*((m, {}) for m in QUICK), ("tdq", {"start": "as-is"}), ("tdq-thin", {"start": "as-is"})]


@pytest.mark.parametrize(("method", "options"), ALL)
@pytest.mark.parametrize("zero_point", ["fixed", "step"])
def test_each_sample_of_a_batch_has_its_own_time_step(method: str, options: dict[str, str], zero_point: str) -> None:
    source = build(method, observe(zero_point=zero_point, **options))
    t = torch.tensor([999.0, 3.0, 3.0, 500.0, 0.0])
    scale, zero = source(t, torch.empty(5, 0))
    table = source.table(T)
    torch.testing.assert_close(scale.detach(), table[0][t.long()])
    assert torch.equal(zero, table[1][t.long()])


@pytest.mark.parametrize(("method", "options"), [(m, o) for m, o in ALL if m != "step-table"])
@pytest.mark.parametrize("parameter", ["raw", "log"])
def test_gradients_reach_each_learned_parameter(method: str, options: dict[str, str], parameter: str) -> None:
    source = build(method, observe(parameter=parameter, **options))
    scale, _ = source(torch.arange(T), torch.empty(T, 0))
    scale.sum().backward()
    learned = list(source.parameters())
    assert learned and all(p.grad is not None and bool((p.grad != 0).any()) for p in learned)
    raw = {id(p) for p in source.raw_parameters()}
    assert raw == (set() if method.startswith("tdq") else {id(p) for p in learned})
    assert list(build("step-table", observe()).parameters()) == []


def test_a_logarithmic_scale_changes_by_a_ratio() -> None:
    source = LearnedScale(torch.tensor([0.01, 10.0]), "log")
    with torch.no_grad():
        source.value += 0.1
    torch.testing.assert_close(source().detach(), torch.tensor([0.01, 10.0]) * np.exp(0.1))


def test_a_raw_scale_stays_positive() -> None:
    source = LearnedScale(torch.tensor([0.01]), "raw")
    with torch.no_grad():
        source.value -= 1
    assert source().item() > 0


def test_a_table_stays_float32_in_a_half_precision_model() -> None:
    scale = torch.rand(T) + 0.1
    table = TableSource(scale, torch.zeros(T, dtype=torch.int32)).half()
    assert table.scale.dtype == torch.float32 and torch.equal(table.scale, scale)


def test_fixed_clips_nothing_at_any_step_and_is_not_learned() -> None:
    source = build("fixed", replace(observe(bits=8), range_method="minmax"))
    x = activation(STEPS)
    scale, zero_point = source(STEPS, x)
    assert not list(source.parameters())
    assert (scale * (0 - zero_point) <= x.flatten(1).amin(1)).all()
    assert (scale * (255 - zero_point) >= x.flatten(1).amax(1)).all()


# the registry


@pytest.mark.parametrize("method", ["nonsense", "S_0", "S_", "S_04", "TDQ", "", "tdq ", "S_4x"])
def test_an_unknown_method_is_an_error_that_names_the_methods(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source_class(method)
    for name in ("static", "S_4", "tdq", "tdq-thin", "step-table", "step-lsq", "dynamic"):
        assert name in str(caught.value)
    assert repr(method) in str(caught.value)


@pytest.fixture
def own_source() -> Iterator[type[IntervalSource]]:
    class Own(TableSource):
        pattern = "own-source"

    yield Own
    del IntervalSource.registry["own-source"]


def test_adding_a_source_is_adding_a_class(own_source: type[IntervalSource]) -> None:
    assert source_class("own-source") is own_source
    check_table(build("own-source", observe()))


def test_a_finished_table_is_not_a_method() -> None:
    assert TableSource not in IntervalSource.registry.values()


def test_range_methods() -> None:
    observed = observe()
    x = activation(STEPS)
    full = replace(observed, range_method="minmax")
    torch.testing.assert_close(full.static.scale, (x.max() - x.min()) / 15)
    torch.testing.assert_close(full.steps.scale.shape, STEPS.shape)
    assert observed.static.scale < full.static.scale, "4 bits clip a normal distribution"
