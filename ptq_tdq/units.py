"""Which modules are reconstructed as one, from the model's own structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator

from torch import nn

MIN_LAYERS = 2  # a unit holds at least so many layers; a layer in no unit is one by itself


def find_units(
    model: nn.Module, layers: Iterable[str], called: Container[str], products: Iterable[str] = ()
) -> dict[str, str]:
    """The unit of each layer (and of each module that computes attention products), by name.

    Units are instances of the classes that the model declares as repeated or not to be split (``_repeated_blocks`` and
    ``_no_split_modules`` of diffusers); where these cover nothing, elements of a ModuleList; and modules that compute
    attention products. Each is ``called`` as a module and holds at least two layers, and of two units, one in the
    other, the inner one counts.
    A product belongs to no unit where its module, which listens while it runs, holds units of its own.
    """
    layers, owners = list(layers), {name for name in products if name}
    inside = Counter(module for layer in layers for module in _around(layer))
    units: set[str] = set()
    for names in _candidates(model, owners):
        large = [name for name in names if inside[name] >= MIN_LAYERS and name in called]
        outer = {module for name in (*large, *units) for module in _around(name)}
        units |= {name for name in large if name not in outer and units.isdisjoint(_around(name))}
    found = {name: next((m for m in (name, *_around(name)) if m in units), name) for name in (*layers, *owners)}
    interrupted = {module for layer in layers for module in _around(found[layer])}
    return {name: unit for name, unit in found.items() if name not in owners & interrupted}


def _candidates(model: nn.Module, owners: set[str]) -> Iterator[Iterable[str]]:
    """Names of modules that may be units, the better reason first."""
    modules = dict(model.named_modules())
    declared = {n for key in ("_repeated_blocks", "_no_split_modules") for n in getattr(model, key, None) or ()}
    yield [name for name, module in modules.items() if type(module).__name__ in declared]
    yield [f"{name}.{i}" for name, m in modules.items() if isinstance(m, nn.ModuleList) for i in range(len(m))]
    yield [name for name in modules if name in owners]


def _around(name: str) -> list[str]:
    """The modules that hold the module ``name``, but for the model itself."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
