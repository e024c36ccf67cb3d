"""The quantized attention product against diffusers' own processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.modules import ActivationQuantizer, QuantAttnProcessor
from ptq_tdq.observe import Observer
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.timeaxis import Clock

SELF: dict[str, Any] = {"query_dim": 16, "heads": 2, "dim_head": 8}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokens": (SELF, {}),
    "residual-image": ({**SELF, "norm_num_groups": 4, "residual_connection": True, "bias": True}, {"image": True}),
    "rescaled-image": ({**SELF, "residual_connection": True, "rescale_output_factor": 1.7}, {"image": True}),
    "query-key-norm": ({**SELF, "qk_norm": "layer_norm"}, {}),
    "cross": ({**SELF, "cross_attention_dim": 12}, {"context": 5}),
    "cross-mask": ({**SELF, "cross_attention_dim": 12}, {"context": 5, "mask": True}),
    "cross-norm": ({**SELF, "cross_attention_dim": 12, "cross_attention_norm": "layer_norm"}, {"context": 5}),
    "wide-values": ({**SELF, "out_dim": 24}, {}),
}


def build(case: str) -> tuple[Attention, dict[str, Any]]:
    torch.manual_seed(0)
    options, uses = CASES[case]
    attention = Attention(**options).eval().requires_grad_(False)
    x = torch.randn(3, 16, 4, 2) if uses.get("image") else torch.randn(3, 8, 16)
    inputs: dict[str, Any] = {"hidden_states": x}
    if "context" in uses:
        inputs["encoder_hidden_states"] = torch.randn(3, uses["context"], 12)
    if "mask" in uses:
        mask = torch.zeros(3, 1, 5)
        mask[0, 0, 3:], mask[2, 0, 0] = -1e4, -1e4
        inputs["attention_mask"] = mask
    return attention, inputs


def quantize(attention: Attention, *, t: Tensor) -> list[ActivationQuantizer]:
    clock = Clock()
    clock.set(t)
    records = tuple(QuantizerRecord(f"a.{o}", 8, "dynamic", "mse", o == "softmax") for o in ("q", "k", "v", "softmax"))
    processor: Any = QuantAttnProcessor(
        attention.processor, LayerRecord("a", "attention", "a", (), None, records), clock
    )
    attention.set_processor(processor)
    return [q for q in processor.inputs if isinstance(q, ActivationQuantizer)]


@pytest.mark.parametrize("case", CASES)
def test_off_it_is_the_original_processor_bit_for_bit(case: str) -> None:
    attention, inputs = build(case)
    expected = attention(**inputs)
    quantize(attention, t=torch.tensor(0))
    assert torch.equal(attention(**inputs), expected)


@pytest.mark.parametrize("case", CASES)
def test_its_own_product_is_that_of_the_original(case: str) -> None:
    """On without an interval source, the quantizers pass their input through."""
    attention, inputs = build(case)
    expected = attention(**inputs)
    for quantizer in quantize(attention, t=torch.tensor(0)):
        quantizer.enabled = True
    torch.testing.assert_close(attention(**inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_8_bits_it_is_close_to_the_original(case: str) -> None:
    attention, inputs = build(case)
    expected = attention(**inputs)
    for quantizer in quantize(attention, t=torch.tensor(0)):
        zero = torch.tensor(0 if quantizer.record.from_zero else 128)
        quantizer.source, quantizer.enabled = Dynamic(zero, quantizer.qtype), True
    found = attention(**inputs)
    assert 30 < sqnr_db(expected, found) < 90, "close, and yet quantized"


def test_the_operands_are_queries_keys_values_and_probabilities() -> None:
    attention, inputs = build("cross-mask")
    t = torch.tensor([5.0, 5.0, 9.0])
    quantizers = quantize(attention, t=t)
    seen: dict[str, Tensor] = {}
    for quantizer in quantizers:
        quantizer.observer = Observer(quantizer.record.name, t.unique())
        quantizer.register_forward_hook(lambda m, args, out: seen.__setitem__(m.record.name, args[0]))
    attention(**inputs)

    def heads(x: Tensor) -> Tensor:
        return x.view(3, -1, 2, 8).transpose(1, 2)

    x, context = inputs["hidden_states"], inputs["encoder_hidden_states"]
    q, k, v = heads(attention.to_q(x)), heads(attention.to_k(context)), heads(attention.to_v(context))
    scores = q @ k.mT / 8**0.5 + inputs["attention_mask"][:, None]
    for name, expected in (("a.q", q), ("a.k", k), ("a.v", v), ("a.softmax", scores.softmax(-1))):
        torch.testing.assert_close(seen[name], expected)
    assert quantizers[3].observer is not None
    assert quantizers[3].observer.hi.max() <= 1 and quantizers[3].observer.lo.min() >= 0
