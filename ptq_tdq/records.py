"""What is quantized and how, as plain data: one record per layer, one per activation quantizer.

The records are made once, from a traced model (``plan.py``), drive the wrapping (``wrap.py``) and are stored in the
artifact, so that a saved model is rebuilt without tracing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

NAMED = 3  # names in a sentence; the others are counted


@dataclass(frozen=True)
class QuantizerRecord:
    """One activation quantizer; ``name`` is the key of its interval table.

    Names: ``<layer>`` for the input of a layer, ``<layer>.0`` and ``<layer>.1`` for the two channel ranges of a split
    shortcut, ``<product>.q``, ``.k``, ``.v`` and ``.softmax`` for the operands of an attention product.
    """

    name: str
    bits: int
    method: str  # interval source, e.g. "tdq-thin"
    range_method: str  # "mse", "mse-ends", "minmax" or "ema": how its first interval is found
    from_zero: bool = False  # codes start at the value 0 (softmax output)
    gain_db: float | None = None  # what the method takes off the loss of S_1 on held-out samples, where "auto" chose


def choice_text(quantizers: Iterable[QuantizerRecord]) -> str | None:
    """Which quantizers follow t, and what that is worth, where "auto" chose; else None."""
    chosen = [q for q in quantizers if q.gain_db is not None]
    follow = sorted((q for q in chosen if "tdq" in q.method), key=lambda q: q.gain_db or 0.0, reverse=True)
    tokens = sum("token" in q.method for q in chosen)
    others = f"; {tokens} have intervals of tokens" if tokens else ""
    if not chosen:
        return None
    if not follow:
        return f"None of {len(chosen)} activations follows t: on held-out samples that is worth nothing{others}."
    names = ", ".join(f"{q.name} ({q.gain_db:.2f} dB)" for q in follow[:NAMED])
    more = f" and {len(follow) - NAMED} more" if len(follow) > NAMED else ""
    return (
        f"{len(follow)} of {len(chosen)} activations follow t, where that takes most off the loss of their block on "
        f"held-out samples: {names}{more}{others}. The others keep one interval."
    )


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer in execution order.

    ``kind`` is "conv1d", "conv_transpose2d", "linear" and the like, or "product" (of attention: `<module>.products.<i>`
    is the i-th in the forward pass of that module). ``splits`` are the channel boundaries of its input, (0, C) for an
    ordinary layer, (0, C_h, C) for a split shortcut, () for a product. ``weight_bits`` is None for a product;
    ``inputs`` is () for a layer of which only the weight is quantized. ``dtype`` is that of the original weight.
    The input channels of a ``rotated`` layer are mixed before they are quantized (:mod:`ptq_tdq.rotate`).
    """

    name: str
    kind: str
    unit: str  # the reconstruction unit that it is learned in
    splits: tuple[int, ...]
    weight_bits: int | None
    inputs: tuple[QuantizerRecord, ...]
    dtype: str = "float32"
    rotated: bool = False

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The channel ranges of its input: the first channel of each, and the one behind its last."""
        return tuple(pairwise(self.splits))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerRecord:
        """Inverse of :meth:`to_dict`, also after a trip through JSON; raises TypeError or KeyError for other shapes."""
        inputs = tuple(QuantizerRecord(**q) for q in data["inputs"])
        return cls(**{**data, "splits": tuple(data["splits"]), "inputs": inputs})
