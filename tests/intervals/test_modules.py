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
from ptq_tdq.intervals.mlp import inverse_softplus, start
from ptq_tdq.intervals.tdq import TimeEncoding, make_net

MODULES: list[tuple[str, dict[str, Any]]] = [
    *(("tdq", {"encoding": e}) for e in ("normalize", "fourier", "frequency")),
    *(("tdq", {"weights": w}) for w in ("zero", "xavier")),
    *(("tdq-thin", {"activation": a}) for a in ("relu", "silu", "tanh")),
]


@pytest.mark.parametrize("weights", ["he", "gaussian", "zero", "xavier"])
@pytest.mark.parametrize("encoding", ["none", "normalize", "fourier", "frequency"])
@pytest.mark.parametrize("start", ["as-is", "static"])
def test_tdq_has_a_positive_table_for_each_encoding_and_initialisation(encoding: str, weights: str, start: str) -> None:
    check_table(build("tdq", observe(encoding=encoding, weights=weights, start=start)))


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_tdq_thin_has_a_positive_table_for_each_activation(activation: str) -> None:
    check_table(build("tdq-thin", observe(activation=activation, start="as-is")))


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
    torch.testing.assert_close(scales(build("tdq", observed)), observed.static.scale.expand(T + 1))


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
