"""Every choice of a calibration run, as one frozen record, and the presets that name all of them (method section 3)."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from sys import float_info
from typing import Any, ClassVar, Literal, Self

from ptq_tdq.choices import Choices, checked
from ptq_tdq.errors import ConfigError
from ptq_tdq.files import read_file, reason
from ptq_tdq.intervals import Encoding, IntervalOptions, source_class
from ptq_tdq.processor import has_bfloat16
from ptq_tdq.scheme import MAX_BITS, MIN_BITS, Scheme

Role = Literal["first", "last", "time_embedding", "first_time_embedding", "modulation", "shortcut", "downsample"]
"""time_embedding: its input depends on t alone; modulation: on t and the condition (class, text), not on x_t.

first_time_embedding: the first of the layers whose input depends on t alone.
"""


@dataclass(frozen=True)
class Config(Choices):
    """All choices of one run. The defaults are preset ``default``.

    Each is checked and brought to the one form that is saved: "w4a8 " is "W4A8". Raises :class:`ConfigError`
    (:class:`SchemeError` for the scheme).

    Layers: ``eight_bit_layers``, ``weight_only_layers`` (8-bit weights, inputs in floating point),
    ``float_input_layers`` (weights of the scheme, inputs in floating point), ``float_layers`` and ``fixed_layers`` hold
    roles; ``skip`` holds name patterns of layers to leave in floating point. The input of a fixed layer, where it is
    quantized, keeps one interval that clips nothing (``fixed``). A unit of ``unlearned_layers`` alone is quantized but
    not reconstructed: it keeps nearest rounding and first intervals.

    ``rotate`` "hadamard" mixes the input channels of linear layers before they are quantized, by a fixed rotation that
    their weights undo (:mod:`ptq_tdq.rotate`); "auto" those for which it pays. Such a layer is not equalized.

    ``equalize`` "channels" divides large input channels of linear layers by factors that their weights take over
    (:mod:`ptq_tdq.recon.equalize`).

    ``weight_symmetric`` names the weights whose zero point is the middle code: 8-bit codes minus 128 then fit the
    signed bytes that integer kernels take.

    Rounding "gptq" is the closed form of :mod:`ptq_tdq.gptq`, with the ``damping`` of its compensation for quantized
    inputs, and with ``round_again`` once more at the end of phase A, when activations are quantized too; from there
    "learned" goes on for ``weight_iterations`` in units with weights of at most 3 bits, as far as it pays on
    trajectories held out from it. "adaround" is learned in ``weight_iterations`` of phase W, as published.

    The calibration set has ``samples_per_step`` rows at each of ``calibration_steps``; with ``thinning`` n they come
    from n times as many trajectories, each of which gives every n-th of its steps.

    The blocks of phase A learn from ``activation_inputs``: what the quantized blocks before them give, or what the
    full-precision ones give. Their loss weighs all samples alike or, "relative", each time step by one over the size of
    its targets.

    With ``token_intervals`` "auto", method "auto" gives those quantizers an interval for each token at run time
    (``dynamic-token``) for which that pays on held-out trajectories; it costs a pass over their values.

    Learning (:mod:`ptq_tdq.recon.weights`, :mod:`ptq_tdq.recon.activations`): ``interval_lr`` is the rate of a learned
    scale, ``module_lr`` that of a module's weights, ``bias_lr`` that of the layers' biases in both phases (0 keeps
    them). ``compute_dtype`` is that of the products inside the learning loops; losses that decide anything are always
    evaluated in float32. "auto" becomes, when the record is made, bfloat16 where the processor computes in it and
    float32 elsewhere, so what is saved and compared is what runs.
    """

    preset: str = "default"
    scheme: str = "W4A8"
    method: str = "auto"
    seed: int = 0
    # calibration set
    samples_per_step: int = 32
    calibration_steps: int = 25
    num_inference_steps: int = 25
    step_distribution: Literal["uniform", "normal"] = "uniform"
    thinning: int = 8
    # layers
    eight_bit_layers: tuple[Role, ...] = ("first", "last", "shortcut")
    weight_only_layers: tuple[Role, ...] = ("time_embedding", "first")
    float_input_layers: tuple[Role, ...] = ("modulation",)
    float_layers: tuple[Role, ...] = ()
    fixed_layers: tuple[Role, ...] = ("first",)
    unlearned_layers: tuple[Role, ...] = ()
    skip: tuple[str, ...] = ()
    split_shortcuts: bool = True
    attention: bool = True
    softmax_bits: int = 8
    # phase W
    rotate: Literal["none", "hadamard", "auto"] = "auto"
    equalize: Literal["none", "channels"] = "none"
    weight_granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    weight_range: Literal["mse", "minmax"] = "mse"
    weight_symmetric: Literal["never", "8-bit", "always"] = "8-bit"
    rounding: Literal["learned", "gptq", "adaround", "nearest"] = "learned"
    damping: float = 0.3
    round_again: bool = True
    weight_iterations: int = 200
    weight_lr: float = 3e-3
    scale_lr: float = 1e-3
    rounding_loss: float = 0.01
    rounding_warmup: float = 0.2
    rounding_b_start: float = 20.0
    rounding_b_end: float = 2.0
    # phase A
    activation_inputs: Literal["quantized", "full-precision"] = "quantized"
    token_intervals: Literal["never", "auto"] = "never"
    activation_range: Literal["mse", "mse-ends", "minmax", "ema"] = "mse-ends"
    activation_iterations: int = 80
    interval_lr: float = 1e-2
    module_lr: float = 2e-3
    loss_power: float = 2.4
    loss_weights: Literal["uniform", "relative"] = "uniform"
    batch_size: int = 32
    bias_lr: float = 1e-3
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    interval_parameter: Literal["raw", "log"] = "log"
    zero_point: Literal["fixed", "own"] = "own"
    module_start: Literal["as-is", "static", "steps"] = "steps"
    time_encoding: Encoding = "frequency"
    module_weights: Literal["he", "gaussian", "zero", "xavier"] = "he"
    thin_encoding: Encoding = "normalize"
    thin_activation: Literal["relu", "silu", "tanh"] = "silu"

    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "seed": (0, 1 << 32),
        **dict.fromkeys(("samples_per_step", "num_inference_steps", "calibration_steps"), (1, 1 << 20)),
        **dict.fromkeys(("thinning", "batch_size"), (1, 1 << 20)),
        **dict.fromkeys(("weight_iterations", "activation_iterations"), (0, 1 << 31)),
        **dict.fromkeys(("rounding_loss", "bias_lr", "scale_lr"), (0, inf)),
        **dict.fromkeys(("weight_lr", "interval_lr", "module_lr", "damping"), (float_info.min, inf)),
        **dict.fromkeys(("loss_power", "rounding_b_start", "rounding_b_end"), (1, inf)),  # below 1 no gradient at 0
        "rounding_warmup": (0, 1),
        "softmax_bits": (MIN_BITS, MAX_BITS + 1),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ConfigError(f"The preset must be one of {', '.join(PRESETS)}. Got {self.preset!r} instead.")
        object.__setattr__(self, "scheme", str(Scheme.parse(self.scheme)))
        if self.compute_dtype == "auto":
            object.__setattr__(self, "compute_dtype", "bfloat16" if has_bfloat16() else "float32")
        source_class(self.method)
        if self.calibration_steps > self.num_inference_steps:
            raise ConfigError(
                f"calibration_steps must not exceed num_inference_steps ({self.num_inference_steps}). "
                f"Got {self.calibration_steps} instead."
            )

    @property
    def parsed_scheme(self) -> Scheme:
        return Scheme.parse(self.scheme)

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

    def weight_choices(self) -> dict[str, Any]:
        """What phase W depends on: transforms of inputs on the bits and kind of their intervals too."""
        fitted = self.equalize != "none" or self.rotate == "auto"
        free = ACTIVATION_CHOICES - ({"fixed_layers"} if fitted else set())
        found = {key: value for key, value in self.to_dict().items() if key not in free}
        if fitted:
            return {**found, "intervals of tokens": source_class(self.method).by_token}
        return {**found, "scheme": f"W{self.parsed_scheme.weight_bits}"}

    def symmetric_weights(self, bits: int) -> bool:
        """Whether weights of so many bits have the middle code as their zero point."""
        return self.weight_symmetric == "always" or (self.weight_symmetric == "8-bit" and bits == 8)

    def changed(self, choices: Mapping[str, Any]) -> Self:
        """As the base says; ``calibration_steps`` follow fewer ``num_inference_steps`` unless they are named too."""
        if "num_inference_steps" in choices and "calibration_steps" not in choices:
            steps = checked("num_inference_steps", choices["num_inference_steps"], int)
            choices = {**choices, "calibration_steps": min(self.calibration_steps, max(steps, 1))}
        return super().changed(choices)


COLLECT_CHOICES = (
    *("samples_per_step", "calibration_steps", "num_inference_steps"),
    *("step_distribution", "thinning", "seed"),
)
"""What a calibration set depends on: arguments of :func:`~ptq_tdq.calib_data.collect`."""

ACTIVATION_CHOICES = frozenset(  # what phase W does not depend on, as a rule
    (
        *("preset", "method", "token_intervals", "softmax_bits", "fixed_layers", "activation_inputs"),
        "activation_range",
        *("activation_iterations", "interval_lr", "module_lr", "loss_power", "loss_weights", "round_again", "scale_lr"),
        *("interval_parameter", "zero_point", "module_start", "time_encoding", "module_weights", "thin_encoding"),
        "thin_activation",
    )
)

_PUBLISHED: Mapping[str, Any] = {  # what the published recipes share; x_t is clipped in none, whatever the method
    "thinning": 1,
    "num_inference_steps": 100,
    "weight_only_layers": (),
    "float_input_layers": (),
    "rotate": "none",
    "weight_symmetric": "never",
    "rounding": "adaround",
    "round_again": False,
    "weight_lr": 1e-3,
    "activation_inputs": "full-precision",
    "activation_iterations": 5000,
    "interval_lr": 4e-4,
    "module_lr": 4e-4,
    "interval_parameter": "raw",
    "activation_range": "mse",
    "thin_activation": "relu",
    "compute_dtype": "float32",
    "bias_lr": 0.0,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    # Q-Diffusion (arXiv 2302.04304) as its public code runs it: the strong baseline
    "qdiff": {
        **_PUBLISHED,
        "samples_per_step": 256,
        "calibration_steps": 20,
        "eight_bit_layers": (),
        "weight_iterations": 20000,
    },
    # the recipe under supp Table 4 (PTQD's public one): 1,024 pairs of runs of 20 steps
    "paper": {
        **_PUBLISHED,
        "num_inference_steps": 20,
        "samples_per_step": 64,
        "calibration_steps": 16,
        "batch_size": 16,
        "eight_bit_layers": ("first", "last", "first_time_embedding"),
        "unlearned_layers": ("first", "last", "first_time_embedding"),
        "float_layers": ("shortcut", "downsample"),
        "split_shortcuts": False,
        "attention": False,
        "weight_granularity": "per_tensor",
        "weight_iterations": 10000,
    },
}


def preset(name: str, **choices: Any) -> Config:
    """The configuration of preset ``name`` with some choices replaced; raises :class:`ConfigError`."""
    if name not in list(PRESETS):  # a file may name it by a list, which has no hash
        raise ConfigError(f"The preset must be one of {', '.join(PRESETS)}. Got {name!r} instead.")
    return Config().changed({"preset": name, **PRESETS[name]}).changed(choices)


MOST_BYTES = 1 << 20  # of a file of choices


def read_config_file(path: Path) -> dict[str, Any]:
    """Choices of a TOML (or ``.json``) file; raises :class:`ConfigError` where it cannot be read."""
    try:
        text = read_file(path, MOST_BYTES).decode()
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"The config file {path} cannot be read ({reason(error)}); give a TOML or JSON file."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"The config file {path} must hold a table of choices.")
    return data
