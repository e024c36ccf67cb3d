"""Every choice of fine-tuning, as one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ptq_tdq.choices import COUNT, ITERATIONS, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Choices, choice
from ptq_tdq.errors import ConfigError
from ptq_tdq.finetuning.quantizers import Quantizer, quantizer_class
from ptq_tdq.intervals import IntervalChoices, source_class
from ptq_tdq.processor import COMPUTE_DTYPES, ComputeDtype, compute_dtype

KEEP = "keep"
AT_LEAST_ONCE = (1, 1 << 31)
NOT_LEARNED = {
    "auto": "chooses by what calibration compares, and fine-tuning has nothing to compare",
    "fixed": "is that of x_t alone, and does not learn",
}
EFFICIENTDM = "EfficientDM, arXiv 2310.03270"


@dataclass(frozen=True)
class FinetuneConfig(Choices):
    """All choices of one run; each is checked, and brought to the one form that is saved.

    Interval sources begin at the artifact's intervals; the choices about them are those of calibration. Learning is by
    AdamW, and what is saved are averages of what was learned.
    """

    method: str = choice(
        KEEP, "Interval source of all activations but those of one fixed interval; keep: each goes on with its own."
    )
    quantizer: str = choice(
        "lsq", f"How activations are quantized while they learn: {', '.join(sorted(Quantizer.registry))}."
    )
    loss: Literal["auto", "distillation", "denoising"] = choice(
        "auto",
        "What is learned.",
        alternatives={
            "auto": "denoising where there are data, else distillation",
            "distillation": "the prediction of the full-precision model",
            "denoising": "what the model was trained to predict, which needs data",
        },
        source=EFFICIENTDM,
    )
    seed: int = choice(0, "Seed of trajectories, order and noise.", bounds=SEED)
    trajectories: int = choice(
        512,
        "Full-precision trajectories to learn on where there are no data.",
        unit="samples",
        bounds=(2, 1 << 20),
        source=EFFICIENTDM,
    )
    num_inference_steps: int = choice(25, "Steps of the trajectories that it learns on.", unit="steps", bounds=COUNT)
    iterations: int = choice(1000, "How long it learns.", unit="iterations", bounds=(1, 10_000_001))
    batch_size: int = choice(32, "Samples of an iteration, of all processes together.", unit="samples", bounds=COUNT)
    accumulation: int = choice(1, "Pieces that a batch is run in.", bounds=COUNT)
    weight_lr: float = choice(
        2e-4, "Learning rate of weights, biases and all other tensors.", bounds=POSITIVE, source="TDQ, public code"
    )
    scale_lr: float = choice(1e-3, "Learning rate of the logarithms of weights' scales.", bounds=POSITIVE)
    interval_lr: float = choice(1e-3, "Learning rate of learned scales of activations.", bounds=POSITIVE)
    module_lr: float = choice(1e-3, "Learning rate of networks of t.", bounds=POSITIVE)
    weight_decay: float = choice(0.0, "Weight decay of AdamW.", bounds=NOT_NEGATIVE)
    warmup: int = choice(100, "First iterations, over which learning rates rise.", unit="iterations", bounds=ITERATIONS)
    schedule: Literal["constant", "cosine"] = choice(
        "cosine", "Learning rates after the warm-up.", alternatives={"constant": "stays", "cosine": "falls to 0"}
    )
    ema: float = choice(0.99, "Momentum of the averages that are saved.", bounds=SHARE)
    freeze_from: float = choice(
        0.8,
        "Part of the iterations after which quantizers that end frozen (nipq) are.",
        unit="share",
        bounds=SHARE,
        source="NIPQ, CVPR 2023",
    )
    compute_dtype: ComputeDtype = choice(
        "auto",
        "Dtype of products while it learns. What auto becomes is saved.",
        alternatives=COMPUTE_DTYPES,
    )
    cuda_graph: bool = choice(
        False,
        "On a GPU, launch the kernels of an iteration together; not for models that wait for the device within a call.",
    )
    checkpoint_every: int = choice(
        100, "A checkpoint is kept after each so many iterations.", unit="iterations", bounds=AT_LEAST_ONCE
    )
    intervals: IntervalChoices = field(default_factory=IntervalChoices)

    def __post_init__(self) -> None:
        super().__post_init__()
        quantizer_class(self.quantizer)
        if self.method != KEEP and source_class(self.method).pattern in NOT_LEARNED:
            raise ConfigError(f"The method '{self.method}' {NOT_LEARNED[self.method]}; name another, or {KEEP}.")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size must be a multiple of accumulation ({self.accumulation}). Got {self.batch_size} instead."
            )
        object.__setattr__(self, "compute_dtype", compute_dtype(self.compute_dtype))
