from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq_tdq.artifacts import pack, unpack
from ptq_tdq.errors import ArtifactCorruptError, SchemeError, UsageError


def test_low_bits_come_first() -> None:
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8), 2).tolist() == [0b10_01_00_11, 0b01]


@pytest.mark.parametrize("bits", [3, 5, 6, 7, 8])
def test_other_widths_take_one_byte_each(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.int64).to(torch.uint8)
    assert torch.equal(pack(codes, bits), codes)


def test_4_bit_codes_are_packed_as_onnx_packs_them() -> None:
    onnx = pytest.importorskip("onnx")
    codes = torch.randint(0, 16, (3, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.UINT4, codes.shape, codes.numpy().astype(np.int32).ravel())
    assert bytes(pack(codes, 4).tolist()) == _onnx_bytes(proto)


def _onnx_bytes(proto: object) -> bytes:
    raw: bytes = proto.raw_data  # type: ignore[attr-defined]
    return raw or bytes(proto.int32_data)  # type: ignore[attr-defined]


def test_a_view_is_packed_in_row_major_order() -> None:
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert pack(codes.T, 4).tolist() == [0x31, 0x42]


def test_empty() -> None:
    empty = torch.empty(0, 3, dtype=torch.uint8)
    assert unpack(pack(empty, 4), 4, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("codes", [torch.tensor([4], dtype=torch.uint8), torch.tensor([1]), torch.tensor([1.0])])
def test_codes_that_do_not_fit_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="uint8 from 0 to 3 for 2 bits"):
        pack(codes, 2)


def test_unknown_widths_are_refused() -> None:
    with pytest.raises(SchemeError):
        pack(torch.zeros(1, dtype=torch.uint8), 9)


def test_a_wrong_length_is_corrupt() -> None:
    with pytest.raises(ArtifactCorruptError, match="5 codes of 4 bits need 3 packed bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, (5,))
