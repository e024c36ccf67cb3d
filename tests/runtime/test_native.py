"""The memory that kernels are let near to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptq_tdq.errors import RuntimeUnsupportedError
from ptq_tdq.rotate import rotated
from ptq_tdq.runtime.attention import native_attend
from ptq_tdq.runtime.kernels import Activation, Before, Grid, Norm, reference_quantize
from ptq_tdq.runtime.native import native_quantize
from ptq_tdq.runtime.products import Geometry, OneDnnProducts, Weights
from ptq_tdq.runtime.step import Interval

ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)
X, GRID = torch.randn(2, 8, 4, 4), Grid((0, 8), 8, 8)
GOOD = {"x": X, "grid": GRID, "scale": ONE, "zero_point": ZERO, "before": Before()}
NORM = Norm(4, torch.ones(8), torch.zeros(8), 1e-5)
GATED = Activation("silu", gated=True)
WRONG: dict[str, dict[str, Any]] = {
    "double scale": {"scale": ONE.double()},
    "scales of fewer samples": {"x": X.repeat(2, 1, 1, 1), "scale": torch.ones(2), "zero_point": ZERO.repeat(2)},
    "one zero point for two scales": {"scale": torch.ones(2)},
    "scales with gaps": {"scale": torch.ones(4)[::2], "zero_point": ZERO.repeat(2)},
    "long zero point": {"zero_point": ZERO.long()},
    "channels beyond x": {"grid": Grid((0, 9), 12, 8)},
    "channels before x": {"grid": Grid((-1, 8), 12, 8)},
    "no channels": {"grid": Grid((4, 4), 4, 8)},
    "an output too narrow": {"grid": Grid((0, 8), 4, 8)},
    "negative padding": {"grid": GRID._replace(padding=(0, 0, -1, 0))},
    "no upsampling": {"grid": GRID._replace(up=0)},
    "a norm of part of x": {"grid": Grid((0, 4), 4, 8), "before": Before(norm=NORM)},
    "an activation of part of x": {"grid": Grid((0, 4), 4, 8), "before": Before(activation=Activation("gelu"))},
    "a rotation of part of x": {"grid": Grid((0, 4), 4, 8), "before": Before(rotate=rotated)},
    "a gate that is missing": {"before": Before(activation=GATED)},
    "a gate of fewer channels": {"x": X[:, :7], "grid": Grid((0, 3), 4, 8), "before": Before(activation=GATED)},
    "gains of the gate": {"grid": Grid((0, 4), 4, 8), "before": Before(activation=GATED, gain=torch.ones(8))},
    "groups that do not divide": {"before": Before(norm=Norm(3, torch.ones(8), torch.zeros(8), 1e-5))},
    "a short norm": {"before": Before(norm=Norm(4, torch.ones(4), torch.zeros(8), 1e-5))},
    "a norm in half": {"before": Before(norm=Norm(4, torch.ones(8).half(), torch.zeros(8).half(), 1e-5))},
    "a shift of fewer samples": {"before": Before(torch.ones(1, 8), NORM)},
    "a shift of fewer channels": {"before": Before(torch.ones(2, 4), NORM)},
}


@pytest.mark.parametrize("case", WRONG)
def test_memory_of_another_form_is_refused(library: Any, case: str) -> None:
    with pytest.raises(RuntimeUnsupportedError, match="integer kernels"):
        native_quantize(library)(**GOOD | WRONG[case])


@pytest.mark.parametrize(
    "x",
    [X.double(), X.half(), X[:, :, ::2], X[:1].expand(3, -1, -1, -1), X[:0], X.clone().requires_grad_(), X[:, :, :0]],
    ids=["float64", "float16", "strided", "expanded", "empty batch", "gradients", "no rows"],
)
@pytest.mark.parametrize("before", [Before(), Before(norm=NORM), Before(activation=GATED, rotate=rotated)])
def test_any_x_is_quantized_as_float32(library: Any, x: torch.Tensor, before: Before) -> None:
    channels = before.channels(8)
    given = GOOD | {
        "grid": Grid((0, channels), channels, 8),
        "before": before,
        "scale": ONE * 0.02,
        "zero_point": ZERO + 100,
    }
    found = native_quantize(library)(**given | {"x": x})
    expected = reference_quantize(**given | {"x": x.detach().float()}) if x.numel() else torch.empty_like(found)
    assert found.shape == (*x.shape[:1], channels, *x.shape[2:])
    difference = (found.int() - expected.int()).abs() if x.numel() else torch.zeros(1)
    assert difference.max() <= (1 if any(before) else 0)


@pytest.mark.parametrize("change", ["k", "v", "scale", "mask"])
def test_attention_of_another_form_is_refused(library: Any, change: str) -> None:
    q = torch.randn(2, 2, 5, 4)
    k, v = (q[..., :3] if change == "k" else q), (q[:, :, :3] if change == "v" else q)
    mask = torch.zeros(5, 4) if change == "mask" else None
    rows = {0: 1, 1: 2} if change == "scale" else {}

    def find(index: int, x: torch.Tensor) -> Interval:
        return Interval(torch.ones(rows.get(index, 1)), torch.zeros(rows.get(index, 1), dtype=torch.int32))

    with pytest.raises(RuntimeUnsupportedError if change != "mask" else RuntimeError):
        native_attend(library)(q, k, v, find, [8] * 4, 1.0, mask)


def test_products_of_another_form_are_refused() -> None:
    codes = torch.zeros(2, 4, 5, 5, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weights = Weights(torch.zeros(6, 4, 3, 3, dtype=torch.uint8), 4, torch.ones(6), ZERO.repeat(6), torch.zeros(6))
    products, interval = OneDnnProducts(weights, Geometry((3, 3))), Interval(ONE, ZERO)
    assert products(codes, interval, None).shape == (2, 6, 3, 3)
    wrong = [
        (codes[:, :3], interval, None),
        (codes.contiguous(), interval, None),
        (codes.int(), interval, None),
        (codes[:, :, :2], interval, None),
        (codes, Interval(torch.ones(3), ZERO.repeat(3)), None),
        (codes, interval, torch.zeros(2, 6, 3, 2)),
        (codes, interval, torch.zeros(2, 6, 3, 3).double()),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeUnsupportedError):
            products(*arguments)
    for changed in ({"bias": torch.zeros(1)}, {"scale": torch.ones(6).double()}, {"zero_point": ZERO}):
        with pytest.raises(RuntimeUnsupportedError, match="are no weights"):
            Weights(**{**vars(weights), **changed})
