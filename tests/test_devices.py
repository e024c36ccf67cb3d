"""Whole runs on a second device: no tensor is made in the wrong place, and the result is that of the CPU.

The device is pretended (tests/shared/elsewhere.py), so any machine can run this; it changes torch for the whole process
and therefore has one of its own. On a machine with a GPU the same runs use that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import run_python

SHARED = Path(__file__).parent / "shared"

SCRIPT = """
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions are compared with float32 of the CPU
pretended, folder, runs = sys.argv[1] == "elsewhere", Path(sys.argv[2]), json.loads(sys.argv[4])
sys.path.insert(0, sys.argv[3])
if pretended:
    from elsewhere import second_device, send
from denoisers import DENOISERS, prediction
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from ptq_tdq import FinetuneConfig, calibrate, finetune, load_quantized, preset, record
from ptq_tdq.calib_data import from_pipeline
from ptq_tdq.calibration import foresee
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.study.cell import check_plans
from small_denoiser import SmallDenoiser


def run(folder, name, smaller, choices):
    denoiser = next(d for d in DENOISERS if d.name == name)
    denoiser = replace(denoiser, config={**denoiser.config, **smaller})
    model = denoiser.build()
    with record(model, num_train_timesteps=1000) as calls, torch.no_grad():
        for t in (1000.0, 601.0, 201.0):
            model(**denoiser.inputs(2, torch.full((2,), t)))
    config = preset("default", scheme="W4A8", activation_iterations=2, weight_iterations=2, batch_size=4,
                    weight_range="minmax", activation_range="minmax", compute_dtype="float32", **choices)
    here = calibrate(model, config, calls)
    rows = slice(0, 2)
    with torch.no_grad():
        expected = prediction(here(**calls.inputs(rows)))
    with second_device() if pretended else nullcontext(torch.device("cuda", 0)) as device, torch.no_grad():
        moved = send(denoiser.build()) if pretended else denoiser.build().to(device)
        inputs = calls.to(device).inputs(rows)
        there = calibrate(moved, config, calls, run_directory=folder / "run")
        found = prediction(there(**inputs))
        assert found.device == device and there.device == device
        assert all(source.scale.device == device for source in (q.source for q in there.quantizers().values())
                   if hasattr(source, "scale"))
        again = calibrate(moved, config, calls, run_directory=folder / "run")
        there.save_pretrained(folder / "out")
        loaded = load_quantized(folder / "out", device=device)
        resumed, loaded = (prediction(model(**inputs)) for model in (again, loaded))
        return {"calibrated": sqnr_db(expected, found.cpu()), "resumed": bool((resumed == found).all()),
                "loaded": bool((loaded == found).all())}


def tune():
    torch.manual_seed(0)
    model = SmallDenoiser().eval().requires_grad_(False)
    with record(model, num_train_timesteps=1000) as calls:
        for t in (1000.0, 601.0, 201.0):
            model(torch.randn(3, 3, 8, 8), torch.full((3,), t))
    began = calibrate(model, preset("default", scheme="W4A8", method="static", rounding="nearest"), calls)
    with second_device() if pretended else nullcontext(torch.device("cuda", 0)) as device, torch.no_grad():
        moved = send(model) if pretended else model.to(device)
        inputs = calls.to(device).inputs(slice(0, 3))
        tuned = finetune(moved, began.to_artifact(), FinetuneConfig(iterations=3, batch_size=4, method="tdq"), calls)
        assert tuned.device == device
        return sqnr_db(prediction(moved(**inputs)), prediction(tuned(**inputs)))


def foretell():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    model = from_pipeline(DDIMPipeline(unet.eval(), DDIMScheduler()))
    config = preset("default", num_inference_steps=4, calibration_steps=4, compute_dtype="float32")
    here = foresee(model, config)
    with second_device() if pretended else nullcontext(torch.device("cuda", 0)) as device:
        send(model.denoiser) if pretended else model.denoiser.to(device)
        there = foresee(model, config)
        check_plans(model, [config])
    return [[x.units, x.layers, x.rows, x.recorded_bytes] for x in (here, there)]


print(json.dumps({title: run(folder / title, *of) for title, of in runs.items()}
                 | {"tuned": tune(), "foretold": foretell()}))
"""

ONE_BLOCK = {"num_layers": 1}
RUNS = {
    "closed form, networks of t": ("DiTTransformer2DModel", ONE_BLOCK, {"method": "tdq", "module_start": "as-is"}),
    "AdaRound, steps": (
        "PixArtTransformer2DModel",
        ONE_BLOCK,
        {"method": "step-lsq", "rounding": "adaround", "loss_weights": "relative"},
    ),
    "split shortcuts, networks of statistics": (
        "UNet2DModel",
        {},
        {
            "method": "dynamic-statistics-time",
            "module_start": "as-is",
            "rounding": "nearest",
            "skip": "*mid*,*up_blocks.1*",
        },
    ),
}


@pytest.fixture(scope="module", params=["elsewhere", "cuda"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run gives on a device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    done = run_python(SCRIPT, request.param, tmp_path_factory.mktemp("runs"), SHARED, json.dumps(RUNS))
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("run", RUNS)
def test_a_run_on_another_device_gives_what_the_cpu_gives(run: str, found: dict[str, Any]) -> None:
    assert found[run]["calibrated"] > 30, "other orders of sums flip a code here and there"
    assert found[run]["resumed"] and found[run]["loaded"]


def test_fine_tuning_on_calls_of_the_cpu_runs_where_the_model_is(found: dict[str, Any]) -> None:
    assert found["tuned"] > 15, "as close to full precision as W4A8 is, after three iterations"


def test_what_a_run_or_a_study_will_take_is_foretold_there_too(found: dict[str, Any]) -> None:
    here, there = found["foretold"]
    assert here == there
