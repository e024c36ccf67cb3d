from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_tdq.records import LayerRecord, QuantizerRecord, choice_text

QUANTIZERS = st.builds(
    QuantizerRecord,
    name=st.text(),
    bits=st.integers(2, 8),
    method=st.sampled_from(["static", "tdq", "tdq-thin", "dynamic"]),
    range_method=st.sampled_from(["mse", "minmax"]),
    from_zero=st.booleans(),
)
LAYERS = st.builds(
    LayerRecord,
    name=st.text(),
    kind=st.sampled_from(["conv1d", "conv_transpose2d", "linear", "product"]),
    unit=st.text(),
    splits=st.lists(st.integers(0, 4096), max_size=3).map(tuple),
    weight_bits=st.none() | st.integers(2, 8),
    inputs=st.lists(QUANTIZERS, max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@given(LAYERS)
def test_a_record_survives_a_trip_through_json(record: LayerRecord) -> None:
    assert LayerRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@given(LAYERS)
def test_records_are_hashable_values(record: LayerRecord) -> None:
    assert len({record, LayerRecord.from_dict(record.to_dict())}) == 1
    with pytest.raises(FrozenInstanceError):
        record.name = "another"  # type: ignore[misc]


def test_a_split_shortcut_has_two_channel_ranges() -> None:
    assert LayerRecord.from_dict(split_shortcut()).ranges == ((0, 128), (128, 192))


def split_shortcut() -> dict[str, object]:
    inputs = tuple(QuantizerRecord(f"up.0.shortcut.{i}", 8, "tdq", "mse") for i in range(2))
    return LayerRecord("up.0.shortcut", "conv2d", "up.0", (0, 128, 192), 4, inputs).to_dict()


@pytest.mark.parametrize("missing", ["name", "kind", "unit", "splits", "weight_bits", "inputs"])
def test_a_record_without_a_field_is_refused(missing: str) -> None:
    data = split_shortcut()
    del data[missing]
    with pytest.raises((TypeError, KeyError)):
        LayerRecord.from_dict(data)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError):
        LayerRecord.from_dict({**split_shortcut(), "colour": "red"})
    with pytest.raises(TypeError):
        LayerRecord.from_dict({**split_shortcut(), "inputs": [{"name": "q", "colour": "red"}]})


def test_what_auto_chose_is_one_sentence() -> None:
    def quantizer(name: str, method: str, gain: float | None) -> QuantizerRecord:
        return QuantizerRecord(name, 8, method, "mse", gain_db=gain)

    assert choice_text([quantizer("a", "tdq", None)]) is None
    still = [quantizer("a", "static", 0.01), quantizer("b", "static", -0.2)]
    assert choice_text(still) == "None of 2 activations follows t: on held-out samples that is worth nothing."
    follow = [quantizer(f"f{i}", "tdq-thin", i / 10) for i in range(1, 6)]
    text = choice_text([*still, *follow, quantizer("x", "fixed", None)])
    assert text is not None
    assert text.startswith("5 of 7 activations follow t") and "f5 (0.50 dB), f4 (0.40 dB), f3 (0.30 dB) and 2" in text
