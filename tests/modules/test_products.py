"""Quantized attention products against torch's own function and diffusers' processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.errors import ModelError
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.intervals import IntervalSource, Observed, source_class
from ptq_tdq.intervals.dynamic import Dynamic
from ptq_tdq.modules import ActivationQuantizer, QuantProduct, products
from ptq_tdq.modules.products import OPERANDS, attach, owner_of, products_of
from ptq_tdq.observe import Observer
from ptq_tdq.records import LayerRecord, QuantizerRecord
from ptq_tdq.scheme import QType
from ptq_tdq.timeaxis import at

SELF: dict[str, Any] = {"query_dim": 16, "heads": 2, "dim_head": 8}
JOINT = {**SELF, "added_kv_proj_dim": 16, "context_pre_only": False, "processor": JointAttnProcessor2_0()}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokens": (SELF, {}),
    "residual-image": ({**SELF, "norm_num_groups": 4, "residual_connection": True, "bias": True}, {"image": True}),
    "query-key-norm": ({**SELF, "qk_norm": "layer_norm"}, {}),
    "cross": ({**SELF, "cross_attention_dim": 12}, {"context": 5}),
    "cross-mask": ({**SELF, "cross_attention_dim": 12}, {"context": 5, "mask": True}),
    "wide-values": ({**SELF, "out_dim": 24}, {}),
    "joint": (JOINT, {"joint": True}),
}


def build(case: str) -> tuple[Attention, dict[str, Any]]:
    torch.manual_seed(0)
    options, uses = CASES[case]
    attention = Attention(**options).eval().requires_grad_(False)
    if "processor" not in options:
        attention.set_processor(AttnProcessor2_0())
    x = torch.randn(3, 16, 4, 2) if uses.get("image") else torch.randn(3, 8, 16)
    inputs: dict[str, Any] = {"hidden_states": x}
    if "context" in uses:
        inputs["encoder_hidden_states"] = torch.randn(3, uses["context"], 12)
    if "joint" in uses:
        inputs["encoder_hidden_states"] = torch.randn(3, 4, 16)
    if "mask" in uses:
        mask = torch.zeros(3, 1, 5)
        mask[0, 0, 3:], mask[2, 0, 0] = -1e4, -1e4
        inputs["attention_mask"] = mask
    return attention, inputs


def record(name: str, bits: int = 8) -> LayerRecord:
    inputs = tuple(QuantizerRecord(f"{name}.{o}", bits, "dynamic", "mse", o == "softmax") for o in OPERANDS)
    return LayerRecord(name, "product", "a", (), None, inputs)


def quantizers_of(owner: nn.Module) -> list[ActivationQuantizer]:
    return [q for product in products_of(owner) for q in product.activation_quantizers()]


def quantize(owner: nn.Module, count: int = 1) -> list[ActivationQuantizer]:
    for index in range(count):
        attach(owner, QuantProduct(record(f"a.products.{index}")))
    return quantizers_of(owner)


def switch_on(quantizers: list[ActivationQuantizer]) -> None:
    for quantizer in quantizers:
        zero = torch.tensor(0 if quantizer.record.from_zero else 1 << (quantizer.record.bits - 1))
        quantizer.source, quantizer.enabled = Dynamic(zero, quantizer.qtype), True


def flat(output: Any) -> Tensor:
    return torch.cat([x.flatten() for x in output]) if isinstance(output, tuple) else output


@pytest.mark.parametrize("case", CASES)
def test_off_it_is_the_original_bit_for_bit(case: str) -> None:
    attention, inputs = build(case)
    expected = flat(attention(**inputs))
    quantize(attention)
    assert torch.equal(flat(attention(**inputs)), expected)


@pytest.mark.parametrize("case", CASES)
def test_its_own_product_is_torchs(case: str) -> None:
    """On without an interval source, the quantizers pass their input through."""
    attention, inputs = build(case)
    expected = flat(attention(**inputs))
    for quantizer in quantize(attention):
        quantizer.enabled = True
    with at(torch.tensor([0.0])):
        torch.testing.assert_close(flat(attention(**inputs)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_8_bits_it_is_close_to_the_original(case: str) -> None:
    attention, inputs = build(case)
    expected = flat(attention(**inputs))
    switch_on(quantize(attention))
    with at(torch.tensor([0.0])):
        assert 30 < sqnr_db(expected, flat(attention(**inputs))) < 90, "close, and yet quantized"


BLOCKED = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [False, True, True]])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask, one row of which sees nothing": {"attn_mask": BLOCKED},
    "additive mask": {"attn_mask": torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(1))},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_every_argument_means_what_it_means_to_torch(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arguments = ARGUMENTS[case]
    heads = 2 if "grouped" in case else 4
    q, k, v = torch.randn(2, 4, 4, 8), torch.randn(2, heads, 3, 8), torch.randn(2, heads, 3, 6)
    if case == "causal":
        k, v = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 6)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if case == "additive mask":
        arguments = {"attn_mask": arguments["attn_mask"].to(dtype)}
    product = QuantProduct(record("a.products.0"))
    for quantizer in product.activation_quantizers():
        quantizer.enabled = True
    expected = functional.scaled_dot_product_attention(q, k, v, **arguments)
    with at(torch.tensor([0.0])):
        found = product(q, k, v, **arguments)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, expected, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=2e-2 if dtype != torch.float32 else 1e-5
    )


@pytest.mark.parametrize("method", ["dynamic-token", "tdq", "static"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_blocks_of_rows_give_what_all_rows_give(case: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and gradients whose sums are in another order."""
    torch.manual_seed(0)
    arguments, heads = ARGUMENTS[case], 2 if case == "grouped" else 4
    q, k, v = (torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, 4), (heads, 3), (heads, 3)))
    product, t, seen = QuantProduct(record("a.products.0")), torch.tensor([3.0, 700.0]), []
    for quantizer, x in zip(product.activation_quantizers(), (q, k, v, torch.rand(2, 4, 4, 3)), strict=True):
        quantizer.source, quantizer.enabled = source(method, x), True
    learned = [q, k, v, *product.parameters()]
    for block in (products.BLOCK, 24, 7):  # all; a sample and a half; some rows of one
        monkeypatch.setattr(products, "BLOCK", block)
        torch.manual_seed(1)  # of the units that a network drops
        with at(t):
            out = product(q, k, v, **arguments)
        seen.append((out, torch.autograd.grad(out.square().sum(), learned)))
    for out, gradients in seen[1:]:
        assert torch.equal(out, seen[0][0])
        for found, expected in zip(gradients, seen[0][1], strict=True):
            torch.testing.assert_close(found, expected)


