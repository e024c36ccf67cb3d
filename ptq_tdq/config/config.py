"""All choices of a calibration run in one frozen record, and the presets (method section 3)."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ptq_tdq.choices import SEED, Choices, choice, described, groups, ungrouped
from ptq_tdq.config.groups import Activations, Calibration, Layers, Learning, Weights
from ptq_tdq.errors import ConfigError
from ptq_tdq.files import read_file, reason
from ptq_tdq.intervals import IntervalChoices, source_class
from ptq_tdq.scheme import Scheme

PHASE_A = ("round_again", "scale_lr")  # choices of weights that phase W does not know


@dataclass(frozen=True)
class Config(Choices):
    """All choices of one run, in groups (``config.weights.rounding``). The defaults are preset ``default``.

    Each is checked and brought to the one form that is saved: "w4a8 " is "W4A8". Raises :class:`ConfigError`
    (:class:`SchemeError` for the scheme).
    """

    preset: str = choice("default", "Where every choice comes from that nothing else names: default, qdiff or paper.")
    scheme: str = choice("W4A8", "Bits of weights and activations, 2 to 8 each (W4A8).")
    method: str = choice(
        "auto",
        "Intervals of activations: auto (static or tdq-thin, whichever pays), static (S_1: one learned number for all "
        "t), S_N (one for each Nth of the time axis: S_4), tdq and tdq-thin (networks of t), step-table and step-lsq "
        "(one for each sampling step, searched or learned); at run time dynamic, dynamic-statistics, "
        "dynamic-statistics-time, dynamic-token, dynamic-token-static, dynamic-token-table, dynamic-token-tdq.",
    )
    seed: int = choice(0, "Seed of noise, order and initialisation.", bounds=SEED)
    calibration: Calibration = field(default_factory=Calibration)
    layers: Layers = field(default_factory=Layers)
    weights: Weights = field(default_factory=Weights)
    activations: Activations = field(default_factory=Activations)
    intervals: IntervalChoices = field(default_factory=IntervalChoices)
    learning: Learning = field(default_factory=Learning)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ConfigError(f"The preset must be one of {', '.join(PRESETS)}. Got {self.preset!r} instead.")
        if PRESETS[self.preset] and all(getattr(self, name) == group() for name, group in groups(Config).items()):
            raise ConfigError(f"Config has no choices of preset {self.preset!r} in it; call preset({self.preset!r}).")
        object.__setattr__(self, "scheme", str(Scheme.parse(self.scheme)))
        source_class(self.method)
        if self.method == "fixed":
            raise ConfigError("The method 'fixed' is that of the layers that fixed_layers names; choose another.")

    @property
    def parsed_scheme(self) -> Scheme:
        """The scheme as two numbers of bits."""
        return Scheme.parse(self.scheme)

    @property
    def recipe(self) -> dict[str, Any]:
        """What a calibration set depends on: arguments of :func:`~ptq_tdq.calib_data.collect`."""
        return {**self.calibration.to_dict(), "seed": self.seed}

    @property
    def weight_choices(self) -> dict[str, Any]:
        """What phase W depends on, by name: transforms of inputs on the bits and kind of their intervals too."""
        phase = ("calibration", "layers", "weights", "learning")
        every, known = ungrouped(self.to_dict()), described(Config)
        found = {name: every[name] for name in known if known[name].group in phase and name not in PHASE_A}
        found["seed"] = self.seed
        if self.weights.equalize == "none" and self.weights.rotate != "auto":
            return {**found, "scheme": f"W{self.parsed_scheme.weight_bits}"}
        by_token = source_class(self.method).by_token
        fitted = {"fixed_layers": every["fixed_layers"], "intervals of tokens": by_token}
        return {**found, **fitted, "scheme": self.scheme}

    def symmetric_weights(self, bits: int) -> bool:
        """Whether weights of so many bits have the middle code as their zero point."""
        symmetric = self.weights.weight_symmetric
        return symmetric == "always" or (symmetric == "8-bit" and bits == 8)

    def changed(self, choices: Mapping[str, Any]) -> Self:
        """As the base says; ``calibration_steps`` follow fewer ``num_inference_steps`` unless they are named too."""
        choices = self.named(choices)
        if "num_inference_steps" in choices and "calibration_steps" not in choices:
            steps = described(Config)["num_inference_steps"].checked(choices["num_inference_steps"])
            choices["calibration_steps"] = min(self.calibration.calibration_steps, steps)
        return super().changed(choices)


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
    "activation_epochs": 0,
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


def preset(name: str = "default", **choices: Any) -> Config:
    """The configuration of preset ``name`` with some choices replaced; raises :class:`ConfigError`."""
    if name not in list(PRESETS):  # a file may name it by a list, which has no hash
        raise ConfigError(f"The preset must be one of {', '.join(PRESETS)}. Got {name!r} instead.")
    return Config().changed({"preset": name, **PRESETS[name]}).changed(choices)


MOST_BYTES = 1 << 20  # of a file of choices


def read_config_file(path: Path) -> dict[str, Any]:
    """Choices of a TOML (or ``.json``) file; raises :class:`ConfigError` where it cannot be read."""
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"The config file {path} cannot be read ({reason(error)}); give a TOML or JSON file."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"The config file {path} must hold a table of choices.")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON, whose names are there once, as TOML demands it."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return table
