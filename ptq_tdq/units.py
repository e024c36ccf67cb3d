"""Which modules are reconstructed as one, from the model's own structure."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

MIN_LAYERS = 2  # a unit holds at least so many layers; a layer in no unit is one by itself


def find_units(model: nn.Module, layers: Iterable[str], products: Iterable[str] = ()) -> dict[str, str]:
    """The unit of each layer (and of each module that computes attention products), by name.

    Units are instances of the classes that the model declares as repeated or not to be split (``_repeated_blocks`` and
    ``_no_split_modules`` of diffusers); where these cover nothing, elements of a ModuleList; and modules that compute
    attention products. Each holds at least two layers, and of two units, one in the other, the inner one counts.
    """
    layers = list(layers)
    declared = {*_declared(model, "_repeated_blocks"), *_declared(model, "_no_split_modules")}
    owners = set(products)
    candidates = [
        [name for name, module in model.named_modules() if type(module).__name__ in declared],
        [f"{name}.{i}" for name, m in model.named_modules() if isinstance(m, nn.ModuleList) for i in range(len(m))],
        [name for name, _ in model.named_modules() if name in owners],
    ]
    units: list[str] = []
    for names in candidates:
        large = [n for n in names if n and sum(_inside(layer, n) for layer in layers) >= MIN_LAYERS]
        inner = [n for n in large if not any(other != n and _inside(other, n) for other in large)]
        units += [n for n in inner if not any(_inside(n, unit) or _inside(unit, n) for unit in units)]
    return {name: next((u for u in units if _inside(name, u)), name) for name in (*layers, *owners)}


def _declared(model: nn.Module, attribute: str) -> Iterable[str]:
    return getattr(model, attribute, None) or ()


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