def source(method: str, x: Tensor) -> IntervalSource:
    """At its start, for what the values of x are at two steps."""
    observer = Observer("x", torch.tensor([3.0, 700.0]))
    for counting in (False, True):
        if counting:
            observer.start_counting()
        observer.see(x, torch.tensor([3.0, 700.0]))
    return source_class(method).build(method, Observed(1000, observer.steps, observer.histogram(), QType(8)))


@pytest.mark.parametrize("shape", [(2, 4, 3, 8), (2, 3, 4, 8)])
def test_its_output_lies_in_memory_as_torchs_does(shape: tuple[int, ...]) -> None:
    """Code behind it views it without a copy (SD3's image prompt)."""
    q = torch.randn(shape) if shape[1] == 4 else torch.randn(shape).transpose(1, 2)
    product = QuantProduct(record("a.products.0"))
    for quantizer in product.activation_quantizers():
        quantizer.enabled = True
    with at(torch.tensor([0.0])):
        assert product(q, q, q).stride() == functional.scaled_dot_product_attention(q, q, q).stride()


def test_scores_beyond_half_precision_are_no_infinities() -> None:
    q = torch.full((1, 1, 2, 64), 100.0, dtype=torch.float16)
    product = QuantProduct(record("a.products.0"))
    for quantizer in product.activation_quantizers():
        quantizer.enabled = True
    with at(torch.tensor([0.0])):
        assert bool(product(q, q, q).isfinite().all())


def test_the_operands_are_queries_keys_values_and_probabilities() -> None:
    attention, inputs = build("cross-mask")
    t = torch.tensor([5.0, 5.0, 9.0])
    quantizers = quantize(attention)
    seen: dict[str, Tensor] = {}
    for quantizer in quantizers:
        quantizer.observer = Observer(quantizer.record.name, t.unique())
        quantizer.register_forward_hook(lambda m, args, out: seen.__setitem__(m.record.name, args[0]))
    with at(t):
        attention(**inputs)

    def heads(x: Tensor) -> Tensor:
        return x.view(3, -1, 2, 8).transpose(1, 2)

    x, context = inputs["hidden_states"], inputs["encoder_hidden_states"]
    q, k, v = heads(attention.to_q(x)), heads(attention.to_k(context)), heads(attention.to_v(context))
    scores = q @ k.mT / 8**0.5 + inputs["attention_mask"][:, None]
    for name, expected in zip(OPERANDS, (q, k, v, scores.softmax(-1)), strict=True):
        torch.testing.assert_close(seen[f"a.products.0.{name}"], expected)
    assert quantizers[3].observer is not None
    assert quantizers[3].observer.hi.max() <= 1 and quantizers[3].observer.lo.min() >= 0


