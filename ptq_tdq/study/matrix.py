"""The cells of a study: every preset, scheme, method and seed, each with all its choices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq_tdq.choices import pair
from ptq_tdq.config import PRESETS, Config, preset
from ptq_tdq.errors import ConfigError
from ptq_tdq.evaluate.ptqd import CorrectionName, read_correction
from ptq_tdq.intervals import source_class
from ptq_tdq.load import Backend

FULL_PRECISION = "fp"
"""The method of a cell that only samples with full precision."""

BASELINE_METHOD = "static"
"""S_1 = Q-Diffusion, to which every method is compared unless something else is named."""

METHODS = ("tdq", "tdq-thin", BASELINE_METHOD, "S_2", "S_4", "S_10", "S_20", "step-table", "step-lsq", "dynamic")
"""The columns of a table, in the order of supp Table 4."""


@dataclass(frozen=True)
class Cell:
    """One entry: its place in the table and the choices behind it. ``samples`` are those of the evaluation.

    ``method`` is a column's label: a method, or a method with changed choices ("tdq-thin:module_start=static"; lists
    with "/": "tdq-thin:eight_bit_layers=first/last"). A ``correction`` is named there as a choice is
    ("tdq:correction=ptqd").
    """

    preset: str
    scheme: str
    method: str
    config: Config
    samples: int
    backend: Backend = "simulated"
    correction: CorrectionName = "none"

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Its place."""
        return self.preset, self.scheme, self.method, self.seed

    @property
    def runs_on(self) -> Backend:
        """The backend that its samples come from: without tables, the simulated one."""
        return self.backend if source_class(self.config.method).timed else "simulated"

    @property
    def choices(self) -> dict[str, Any]:
        """All that its quantized model depends on, by name."""
        return {**self.config.to_dict(), "backend": self.runs_on, "correction": self.correction}

    @property
    def evaluation(self) -> dict[str, int]:
        """What the full-precision side depends on."""
        return {
            "samples": self.samples,
            "num_inference_steps": self.config.calibration.num_inference_steps,
            "seed": self.seed,
        }

    @property
    def resources(self) -> frozenset[str]:
        """What it shares with other cells; the first cell that needs one makes it, the others wait for that."""
        baseline = f"baseline {json.dumps(self.evaluation)}"
        if self.method == FULL_PRECISION:
            return frozenset((baseline,))
        weights = f"weights {json.dumps(self.config.weight_choices)}"
        return frozenset((baseline, weights, f"calibration {json.dumps(self.config.recipe)}"))

    def same(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of a results file was measured with these choices."""
        if line["evaluation"] != self.evaluation:
            return False
        return self.method == FULL_PRECISION or bool(self.choices == line["choices"])


def make_cells(
    presets: Sequence[str],
    schemes: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[str],
    samples: int,
    backend: Backend,
) -> list[Cell]:
    """All cells, full precision first, seed by seed: a study that is stopped early has whole seeds.

    ``settings`` are choices for all cells ("KEY=VALUE") or for those of one preset ("PRESET:KEY=VALUE").
    Raises :class:`ConfigError` for an unknown preset, method or choice, before anything runs.
    """
    _check_settings(settings)
    cells: dict[tuple[str, str, str, int], Cell] = {}
    fulls: dict[str, Cell] = {}
    for seed in seeds:
        for name in presets:
            for scheme in schemes:
                for method in methods:
                    cell = _cell(name, scheme, method, seed, settings, samples, backend)
                    cells.setdefault(cell.key, cell)
                    full = Cell("", "", FULL_PRECISION, cell.config, samples)
                    fulls.setdefault(json.dumps(full.evaluation), full)
    if not cells:
        raise ConfigError("The study has no cells; name at least one preset, scheme, method and seed.")
    return [*fulls.values(), *cells.values()]


def label(method: str) -> str:
    """The column of a method: S_1 is ``static``."""
    name, colon, change = method.partition(":")
    return f"{BASELINE_METHOD if name == 'S_1' else name}{colon}{change}"


def _cell(
    name: str, scheme: str, method: str, seed: int, settings: Sequence[str], samples: int, backend: Backend
) -> Cell:
    column = label(method)
    base, _, change = column.partition(":")
    pairs = (_pair(text, "a method's change") for text in change.split("+") if text)
    changes = {key: value.replace("/", ",") for key, value in pairs}  # commas part the methods
    correction = read_correction(changes.pop("correction", "none"))
    config = preset(name, **{**_of_preset(settings, name), **changes, "scheme": scheme, "method": base, "seed": seed})
    return Cell(name, str(config.parsed_scheme), column, config, samples, backend, correction)


def _of_preset(settings: Sequence[str], name: str) -> dict[str, str]:
    """The settings of a preset, those for all presets first."""
    found: dict[str, str] = {}
    for scoped in (False, True):
        for text in settings:
            scope, rest = _scope(text)
            if bool(scope) == scoped and scope in ("", name):
                key, value = _pair(rest, "--set")
                found[key] = value
    return found


def _scope(text: str) -> tuple[str, str]:
    scope, colon, rest = text.partition(":")
    return (scope, rest) if colon and "=" not in scope else ("", text)


def _pair(text: str, where: str) -> tuple[str, str]:
    key, value = pair(text, where)
    if key in ("preset", "scheme", "method", "seed"):
        raise ConfigError(f"{where} cannot change {key}, which is a dimension of the study; name it by --{key}s.")
    return key, value


def _check_settings(settings: Iterable[str]) -> None:
    for text in settings:
        scope, rest = _scope(text)
        if scope and scope not in PRESETS:
            raise ConfigError(f"--set {text} names the preset {scope!r}; the presets are {', '.join(PRESETS)}.")
        _pair(rest, "--set")
