"""One small artifact with every kind of content: split shortcut, product, dynamic quantizer, tied float tensors."""

from __future__ import annotations

import pytest
import torch

from ptq_tdq import preset
from ptq_tdq.artifacts import Artifact, IntervalTable, model_card
from ptq_tdq.records import LayerRecord, QuantizerRecord

T = 6  # entries of a table: t = 0 to 5


def _table(scale: float, zero_point: int) -> IntervalTable:
    return IntervalTable(scale * torch.linspace(1, 2, T), torch.full((T,), zero_point, dtype=torch.int32))


@pytest.fixture
def artifact() -> Artifact:
    layers = (
        LayerRecord("conv", "conv2d", "down", (0, 3), 4, (QuantizerRecord("conv", 8, "tdq", "mse"),)),
        LayerRecord(
            "short",
            "conv2d",
            "up",
            (0, 2, 5),
            3,
            (QuantizerRecord("short.0", 4, "tdq", "mse"), QuantizerRecord("short.1", 4, "tdq", "mse")),
        ),
        LayerRecord("proj", "linear", "proj", (0, 4), 2, (QuantizerRecord("proj", 8, "dynamic", "minmax"),)),
        LayerRecord(
            "attn.products.0",
            "product",
            "mid",
            (),
            None,
            (QuantizerRecord("attn.products.0.softmax", 8, "tdq", "minmax", from_zero=True),),
        ),
    )
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(7, generator=generator)
    config = {
        "base_model": {"id": "owner/model", "sha256": "a" * 64},
        "model_config": {"sample_size": 8},
        "scheme": "W4A8",
        "method": "tdq",
        "preset": "default",
        "choices": preset("default").to_dict(),
        "time_axis": {"argument": "timestep", "num_train_timesteps": T - 1, "scale": 1.0, "offset": 0.0},
        "calibration_set": {"sha256": "b" * 64, "num_samples": 256},
        "seed": 0,
        "versions": {"ptq_tdq": "0.1.0"},
    }
    metrics = {"final": {"sqnr_db": 21.25}, "sqnr_db_per_t": [20.0, 21.0]}
    codes = {
        name: torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
        for name, bits, shape in (("conv", 4, (3, 3, 3, 3)), ("short", 3, (2, 5, 1, 1)), ("proj", 2, (5, 3)))
    }
    return Artifact(
        config=config,
        layers=layers,
        tables={
            "conv": _table(0.1, 128),
            "short.0": _table(0.3, 7),
            "short.1": _table(1e-6, 15),
            "proj": IntervalTable(None, torch.tensor([3], dtype=torch.int32)),
            "attn.products.0.softmax": _table(1 / 255, 0),
        },
        weight_codes=codes,
        weight_scale={
            "conv": torch.full((3, 1), 0.1),
            "short": torch.full((1, 2), 0.2),
            "proj": torch.full((5, 1), 1.0),
        },
        weight_zero_point={
            "conv": torch.full((3, 1), 8, dtype=torch.int32),
            "short": torch.full((1, 2), 4, dtype=torch.int32),
            "proj": torch.full((5, 1), 2, dtype=torch.int32),
        },
        float_state={"conv.bias": shared[:3], "tied": shared, "half": shared.half(), "count": torch.tensor(5)},
        metrics=metrics,
        card=model_card(config, metrics),
    )
