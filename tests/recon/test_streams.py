"""The sweep must be nothing but the forward pass: for both streams, in chunks, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ptq_tdq.config import Config
from ptq_tdq.errors import ModelError
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.recon import Samples
from ptq_tdq.recon.streams import Store, UnitCall, sweep
from ptq_tdq.wrap import switched

Wrap = Callable[[Config], QuantizedModel]
CHUNKS = (slice(0, 5), slice(5, 10), slice(10, 12))
SIZES = (5, 5, 2)


@pytest.mark.parametrize("on_disk", [False, True])
def test_both_streams_are_plain_forward_passes(
    wrap: Wrap, choose: Callable[..., Config], unet: UNet2DModel, samples: Samples, on_disk: bool
) -> None:
    """The quantized stream is one with each unit's output doubled: it must not leak into the other one."""
    quantized = wrap(choose())
    model, units = quantized.model, quantized.units()
    finals: list[Tensor] = []
    outputs: list[tuple[Tensor, Tensor]] = []

    def process(full: UnitCall, other: UnitCall) -> tuple[Tensor, Tensor]:
        module = model.get_submodule(full.unit)
        assert full.unit == other.unit == units[len(outputs)]
        outputs.append((module(*full.args, **full.kwargs), 2 * module(*other.args, **other.kwargs)))
        return outputs[-1]

    def forward(chunk: slice) -> None:
        finals.append(model(**samples.inputs(chunk)).sample)

    sweep(model, units, [lambda c=c: forward(c) for c in CHUNKS], SIZES, Store(on_disk), process)
    assert len(outputs) == len(units)

    with torch.no_grad():
        expected = unet(**samples.inputs(slice(0, 12))).sample
        torch.testing.assert_close(torch.cat(finals[:3]), expected, rtol=1e-4, atol=1e-5)
        handles = [model.get_submodule(u).register_forward_hook(lambda m, a, output: 2 * output) for u in units]
        doubled = model(**samples.inputs(slice(0, 12))).sample
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(torch.cat(finals[3:]), doubled, rtol=1e-4, atol=1e-4 * doubled.abs().max().item())
        assert not torch.allclose(doubled, expected)


def test_the_model_is_whole_again_after_an_error(
    wrap: Wrap, choose: Callable[..., Config], unet: UNet2DModel, samples: Samples
) -> None:
    quantized = wrap(choose())

    def process(full: UnitCall, mine: UnitCall) -> tuple[Tensor, Tensor]:
        raise KeyboardInterrupt

    inputs = samples.inputs(slice(0, 12))
    with pytest.raises(KeyboardInterrupt):
        sweep(quantized.model, quantized.units(), [lambda: quantized.model(**inputs)], [12], Store(False), process)
    assert torch.equal(quantized(**inputs).sample, unet(**inputs).sample)


def test_samples_that_take_different_ways_are_an_error() -> None:
    class Forked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = Forked()
    with pytest.raises(ModelError, match="different ways"):
        sweep(
            model,
            ["a", "b"],
            [lambda: model(torch.ones(1, 2)), lambda: model(-torch.ones(1, 2))],
            [1, 1],
            Store(False),
            lambda full, mine: (full.args[0], mine.args[0]),
        )


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_store_concatenates(on_disk: bool, dtype: torch.dtype) -> None:
    chunks = [torch.arange(n * 6).view(n, 2, 3).to(dtype) for n in (4, 1, 3)]
    whole = Store(on_disk)(chunks)
    assert whole.dtype == dtype and torch.equal(whole, torch.cat(chunks))


def test_switched_restores_each_quantizer(wrap: Wrap, choose: Callable[..., Config]) -> None:
    quantized = wrap(choose())
    layer = quantized.layers()["conv_in"]
    layer.weights_enabled = True
    with switched(quantized.model, weights=False, activations=True):
        assert not layer.weights_enabled and all(q.enabled for q in quantized.quantizers().values())
    assert layer.weights_enabled and not any(q.enabled for q in quantized.quantizers().values())
    assert not quantized.layers()["conv_out"].weights_enabled
