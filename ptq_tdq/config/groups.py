"""The groups of choices of a calibration run; the defaults are those of preset ``default``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq_tdq.choices import AT_LEAST_ONE, COUNT, ITERATIONS, NOT_NEGATIVE, POSITIVE, SHARE, Choices, choice
from ptq_tdq.errors import ConfigError
from ptq_tdq.processor import COMPUTE_DTYPES, ComputeDtype, compute_dtype
from ptq_tdq.scheme import MAX_BITS, MIN_BITS

Role = Literal["first", "last", "time_embedding", "first_time_embedding", "modulation", "shortcut", "downsample"]
ADAROUND = "AdaRound, arXiv 2004.10568"
BRECQ = "BRECQ, arXiv 2102.05426"
PTQD = "PTQD, arXiv 2305.10657"
Q_DIFFUSION = "Q-Diffusion, arXiv 2302.04304"
TFMQ_DM = "TFMQ-DM, arXiv 2311.16503"


@dataclass(frozen=True)
class Calibration(Choices):
    """The calibration set: samples_per_step rows at each of calibration_steps."""

    samples_per_step: int = choice(
        32,
        "Calibration samples at each step; in all so many times calibration_steps.",
        unit="samples",
        bounds=COUNT,
        source=Q_DIFFUSION,
    )
    calibration_steps: int = choice(
        25,
        "How many of the sampler's steps calibration looks at; all, if it has fewer.",
        unit="steps",
        bounds=COUNT,
        source=Q_DIFFUSION,
    )
    num_inference_steps: int = choice(25, "Steps of the sampler.", unit="steps", bounds=COUNT)
    step_distribution: Literal["uniform", "normal"] = choice(
        "uniform",
        "How the steps that calibration looks at are chosen.",
        alternatives={"uniform": "evenly", "normal": "by chance, more of them near t = 0"},
        source="PTQ4DM, arXiv 2211.15736",
    )
    thinning: int = choice(
        8,
        "With n the samples come from n times as many trajectories, each of which gives every n-th of its steps: steps "
        "of one trajectory are alike.",
        bounds=COUNT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_steps > self.num_inference_steps:
            raise ConfigError(
                f"calibration_steps must not exceed num_inference_steps ({self.num_inference_steps}). "
                f"Got {self.calibration_steps} instead."
            )


@dataclass(frozen=True)
class Layers(Choices):
    """What is quantized. Layers are named by their roles: first and last (on x); time_embedding (its input depends on
    t alone), first_time_embedding (the first of these); modulation (on t and the condition, not on x); shortcut;
    downsample.
    """

    eight_bit_layers: tuple[Role, ...] = choice(
        ("first", "last", "shortcut"), "Layers of 8 bits, weights and inputs.", source=PTQD, unit="roles"
    )
    weight_only_layers: tuple[Role, ...] = choice(
        ("time_embedding", "first"),
        "Layers with 8-bit weights and inputs in floating point.",
        source=TFMQ_DM,
        unit="roles",
    )
    float_input_layers: tuple[Role, ...] = choice(
        ("modulation",), "Layers with weights of the scheme and inputs in floating point.", unit="roles"
    )
    float_layers: tuple[Role, ...] = choice((), "Layers that stay in floating point.", source=PTQD, unit="roles")
    unlearned_layers: tuple[Role, ...] = choice(
        (),
        "Blocks of such layers alone are not reconstructed: they keep nearest rounding and first intervals.",
        source=PTQD,
        unit="roles",
    )
    skip: tuple[str, ...] = choice(
        (), "Patterns of names of layers that stay in floating point (mid_block.*).", unit="patterns"
    )
    split_shortcuts: bool = choice(
        True, "Shortcuts that read two concatenated tensors have intervals for each.", source=Q_DIFFUSION
    )
    attention: bool = choice(
        True, "Attention products are quantized: q, k, v and the softmax output.", source=Q_DIFFUSION
    )


@dataclass(frozen=True)
class Weights(Choices):
    """Weights, in phase W; with round_again, and "learned" ones of few bits, again at the end of phase A."""

    rotate: Literal["none", "hadamard", "auto"] = choice(
        "auto",
        "Input channels of linear layers are mixed before they are quantized, by a fixed rotation that the weights "
        "undo. Such a layer is not equalized.",
        alternatives={"none": "in no layer", "hadamard": "in all", "auto": "where it pays"},
        source="QuaRot, arXiv 2404.00456",
    )
    equalize: Literal["none", "channels"] = choice(
        "none",
        "Large input channels of linear layers are divided by factors that the weights take over.",
        alternatives={"none": "no", "channels": "where that lowers the error"},
        source="SmoothQuant, arXiv 2211.10438",
    )
    weight_granularity: Literal["per_channel", "per_tensor"] = choice(
        "per_channel",
        "How many scales a weight has.",
        alternatives={"per_channel": "one for each output channel", "per_tensor": "one"},
        source=Q_DIFFUSION,
    )
    weight_range: Literal["mse", "minmax"] = choice(
        "mse",
        "First interval of a weight.",
        alternatives={"mse": "the one with the least |w - w_hat|^2.4", "minmax": "from least to largest value"},
        source=Q_DIFFUSION,
    )
    weight_symmetric: Literal["never", "8-bit", "always"] = choice(
        "8-bit",
        "Weights whose zero point is the middle code: 8-bit codes minus 128 then fit the signed bytes of kernels.",
        alternatives={"never": "none", "8-bit": "those of 8 bits", "always": "all"},
    )
    rounding: Literal["learned", "gptq", "adaround", "nearest"] = choice(
        "learned",
        "How weights are rounded.",
        alternatives={
            "learned": "in closed form; in blocks with weights of at most 3 bits codes, scales and biases learn from "
            "there, as far as it pays on held-out trajectories",
            "gptq": "in closed form (arXiv 2210.17323)",
            "adaround": "up or down, learned in phase W (arXiv 2004.10568)",
            "nearest": "to the nearest code",
        },
    )
    damping: float = choice(
        0.3,
        "Added to the inputs' correlations where the closed form makes up for what quantized inputs have lost.",
        bounds=POSITIVE,
    )
    round_again: bool = choice(
        True, "The closed form is computed again at the end of phase A, for inputs behind their quantizers."
    )
    weight_iterations: int = choice(
        200, "Iterations of adaround, or of learned rounding.", unit="iterations", bounds=ITERATIONS, source=BRECQ
    )
    weight_lr: float = choice(3e-3, "Learning rate (Adam) of rounding.", bounds=POSITIVE, source=BRECQ)
    scale_lr: float = choice(
        1e-3, "Learning rate (Adam) of the logarithms of weights' scales in learned rounding.", bounds=NOT_NEGATIVE
    )
    rounding_loss: float = choice(
        0.01, "Factor of adaround's regularizer sum(1 - |2 h - 1|^b).", bounds=NOT_NEGATIVE, source=ADAROUND
    )
    rounding_warmup: float = choice(
        0.2,
        "First part of the iterations, without adaround's regularizer.",
        unit="share",
        bounds=SHARE,
        source=ADAROUND,
    )
    rounding_b_start: float = choice(
        20.0, "The b of adaround's regularizer after the warm-up.", bounds=AT_LEAST_ONE, source=ADAROUND
    )
    rounding_b_end: float = choice(
        2.0, "The b of adaround's regularizer at the end.", bounds=AT_LEAST_ONE, source=ADAROUND
    )


@dataclass(frozen=True)
class Activations(Choices):
    """Activations, in phase A."""

    softmax_bits: int = choice(
        8, "Bits of softmax outputs.", unit="bits", bounds=(MIN_BITS, MAX_BITS + 1), source=Q_DIFFUSION
    )
    fixed_layers: tuple[Role, ...] = choice(
        ("first",), "Layers whose input, where it is quantized, keeps one interval that clips nothing.", unit="roles"
    )
    token_intervals: Literal["never", "auto"] = choice(
        "never",
        "Whether method auto may give an activation an interval for each token at run time (dynamic-token).",
        alternatives={
            "never": "no",
            "auto": "where that pays on held-out trajectories; it costs a pass over the values",
        },
        source="ViDiT-Q, arXiv 2406.02540",
    )
    activation_inputs: Literal["quantized", "full-precision"] = choice(
        "quantized",
        "What blocks learn their intervals from.",
        alternatives={
            "quantized": "what the quantized blocks before them give",
            "full-precision": "what the full-precision ones give",
        },
        source=BRECQ,
    )
    activation_range: Literal["mse", "mse-ends", "minmax", "ema"] = choice(
        "mse-ends",
        "First interval of an activation.",
        alternatives={
            "mse": "the one with the least |x - x_hat|^2.4, by one factor for both ends of the range",
            "mse-ends": "the same with a factor for each end",
            "minmax": "from least to largest value",
            "ema": "the same of running averages over batches",
        },
        source=f"{Q_DIFFUSION}; {TFMQ_DM}",
    )
    activation_iterations: int = choice(
        40, "Iterations of a block, at most.", unit="iterations", bounds=ITERATIONS, source=BRECQ
    )
    activation_epochs: int = choice(
        2,
        "Passes over the calibration set after which a block's iterations end: more of few samples gain nothing. "
        "0 for no such end.",
        unit="epochs",
        bounds=ITERATIONS,
    )
    interval_lr: float = choice(
        1e-2, "Learning rate (Adam, cosine decay) of a learned scale.", bounds=POSITIVE, source=BRECQ
    )
    module_lr: float = choice(2e-3, "Learning rate (Adam, cosine decay) of networks of t.", bounds=POSITIVE)
    loss_power: float = choice(  # below 1 there is no gradient at 0
        2.4, "The p of the loss |y - y_hat|^p of a block.", bounds=AT_LEAST_ONE, source=BRECQ
    )
    loss_weights: Literal["uniform", "relative"] = choice(
        "uniform",
        "How samples weigh in the loss of a block.",
        alternatives={"uniform": "alike", "relative": "each time step by one over the size of its targets"},
    )


@dataclass(frozen=True)
class Learning(Choices):
    """What both phases share."""

    batch_size: int = choice(32, "Samples of an iteration.", unit="samples", bounds=COUNT, source=BRECQ)
    bias_lr: float = choice(
        1e-3, "Learning rate (Adam) of the layers' biases in both phases; 0 keeps them.", bounds=NOT_NEGATIVE
    )
    compute_dtype: ComputeDtype = choice(
        "auto",
        "Dtype of products inside the learning loops; losses that decide anything are evaluated in float32. What auto "
        "becomes is saved.",
        alternatives=COMPUTE_DTYPES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "compute_dtype", compute_dtype(self.compute_dtype))
