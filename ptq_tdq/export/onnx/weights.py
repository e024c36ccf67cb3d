"""Integer weights as initializers: 4-bit codes as UINT4, two to a byte, wider ones as 8-bit integers.

An artifact's weight is ``s_o (q - z_o)`` with unsigned codes q. Integer kernels want signed 8-bit weights without a
zero point. ``q - z_o`` is one when it fits into -128..127: always below 8 bits, and at 8 bits for symmetric weights.
Otherwise (affine 8-bit weights) the codes are ``q - 128``, and ``rest_o = z_o - 128`` is taken off after the sum with
the help of one more output channel, whose weights are all 1:

    sum (x - z) (q - z_o)  =  sum (x - z) (q - 128)  -  rest_o sum (x - z)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from ml_dtypes import uint4
from numpy.typing import NDArray

from ptq_tdq.artifacts import Artifact
from ptq_tdq.export.onnx.nodes import Builder
from ptq_tdq.records import LayerRecord

PACKED_BITS = 4  # ONNX 21 has no narrower integers


def along_rows(values: NDArray[Any], rank: int) -> NDArray[Any]:
    """One value per output channel [O] in the shape [O, 1, ...] of ``rank`` axes."""
    return values.reshape((-1,) + (1,) * (rank - 1))


def along_channels(values: NDArray[Any], rank: int, linear: bool) -> NDArray[Any]:
    """One value per output channel [O] in a shape that fits a layer's output of ``rank`` axes."""
    return values if linear else along_rows(values, rank - 1)


@dataclass(frozen=True)
class RangeWeight:
    """The weight of one channel range: codes uint8 [O, C, ...], scale float32 [O], zero_point int32 [O], all dense."""

    name: str
    bits: int
    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    @property
    def centred(self) -> NDArray[np.int32]:
        """``q - z_o``."""
        difference: NDArray[np.int32] = self.codes.astype(np.int32) - along_rows(self.zero_point, self.codes.ndim)
        return difference

    @property
    def rest(self) -> NDArray[np.int32] | None:
        """``z_o - 128`` [O] where ``q - z_o`` does not fit into 8 bits, else None."""
        centred = self.centred
        return None if centred.min() >= -128 and centred.max() <= 127 else self.zero_point - 128

    @property
    def signed(self) -> NDArray[np.int8]:
        """The codes that are multiplied: ``q - z_o``, or ``q - 128`` with a last output channel of ones."""
        if self.rest is None:
            return self.centred.astype(np.int8)
        codes = self.codes.astype(np.int32) - 128
        return np.concatenate([codes, np.ones_like(codes[:1])]).astype(np.int8)

    @property
    def signed_scale(self) -> NDArray[np.float32]:
        """The scale of each channel of :attr:`signed`."""
        return self.scale if self.rest is None else np.append(self.scale, np.float32(1))

    @property
    def real(self) -> NDArray[np.float32]:
        """``s_o (q - z_o)``."""
        weight: NDArray[np.float32] = self.centred.astype(np.float32) * along_rows(self.scale, self.codes.ndim)
        return weight


def range_weights(artifact: Artifact, record: LayerRecord) -> list[RangeWeight]:
    """The weight of each channel range of a layer."""
    name, outputs = record.name, len(artifact.weight_codes[record.name])
    return [
        RangeWeight(
            f"{name}.weight" if len(record.ranges) == 1 else f"{name}.{i}.weight",
            record.weight_bits or 0,
            artifact.weight_codes[name][:, low:high].numpy(),
            artifact.weight_scale[name][:, i].expand(outputs).numpy(),
            artifact.weight_zero_point[name][:, i].expand(outputs).numpy(),
        )
        for i, (low, high) in enumerate(record.ranges)
    ]


def as_columns(values: NDArray[Any]) -> NDArray[Any]:
    """[O, C, ...] as the right side of a product: [... C, O], the places of the kernel first."""
    return np.moveaxis(values, 1, -1).reshape(len(values), -1).T


def store_codes(b: Builder, weight: RangeWeight, columns: bool = False) -> ir.Value:
    """The artifact's own codes: UINT4 up to 4 bits, else UINT8; ``columns``: see :func:`as_columns`."""
    codes = as_columns(weight.codes) if columns else weight.codes
    return b.initializer(weight.name, codes.astype(uint4 if weight.bits <= PACKED_BITS else np.uint8))


def store_signed(b: Builder, weight: RangeWeight, offset: int, columns: bool = False) -> ir.Value:
    """:attr:`RangeWeight.signed` + ``offset``: INT8 for offset 0, UINT8 for 128; ``columns``: see :func:`as_columns`.

    4-bit codes stay packed in the file; runtimes fold the nodes that widen them when they load it.
    """
    target, kind = (ir.DataType.UINT8, np.uint8) if offset else (ir.DataType.INT8, np.int8)
    if weight.bits > PACKED_BITS:
        values = weight.signed.astype(np.int16) + offset
        return b.initializer(weight.name, (as_columns(values) if columns else values).astype(kind))
    codes = b("Cast", store_codes(b, weight, columns), to=ir.DataType.INT32)
    zero_point = weight.zero_point - np.int32(offset)
    if not columns:
        zero_point = along_rows(zero_point, weight.codes.ndim)
    return b("Cast", b("Sub", codes, zero_point), to=target)
