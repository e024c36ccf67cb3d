from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_tdq.errors import SchemeError, UsageError
from ptq_tdq.scheme import QType, Scheme

BITS = st.integers(2, 8)


@pytest.mark.parametrize(
    ("qtype", "qmin", "qmax"),
    [
        # ranges of the ONNX types uint8, int8, uint4, int4, uint2, int2
        (QType(8), 0, 255),
        (QType(8, signed=True), -128, 127),
        (QType(4), 0, 15),
        (QType(4, signed=True), -8, 7),
        (QType(2), 0, 3),
        (QType(2, signed=True), -2, 1),
    ],
)
def test_the_code_ranges_are_those_of_the_onnx_types(qtype: QType, qmin: int, qmax: int) -> None:
    assert (qtype.qmin, qtype.qmax) == (qmin, qmax)


@given(BITS, st.booleans())
def test_n_bits_hold_two_to_the_n_codes_and_zero_is_one_of_them(bits: int, signed: bool) -> None:
    qtype = QType(bits, signed)
    assert qtype.qmax - qtype.qmin + 1 == 2**bits
    assert qtype.qmin <= 0 <= qtype.qmax


@given(BITS, BITS)
def test_parsing_and_printing_are_inverse(weight_bits: int, activation_bits: int) -> None:
    scheme = Scheme(weight_bits, activation_bits)
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(f" {str(scheme).lower()}\n") == scheme


def test_the_field_writes_w4a8_for_four_bit_weights_and_eight_bit_activations() -> None:
    assert Scheme.parse("W4A8") == Scheme(weight_bits=4, activation_bits=8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4A8",
        "W4",
        "A8W4",
        "W4A8 W4A6",
        "W4A-8",
        "W4.0A8",
        "W1A8",
        "W4A9",
        "W44A8",
        "int8",
        "W04A8",
        "W٤A٨",
        "\N{FULLWIDTH LATIN CAPITAL LETTER W}4A8",
        "W4A8\0",
    ],
)
def test_anything_else_is_refused_with_the_text_and_an_example(text: str) -> None:
    with pytest.raises(SchemeError, match="for example W4A8") as caught:
        Scheme.parse(text)
    assert repr(text) in str(caught.value)
    assert isinstance(caught.value, UsageError), "the command line exits with 2"


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_other_bit_widths_are_refused(bits: int) -> None:
    with pytest.raises(SchemeError, match=f"between 2 and 8. Got {bits}"):
        QType(bits)
