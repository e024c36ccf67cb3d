"""Sources with a network of t: the modules of the paper, their encodings, and how they start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from observed import STEPS, T, build, check_table, observe, scales
from torch import nn

from ptq_tdq.errors import NonFiniteError
from ptq_tdq.intervals import source_class
from ptq_tdq.intervals.mlp import BENDS, Array, fit, inverse_softplus, scale_of
from ptq_tdq.intervals.tdq import TDQ, TimeEncoding, make_net

MODULES: list[tuple[str, dict[str, Any]]] = [
    *(("tdq", {"time_encoding": e}) for e in ("normalize", "fourier", "frequency")),
    *(("tdq", {"module_weights": w}) for w in ("zero", "xavier")),
    *(("tdq-thin", {"thin_activation": a}) for a in ("relu", "silu", "tanh")),
]


@pytest.mark.parametrize("weights", ["he", "gaussian", "zero", "xavier"])
@pytest.mark.parametrize("encoding", ["none", "normalize", "fourier", "frequency"])
@pytest.mark.parametrize("start", ["as-is", "static"])
def test_tdq_has_a_positive_table_for_each_encoding_and_initialisation(encoding: str, weights: str, start: str) -> None:
    check_table(build("tdq", observe(time_encoding=encoding, module_weights=weights, module_start=start)))


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_tdq_thin_has_a_positive_table_for_each_activation(activation: str) -> None:
    check_table(build("tdq-thin", observe(thin_activation=activation, module_start="as-is")))


def test_the_tdq_module_is_that_of_supp_table_3() -> None:
    source = build("tdq", observe(module_start="as-is"))
    assert isinstance(source, TDQ)
    net = source.net
    layers = [(type(m).__name__, getattr(m, "out_features", getattr(m, "p", None))) for m in net]
    hidden = [("Linear", 64), ("ReLU", None)]
    assert layers == [*hidden, *hidden, *hidden, ("Dropout", 0.2), ("Linear", 1)]
    first = net[0]
    assert isinstance(first, nn.Linear) and first.in_features == 128
    with torch.no_grad():  # ... and softplus, around what S_1 learns
        output = net(source.encode(torch.tensor([5.0]))) + inverse_softplus(source.scale())
    assert source.table(T)[0][5].item() == pytest.approx(np.log1p(np.exp(output.item())), rel=1e-5)


def test_the_thin_module_has_three_layers_with_16_hidden_units_on_u() -> None:
    source = build("tdq-thin", observe(module_start="as-is"))
    widths = [(m.in_features, m.out_features) for m in source.modules() if isinstance(m, nn.Linear)]
    assert widths == [(1, 16), (16, 16), (16, 1)]
    assert source.encode(torch.tensor([0, 250, 999])).squeeze(1).tolist() == pytest.approx([0, 0.25, 0.999])


@pytest.mark.parametrize("encoding", ["none", "normalize", "fourier", "frequency"])
def test_the_thin_module_takes_each_encoding(encoding: str) -> None:
    source = build("tdq-thin", observe(thin_encoding=encoding, time_encoding="none", module_start="static"))
    assert next(m for m in source.modules() if isinstance(m, nn.Linear)).in_features == source.encode.width
    assert source.encode.kind == encoding
    check_table(source)


def test_dropout_acts_in_training_only() -> None:
    source = build("tdq", observe(module_start="as-is"))
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
    source = build("tdq", observe(module_start="as-is", module_weights=weights))
    for layer in (m for m in source.modules() if isinstance(m, nn.Linear) and m.out_features == 64):
        inputs, outputs = layer.in_features, layer.out_features
        default = 1 / (3 * inputs) ** 0.5  # torch's own, uniform in +-1 / sqrt(inputs)
        deviation = {"he": default, "gaussian": 1.0, "zero": 0.0, "xavier": (2 / (inputs + outputs)) ** 0.5}
        assert layer.weight.std().item() == pytest.approx(deviation[weights], rel=0.1)
        assert bool((layer.bias == 0).all()) == (weights != "he")


def test_by_default_a_module_starts_around_the_static_interval_at_each_time_step() -> None:
    """Over 60 draws the median distance is below 3% at every t, whatever was observed."""
    for method, activation in (("tdq", "silu"), ("tdq-thin", "relu"), ("tdq-thin", "silu")):
        observed, drawn = observe(module_start="as-is", thin_activation=activation), list[torch.Tensor]()
        for seed in range(60):
            torch.manual_seed(seed)
            drawn.append(scales(source_class(method).build(method, observed)) / observed.static.scale)
        off = torch.stack(drawn).log().abs().median(0).values
        assert off.max() < 0.03, (method, activation)


@pytest.mark.parametrize("options", [{"module_start": "static"}, {"module_start": "as-is", "module_weights": "zero"}])
@pytest.mark.parametrize("method", ["tdq", "tdq-thin"])
def test_a_module_that_starts_static_is_the_static_interval_at_each_time_step(
    method: str, options: dict[str, Any]
) -> None:
    observed = observe(**options)
    torch.testing.assert_close(scales(build(method, observed)), observed.static.scale.expand(T + 1))


@pytest.mark.parametrize(("method", "options"), MODULES)
def test_start_steps_reproduces_the_intervals_of_the_steps(method: str, options: dict[str, Any]) -> None:
    observed = observe(module_start="steps", **options)
    found = scales(build(method, observed))[STEPS.long()]
    off = (found / observed.steps.scale).log().abs()
    static = (observed.static.scale / observed.steps.scale).log().abs()
    if options.get("module_weights") == "zero":  # all hidden units stay alike: only the bias can move much
        assert off.mean() < static.mean() * 1.05
        return
    assert off.mean() < 0.05
    assert off.mean() < static.mean() / 3, "the static interval is far away"


@pytest.mark.parametrize("method", ["tdq", "tdq-thin"])
def test_between_observed_steps_a_module_is_where_it_was_not_told(method: str) -> None:
    """Started from every other step, it is as near to the best intervals of the others as to those it has seen."""
    seen, others = observe(STEPS[::2], module_start="steps"), observe(STEPS[1::2])
    off = (scales(build(method, seen))[STEPS[1::2].long()] / others.steps.scale).log().abs()
    assert off.max() < 0.1


def test_waves_shorter_than_the_gap_between_observed_steps_are_damped() -> None:
    t = torch.arange(T + 1)
    plain, damped = TimeEncoding("frequency", T)(t), TimeEncoding("frequency", T, 40.0)(t)
    at_random = t[:, None] + 40 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([TimeEncoding("frequency", T)(at_random[k]).mean(0) for k in (0, 300, 1000)])
    torch.testing.assert_close(damped[[0, 300, 1000]], mean, atol=0.06, rtol=0)
    assert (damped.diff(dim=0).abs().max() < 0.02) and plain.diff(dim=0).abs().max() > 0.9


def test_a_fit_takes_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has a hundred activations, which must not wait for minutes before they learn."""
    passes: list[int] = []

    def relu(x: Array) -> tuple[Array, Array]:
        passes.append(1)
        return np.maximum(x, 0), (x > 0).astype(x.dtype)

    monkeypatch.setitem(BENDS, nn.ReLU, relu)
    build("tdq", observe(module_start="steps"))
    assert len(passes) < 3 * 50, "of three layers each"


