"""Every kind of layer in the integer model against the simulated one, which computes with torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import ModelError, RuntimeUnsupportedError

TIMES = {
    "one t": torch.tensor([500.0]),
    "mixed t": torch.tensor([0.0, 1000.0, 17.0]),
    "fractional t": torch.tensor([0.5, 3.25, 998.75]),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # layer, shape of its input for one sample
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear of tokens": (lambda: nn.Linear(6, 5, bias=False), (7, 6)),
    "linear on four axes": (lambda: nn.Linear(6, 5), (2, 3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(5, 7, 3, stride=2, padding=2, dilation=2), (5, 12)),
    "conv1d in groups": (lambda: nn.Conv1d(6, 9, 3, padding="same", groups=3), (6, 8)),
    "conv1d in a ring": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (4, 8)),
    "conv2d": (lambda: nn.Conv2d(5, 7, (3, 2), stride=(1, 2), padding=(1, 0)), (5, 6, 8)),
    "conv2d by channel": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 5, 5)),
    "conv2d with mirrors": (lambda: nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"), (4, 5, 6)),
    "conv2d with its border repeated": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"), (4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(5, 6, 3, padding=1), (5, 4, 5, 6)),
    "conv3d of patches": (lambda: nn.Conv3d(3, 8, (2, 2, 2), stride=2), (3, 4, 4, 6)),
    "conv3d, dilated": (
        lambda: nn.Conv3d(4, 4, 2, stride=(2, 1, 1), padding=(2, 0, 1), dilation=(2, 1, 1)),
        (4, 5, 4, 4),
    ),
    "conv3d in groups": (lambda: nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0), groups=2), (4, 4, 3, 3)),
    "conv3d in a ring": (lambda: nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"), (4, 4, 4, 4)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (4, 6)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (4, 4, 5)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(4, 3, 2, stride=2, bias=False), (4, 2, 3, 3)),
}


class Alone(nn.Module):
    """A denoiser of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x)


class Twice(Alone):
    """The same layer two times in a call, and a layer that never runs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(functional.silu(self.layer(x)))


class Questions(Alone):
    """Asks its layer what models ask theirs, beside calling it."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        assert next(self.layer.parameters()).device == x.device
        assert self.layer.weight.shape == (self.layer.out_features, self.layer.in_features)
        return self.layer(x.to(self.layer.weight.dtype)) + len(self.layer.bias)


class Frames(Alone):
    """The layer sees several rows of each sample."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Experts(nn.Module):
    """Its layers see some rows of all samples together."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = layer, nn.Linear(layer.out_features, layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = rows[:, 0] > 0
        return rows.index_put((chosen,), self.down(self.up(rows[chosen]))).unflatten(0, x.shape[:2])


class Chosen(Alone):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(nn.Linear(4, 4))
        self.blocks = nn.ModuleList([Experts(layer)])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(self.blocks[0](x))