class Several(nn.Module):
    """Two products, as image and text attention have, whose scale tells which one ran; a module inside has its own."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = functional.scaled_dot_product_attention(x, x, x)
        if self.inner is not None:
            y = y + self.inner(x)
        return y + functional.scaled_dot_product_attention(x, x, x, scale=3.0)


def calls_of(owner: nn.Module, run: Callable[[], Any]) -> list[str]:
    seen: list[str] = []
    for product in products_of(owner):
        product.register_forward_hook(lambda m, args, out: seen.append(m.record.name))
    run()
    return seen


def test_products_of_a_module_and_of_one_inside_are_kept_apart() -> None:
    inner = Several()
    outer = Several(inner)
    for owner, name in ((outer, "outer"), (inner, "inner")):
        for index in range(2):
            attach(owner, QuantProduct(record(f"{name}.products.{index}")))
    x = torch.randn(2, 1, 3, 4)
    seen = {"outer": calls_of(outer, lambda: None), "inner": calls_of(inner, lambda: outer(x))}
    assert seen == {
        "outer": ["outer.products.0", "outer.products.1"],
        "inner": ["inner.products.0", "inner.products.1"],
    }
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_module_that_goes_through_its_samples_one_by_one_begins_again() -> None:
    class OneByOne(Several):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(OneByOne, self).forward(row) for row in x.split(1)])

    owner = OneByOne()
    quantize(owner, 2)
    names = ["a.products.0", "a.products.1"]
    assert calls_of(owner, lambda: owner(torch.randn(3, 1, 3, 4))) == names * 3


def test_attention_that_is_not_heard_is_an_error_but_not_what_a_cache_answers() -> None:
    class Elsewhere(nn.Module):
        processor = None  # what a pipeline may exchange

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).relu() @ x

    owner, x = Elsewhere(), torch.randn(1, 1, 3, 4)
    attach(owner, QuantProduct(record("a.products.0")))
    with pytest.raises(ModelError, match="computes attention without scaled_dot_product_attention"):
        owner(x)
    assert not torch.overrides._get_current_function_mode_stack()
    owner.forward = lambda x: x  # type: ignore[method-assign]
    assert owner(x) is x


class Routed(nn.Module):
    """Weights what it attends to by a softmax of its own; without ``heard`` it attends by hand."""

    def __init__(self, inner: nn.Module | None = None, heard: bool = True) -> None:
        super().__init__()
        self.inner, self.heard = inner, heard

    def forward(self, x: Tensor) -> Tensor:
        shares = nn.Softmax(-1)(x)
        x = x if self.inner is None else self.inner(x)
        y = functional.scaled_dot_product_attention(x, x, x) if self.heard else (x @ x.mT).softmax(-1) @ x
        return y * shares


def test_a_softmax_beside_products_that_are_heard_is_no_attention() -> None:
    x, inner = torch.randn(2, 1, 3, 4), Routed()
    outer = Routed(inner)
    for owner in (outer, inner):
        attach(owner, QuantProduct(record("a.products.0")))
    seen = {"outer": calls_of(outer, lambda: None), "inner": calls_of(inner, lambda: outer(x))}
    assert seen == {"outer": ["a.products.0"], "inner": ["a.products.0"]}
    for owner in (outer, inner):
        owner.heard = False
        with pytest.raises(ModelError, match="computes attention by hand"):
            outer(x)
        owner.heard = True
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_module_without_a_processor_may_have_nothing_to_attend_to() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x if context is None else functional.scaled_dot_product_attention(x, context, context)

    owner, x = Sometimes(), torch.randn(1, 1, 3, 4)
    attach(owner, QuantProduct(record("a.products.0")))
    assert owner(x) is x and owner(x, x).shape == x.shape


def test_an_error_inside_leaves_nothing_behind() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    owner = Broken()
    attach(owner, QuantProduct(record("a.products.0")))
    with pytest.raises(KeyboardInterrupt):
        owner(torch.randn(1))
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.b.products.3", ("a.b", 3)), ("a.products.x", ("a", -1)), ("a.b", ("", -1)), ("a.products.\u0663", ("a", -1))],
)
def test_a_name_tells_the_module_and_the_number(name: str, expected: tuple[str, int]) -> None:
    assert owner_of(name) == expected
