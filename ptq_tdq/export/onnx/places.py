"""Which samples of a call run together in a graph of a fixed number of samples, each with the values that it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from numpy.typing import NDArray

from ptq_tdq.errors import ModelError
from ptq_tdq.export.onnx.signature import Leaf


def places_of(held: Sequence[Leaf], given: dict[str, Any], count: int) -> list[int]:
    """The place in the graph for each of ``count`` samples.

    Raises :class:`ModelError` for values that the graph does not hold.
    """
    if not held:
        return [0] * count
    known = list(zip(*(leaf.held for leaf in held), strict=True))
    try:
        wanted = list(zip(*(leaf.hashes(given[leaf.name], count) for leaf in held), strict=True))
        return [known.index(values) for values in wanted]
    except (ValueError, IndexError):
        names = ", ".join(leaf.name for leaf in held)
        raise ModelError(
            f"The graph holds the values of {names}, which the model's code reads (a mask tells how long a prompt is, "
            "say). Got others; export it with such calls."
        ) from None


def alike(rows: NDArray[Any]) -> list[list[int]]:
    """The numbers of rows [n, ...] in groups of equal ones."""
    groups: dict[bytes, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.tobytes(), []).append(number)
    return list(groups.values())


def rounds(places: Sequence[int], size: int, samples: Sequence[int]) -> Iterator[list[int]]:
    """Samples for each run of a graph with ``size`` places: each in its own place, others repeated in empty ones."""
    waiting = ([sample for sample in samples if places[sample] == place] for place in range(size))
    for chosen in zip_longest(*waiting):
        first = next(sample for sample in chosen if sample is not None)
        yield [first if sample is None else sample for sample in chosen]