class Meanwhile(Alone):
    """Computes with the weight itself."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x) + x @ self.layer.weight.T


def inputs(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(3, *shape, generator=generator) * (1 + t / 500), "timestep": torch.full((3,), t)}
        for t in (1000.0, 600.0, 200.0, 1.0)
    ]


def compare(models: tuple[nn.Module, nn.Module], x: Tensor, t: Tensor) -> None:
    with torch.no_grad():
        expected, found = (model(x, t) for model in models)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()))
    assert found.stride() == expected.stride(), "what follows may call view()"


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "choices",
    [{}, {"method": "dynamic", "scheme": "W8A6"}, {"weight_only_layers": ("first",)}],
    ids=["table", "dynamic", "float input"],
)
def test_it_computes_what_the_simulated_one_does(name: str, choices: dict[str, Any], both: Any) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    simulated, integer = both(Alone(make()), inputs(shape), **choices)
    facts = integer.facts
    assert facts["float_layers"] == []
    assert facts["weight_only_layers"] == (["layer"] if "weight_only_layers" in choices else [])
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 2
    for t in TIMES.values():
        compare((simulated, integer), x, t)


@pytest.mark.parametrize("name", ["conv2d", "conv2d by channel", "transposed conv2d"])
@pytest.mark.parametrize("choices", [{}, {"weight_only_layers": ("first",)}], ids=["table", "float input"])
def test_rows_of_pixels_stay_such(name: str, choices: dict[str, Any], both: Any) -> None:
    make, shape = LAYERS[name]
    models = both(Alone(make()), inputs(shape), **choices)
    compare(models, torch.randn(3, *shape).contiguous(memory_format=torch.channels_last), TIMES["one t"])


@pytest.mark.parametrize(
    ("model", "layer", "shape"),
    [
        (Twice, nn.Linear(4, 4), (5, 4)),
        (Questions, nn.Linear(4, 6), (4,)),
        (Frames, nn.Conv2d(4, 4, 3), (2, 4, 5, 5)),
        (Chosen, nn.Linear(4, 4), (7, 4)),
    ],
    ids=["twice", "questions", "frames", "chosen"],
)
def test_a_model_uses_its_layers_in_its_own_way(
    model: type[Alone], layer: nn.Module, shape: tuple[int, ...], both: Any
) -> None:
    models = both(model(layer), inputs(shape))
    for t in TIMES.values():
        compare(models, torch.randn(3, *shape), t)


def test_weights_that_exist_in_integers_only_are_not_taken_for_numbers(both: Any) -> None:
    _, integer = both(Meanwhile(nn.Linear(4, 4)), inputs((4,)))
    with pytest.raises(RuntimeUnsupportedError, match="outside of that layer's call"):
        integer(torch.randn(3, 4), 500)


@pytest.mark.parametrize("method", ["dynamic-statistics", "dynamic-token", "dynamic-token-static", "dynamic-token-tdq"])
@pytest.mark.parametrize("name", ["linear", "linear of tokens", "linear on four axes", "conv2d", "transposed conv1d"])
def test_intervals_found_at_run_time(method: str, name: str, both: Any) -> None:
    make, shape = LAYERS[name]
    models = both(Alone(make()), inputs(shape), method=method, activation_iterations=2)
    for t in TIMES.values():
        compare(models, torch.randn(3, *shape), t)


def test_each_token_has_an_interval_of_its_own(both: Any) -> None:
    """In 8 bits a token 1000 times smaller than its neighbour still comes out, with an error that is as small."""
    layer = nn.Linear(64, 5, bias=False)
    _, integer = both(Alone(layer), inputs((2, 64)), method="dynamic-token", scheme="W8A8")
    x = torch.randn(3, 2, 64) * torch.tensor([1.0, 1e-3])[:, None]
    off = (integer(x, 500) - layer(x)).pow(2).mean((0, 2)) / layer(x).pow(2).mean((0, 2))
    assert bool((off < 1e-3).all())


def test_rows_that_belong_to_no_sample_need_one_time_step(both: Any) -> None:
    _, integer = both(Frames(nn.Linear(4, 4)), inputs((2, 4)))
    with pytest.raises(ModelError, match="4 time steps do not fit a batch of 10"):
        integer(torch.randn(5, 2, 4), torch.tensor([0.0, 1000.0, 17.0, 3.0]))


def test_parts_of_the_model_are_not_for_themselves(both: Any) -> None:
    _, integer = both(Alone(nn.Linear(4, 4)), inputs((4,)))
    with pytest.raises(ModelError, match="call the model, not its parts"):
        integer.model(torch.randn(3, 4), torch.tensor(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_runs_in_float32(dtype: torch.dtype, both: Any) -> None:
    torch.manual_seed(0)
    model = Alone(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))).to(dtype)
    given = [{**call, "x": call["x"].to(dtype)} for call in inputs((5, 6))]
    _, integer = both(model, given, scheme="W8A8")
    x = given[1]["x"]
    with torch.no_grad():
        expected, found = model(x, 600).float(), integer(x, 600)
    assert found.dtype == dtype, "what a pipeline of that dtype goes on with"
    assert all(p.dtype == torch.float32 for p in integer.parameters())
    assert (found - expected).pow(2).mean() < 1e-3 * expected.pow(2).mean()


def test_calls_in_inference_mode_and_outside_of_it(both: Any) -> None:
    torch.manual_seed(0)
    given = {"x": torch.randn(3, 6), "timestep": torch.tensor([500.0])}
    _, integer = both(Alone(nn.Linear(6, 5)), [given])
    with torch.inference_mode():
        expected = integer(**given)
    assert torch.equal(integer(**given), expected)