@pytest.mark.parametrize("bend", [nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_net_of_one_number_follows_a_bump(bend: type[nn.Module], seed: int) -> None:
    """A curve that few nets are near at the start."""
    torch.manual_seed(seed)
    net, t = (
        nn.Sequential(nn.Linear(1, 16), bend(), nn.Linear(16, 16), bend(), nn.Linear(16, 1)),
        torch.linspace(0, 1, 51),
    )
    aim = 1 + 2 * torch.exp(-(((t - 0.7) / 0.06) ** 2))
    fit(net, t[:, None], aim.mean(), aim, 1e-6)
    with torch.no_grad():
        off = (scale_of(net.eval(), t[:, None], aim.mean()) / aim).log()
    assert off.square().mean().sqrt() < 0.1


def test_a_fit_that_diverges_says_what_to_do() -> None:
    ones = torch.ones(len(STEPS))
    with pytest.raises(NonFiniteError, match="choose another time encoding"):
        fit(make_net(1), torch.full((len(STEPS), 1), torch.inf), ones[0], ones, 0.0)


@pytest.mark.parametrize("y", [1e-6, 1e-3, 0.1, 1.0, 20.0, 80.0])
def test_inverse_softplus(y: float) -> None:
    value = torch.tensor(y)
    torch.testing.assert_close(nn.functional.softplus(inverse_softplus(value)), value, rtol=1e-4, atol=0)
