"""Every choice of fine-tuning, as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from sys import float_info
from typing import ClassVar, Literal

from ptq_tdq.choices import Choices
from ptq_tdq.errors import ConfigError
from ptq_tdq.finetuning.quantizers import quantizer_class
from ptq_tdq.intervals import Encoding, IntervalOptions, source_class
from ptq_tdq.processor import has_bfloat16

KEEP = "keep"


@dataclass(frozen=True)
class FinetuneConfig(Choices):
    """All choices of one run; each is checked, and brought to the one form that is saved.

    ``method`` is an interval source for all activations but those of one fixed interval, or "keep": each goes on with
    its own. ``quantizer`` says how activations are quantized while they learn
    (:mod:`ptq_tdq.finetuning.quantizers`). Sources begin at the artifact's intervals; the choices about them are those
    of calibration (:class:`~ptq_tdq.intervals.IntervalOptions`).

    ``loss``: "distillation" is the squared distance to the full-precision model's prediction, "denoising" that to what
    the model is trained to predict, which needs data; "auto" is the latter where there are data. Without data the model
    learns on ``trajectories`` of its own, of ``num_inference_steps`` steps.

    AdamW; each rate rises over ``warmup`` iterations and then stays ("constant") or falls to 0 ("cosine"):
    ``weight_lr`` of weights, biases and all other tensors, ``scale_lr`` of the logarithms of weights' scales,
    ``interval_lr`` of learned scales of activations, ``module_lr`` of networks of the time step. ``batch_size`` is that
    of all processes together, run in ``accumulation`` pieces. What is saved are averages (``ema``) of what was learned.
    From ``freeze_from`` of the iterations on, quantizers that are frozen at their end (nipq) are.
    """

    method: str = KEEP
    quantizer: str = "lsq"
    loss: Literal["auto", "distillation", "denoising"] = "auto"
    seed: int = 0
    trajectories: int = 512
    num_inference_steps: int = 25
    iterations: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    weight_lr: float = 2e-4
    scale_lr: float = 1e-3
    interval_lr: float = 1e-3
    module_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float = 0.99
    freeze_from: float = 0.8
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: int = 100
    interval_parameter: Literal["raw", "log"] = "log"
    zero_point: Literal["fixed", "own"] = "own"
    module_start: Literal["as-is", "static", "steps"] = "steps"
    time_encoding: Encoding = "frequency"
    module_weights: Literal["he", "gaussian", "zero", "xavier"] = "he"
    thin_encoding: Encoding = "normalize"
    thin_activation: Literal["relu", "silu", "tanh"] = "silu"

    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "seed": (0, 1 << 32),
        **dict.fromkeys(("num_inference_steps", "batch_size", "accumulation"), (1, 1 << 20)),
        **dict.fromkeys(("iterations", "checkpoint_every"), (1, 1 << 31)),
        **dict.fromkeys(("weight_lr", "scale_lr", "interval_lr", "module_lr"), (float_info.min, inf)),
        "trajectories": (2, 1 << 20),
        "weight_decay": (0, inf),
        "warmup": (0, 1 << 31),
        **dict.fromkeys(("ema", "freeze_from"), (0, 1)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        quantizer_class(self.quantizer)
        if self.method != KEEP:
            source_class(self.method)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size must be a multiple of accumulation ({self.accumulation}). Got {self.batch_size} instead."
            )
        if self.compute_dtype == "auto":
            object.__setattr__(self, "compute_dtype", "bfloat16" if has_bfloat16() else "float32")

    @property
    def interval_options(self) -> IntervalOptions:
        return IntervalOptions(
            parameter=self.interval_parameter,
            zero_point=self.zero_point,
            start=self.module_start,
            encoding=self.time_encoding,
            weights=self.module_weights,
            thin_encoding=self.thin_encoding,
            activation=self.thin_activation,
        )
