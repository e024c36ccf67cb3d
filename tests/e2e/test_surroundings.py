"""Both backends under another default dtype, under autocast, in several threads of OpenMP, and with inputs of other
dtypes and layouts.

They run in processes of their own, which wrong memory would end.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

import pytest
from hostile import run_python, small_artifact, small_dit, small_unet

from ptq_tdq.artifacts import write_artifact

START = """
import sys, torch
from ptq_tdq import load_quantized
folder, *backends = sys.argv[1:]
torch.set_num_threads(1)
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
labels, at_once = torch.tensor([0, 1]), torch.tensor([2.5, 2.5])

def predict(model, sample=x, t=at_once):
    with torch.no_grad():
        return model(sample, t, class_labels=labels).sample

def distance(a, b):
    return float((a.float() - b).pow(2).mean() / b.pow(2).mean())

for backend in backends:
"""
PREDICTION = """
model = load_quantized(folder, backend=backend)
expected = predict(model)
assert expected.dtype == torch.float32 and expected.isfinite().all()
if backend == "integer":
    assert model.facts["fused_blocks"] > 1
"""
DEFAULT_DTYPE = """
for dtype in (torch.bfloat16, torch.float16, torch.float64):
    torch.set_default_dtype(dtype)
    for each in (model, load_quantized(folder, backend=backend)):
        assert torch.get_default_dtype() == dtype
        assert torch.equal(predict(each), expected), dtype
        y = predict(each, x.to(dtype))
        assert y.dtype == (torch.float32 if dtype == torch.float64 else dtype)
        assert distance(y, expected) < 0.01, (dtype, distance(y, expected))
torch.set_default_dtype(torch.float32)
"""
AUTOCAST = """
for dtype in (torch.bfloat16, torch.float16):
    with torch.autocast("cpu", dtype):
        mine, loaded = predict(model), predict(load_quantized(folder, backend=backend))
    assert torch.equal(mine, loaded)
    if backend == "integer":
        assert torch.equal(mine, expected)
    else:  # whose products are in low precision, as asked for
        assert mine.isfinite().all() and distance(mine, expected) < 0.1, (dtype, distance(mine, expected))
    assert torch.equal(predict(model), expected)
"""
THREADS = """
for threads in (2, 3):
    torch.set_num_threads(threads)
    y = predict(model)
    assert torch.equal(y, expected) if backend == "integer" else distance(y, expected) < 1e-3, threads
torch.set_num_threads(1)
"""
INPUTS = """
from ptq_tdq.errors import PtqTdqError, RuntimeUnsupportedError
same = {
    "float64": x.double(),
    "channels last": x.contiguous(memory_format=torch.channels_last),
    "strided": torch.stack([x, x], -1)[..., 0],
    "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    "with gradients": x.clone().requires_grad_(),
    "a part of something larger": torch.cat([x, x])[:2],
    "one byte off": torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x),
}
for name, sample in same.items():  # float sums may take another order for another layout, and codes turn at ties
    y = predict(model, sample)
    assert torch.equal(y, expected) if backend == "integer" else distance(y, expected) < 1e-3, name
for dtype in (torch.float16, torch.bfloat16):
    assert distance(predict(model, x.to(dtype)), expected) < 0.01, dtype
expanded = x[:1].expand(2, -1, -1, -1)
assert distance(predict(model, expanded), predict(model, expanded.contiguous())) < 1e-3
with torch.enable_grad():
    try:
        y = model(x.clone().requires_grad_(), at_once, class_labels=labels).sample
        assert y.requires_grad and torch.equal(y.detach(), expected)
    except RuntimeUnsupportedError:
        assert backend == "integer"
with torch.inference_mode():
    assert torch.equal(model(x, at_once, class_labels=labels).sample, expected)
for sample in (x[:0], x[:, :2], x[:, :, :0], x[0], x[:, :, :1, :1], x.to("meta"), x.to(torch.complex64), x.int()):
    for t in (2.5, at_once, torch.tensor([1, 2]), torch.tensor([]), torch.zeros(2, 2)):
        try:
            predict(model, sample, t)
        except (PtqTdqError, RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
            pass  # torch's own words are as good as the original model's
assert torch.equal(predict(model), expected)
if backend == "integer":
    refused = {
        "empty": (x[:0], 1),
        "complex": (x.to(torch.complex64), 1),
        "on the CPU": (x.to("meta"), 1),
    }
    for said, (sample, t) in refused.items():
        try:
            predict(model, sample, t)
        except PtqTdqError as error:
            assert said in str(error), error
        else:
            raise AssertionError(said)
    for change in (lambda: model.half(), lambda: model.to("meta"), lambda: model.double()):
        try:
            change()
        except PtqTdqError as error:
            assert "float32 on the CPU" in str(error)
        else:
            raise AssertionError("moved")
    assert torch.equal(predict(model.to("cpu").float()), expected)
"""


@pytest.fixture(scope="module", params=[small_unet, small_dit])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surroundings") / "out"
    write_artifact(folder, small_artifact(request.param))
    return folder


@pytest.mark.parametrize("native", ["1", "0"], ids=["simulated and kernels", "torch"])
def test_the_results_are_those_of_float32(native: str, folder: Path) -> None:
    backends = ("simulated", "integer") if native == "1" else ("integer",)
    script = START + indent(PREDICTION + DEFAULT_DTYPE + AUTOCAST + THREADS + INPUTS, "    ")
    result = run_python(script, folder, *backends, PTQ_TDQ_NATIVE=native)
    assert result.returncode == 0, result.stderr[-2000:]
