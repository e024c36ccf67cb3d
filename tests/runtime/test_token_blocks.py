"""Transformer blocks as one call of C, against the same integer model layer by layer and the simulated one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ptq_tdq.errors import ModelError, RuntimeUnsupportedError
from ptq_tdq.native.library import SWITCH
from ptq_tdq.runtime import IntegerModel
from ptq_tdq.runtime.token_blocks import FusedTransformer

WIDTH, OTHER_WIDTH, TOKENS, OTHERS, BATCH = 24, 20, 11, 7, 3
T = torch.tensor(500.0)
NORMS = {
    "layer_norm": {},
    "ada_norm": {"num_embeds_ada_norm": 1001, "norm_elementwise_affine": False},
    "ada_norm_zero": {"num_embeds_ada_norm": 4, "norm_elementwise_affine": False},
    "ada_norm_single": {"norm_elementwise_affine": False},
    "ada_norm_continuous": {"ada_norm_continous_conditioning_embedding_dim": 10, "ada_norm_bias": True},
}
CROSS = {"alone": None, "with a text": OTHER_WIDTH}


class Denoiser(nn.Module):
    """A block, told all that one of any norm may ask for."""

    def __init__(self, norm: str = "ada_norm_zero", **options: Any) -> None:
        super().__init__()
        options = {"activation_fn": "gelu-approximate", "attention_bias": True} | NORMS[norm] | options
        self.single = norm == "ada_norm_single"
        self.one_step = norm == "ada_norm"  # an embedding of one number for all samples
        self.block = BasicTransformerBlock(WIDTH, 2, 12, norm_type=norm, **options)
        self.table = nn.Embedding(1001, 6 * WIDTH)
        for parameter in self.parameters():  # nothing is 1 or 0 by chance
            nn.init.normal_(parameter, std=0.3)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        label: Tensor | None = None,
        pooled: Tensor | None = None,
        mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        t = timestep.long().expand(len(x))
        t = self.table(t) if self.single else (t[0] if self.one_step else t)
        y: Tensor = self.block(x, mask, text, text_mask, t, None, label, {"pooled_text_emb": pooled})
        return y


def arguments(batch: int = BATCH, *, text: bool = True, masked: bool = False) -> dict[str, Any]:
    """Of a call but for t."""
    generator = torch.Generator().manual_seed(batch)
    found: dict[str, Any] = {
        "x": torch.randn(batch, TOKENS, WIDTH, generator=generator) * 2 + 0.5,
        "label": torch.arange(batch) % 4,
        "pooled": torch.randn(batch, 10, generator=generator),
    }
    if text:
        found["text"] = torch.randn(batch, OTHERS, OTHER_WIDTH, generator=generator)
    if masked:
        found["mask"] = torch.zeros(batch, 1, TOKENS)
        found["mask"][:, :, TOKENS // 2 :] = -10000.0
        if text:
            found["text_mask"] = torch.randn(batch, 1, OTHERS, generator=generator)
    return found


@pytest.fixture
def fused(both: Any, library: Any) -> Callable[..., tuple[Any, IntegerModel]]:
    """``fused(model, **choices)``: a simulated and an integer model, whose blocks are fused; ``given`` makes calls."""

    def make(model: nn.Module, given: dict[str, Any] | None = None, **choices: Any) -> tuple[Any, IntegerModel]:
        given = arguments() if given is None else given
        calls = [{**given, "x": given["x"] * (1 + t / 400), "timestep": torch.tensor(t)} for t in (1000.0, 500.0, 1.0)]
        return both(model, calls, **choices)

    return make


def blocks_of(integer: nn.Module) -> list[Any]:
    """What computes in place of its transformer blocks."""
    found = (vars(module).get("forward") for module in integer.modules())
    return [each for each in found if isinstance(each, FusedTransformer)]


def assert_alike(
    simulated: nn.Module, integer: IntegerModel, batches: tuple[int, ...] = (1, BATCH), **given: Any
) -> None:
    """In one time step for all, and, for several samples, in one for each."""
    for batch in batches:
        made = arguments(batch, **given)
        together = batch == 1 or any(getattr(module, "one_step", False) for module in integer.modules())
        times = [T, *([] if together else [torch.linspace(20, 999, batch)])]
        for t in times:
            before = made["x"].clone()
            with torch.no_grad():
                found, expected = integer(timestep=t, **made), simulated(timestep=t, **made)
                plain = plainly(integer, timestep=t, **made)
            assert torch.equal(made["x"], before), "the tokens may be wanted again"
            assert off(found, plain) < 1e-4 and off(found, expected) < 2e-3  # a tie here or there


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).pow(2).mean() / expected.pow(2).mean())


def plainly(integer: IntegerModel, **given: Any) -> Tensor:
    """Layer by layer."""
    blocks = blocks_of(integer)
    for block in blocks:
        del vars(block.block)["forward"]
    try:
        found: Tensor = integer(**given)
        return found
    finally:
        for block in blocks:
            vars(block.block)["forward"] = block


def planned(integer: IntegerModel) -> bool:
    """Whether calls have gone through plans."""
    return all(block.plans for block in blocks_of(integer))


WEIGHTS = {"weight_only_layers": ("time_embedding", "modulation")}


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm: str, cross: str, fused: Any) -> None:
    torch.manual_seed(0)
    text = CROSS[cross] is not None
    choices = WEIGHTS if norm == "ada_norm" else {}  # where a linear has no tokens
    simulated, integer = fused(Denoiser(norm, cross_attention_dim=CROSS[cross]), arguments(text=text), **choices)
    assert len(blocks_of(integer)) == 1
    assert_alike(simulated, integer, text=text)
    assert planned(integer)


@pytest.mark.parametrize("norm", ["layer_norm", "ada_norm_zero"])
@pytest.mark.parametrize("activation", ["gelu", "geglu", "geglu-approximate", "swiglu"])
def test_activations(activation: str, norm: str, fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser(norm, activation_fn=activation), arguments(text=False))
    assert_alike(simulated, integer, text=False)
    assert planned(integer)


CHOICES: dict[str, dict[str, Any]] = {
    "8 bits": {"scheme": "W8A8"},
    "rotated": {"rotate": "hadamard"},
    "gains": {"equalize": "channels"},
    "weights of integers": WEIGHTS,
    "of no step": {"method": "static"},
}
PLAIN: dict[str, dict[str, Any]] = {
    "dynamic": {"method": "dynamic"},
    "by token": {"method": "dynamic-token"},
    "products in floating point": {"attention": False},
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("norm", ["ada_norm_zero", "ada_norm_single"])
def test_choices(norm: str, name: str, fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser(norm, cross_attention_dim=OTHER_WIDTH), **CHOICES[name])
    assert len(blocks_of(integer)) == 1
    assert_alike(simulated, integer, batches=(1, BATCH, 9))
    assert planned(integer)


@pytest.mark.parametrize("name", PLAIN)
def test_what_has_no_table_is_computed_layer_by_layer(name: str, fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser(cross_attention_dim=OTHER_WIDTH), **PLAIN[name])
    assert not blocks_of(integer)
    assert_alike(simulated, integer)


@pytest.mark.parametrize("cross", CROSS)
def test_masks(cross: str, fused: Any) -> None:
    torch.manual_seed(0)
    given = {"text": CROSS[cross] is not None, "masked": True}
    simulated, integer = fused(Denoiser("layer_norm", cross_attention_dim=CROSS[cross]), arguments(**given))
    assert_alike(simulated, integer, **given)
    assert_alike(simulated, integer, text=given["text"])
    assert planned(integer)


@pytest.mark.parametrize(
    "options", [{"only_cross_attention": True, "cross_attention_dim": 20}, {"double_self_attention": True}]
)
def test_other_pairs_of_attentions(options: dict[str, Any], fused: Any) -> None:
    torch.manual_seed(0)
    text = "cross_attention_dim" in options
    simulated, integer = fused(Denoiser("layer_norm", **options), arguments(text=text))
    assert_alike(simulated, integer, text=text)
    assert planned(integer)


@pytest.mark.parametrize("options", [{"positional_embeddings": "sinusoidal", "num_positional_embeddings": TOKENS}])
def test_blocks_of_another_form_take_their_own_way(options: dict[str, Any], fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser("layer_norm", **options), arguments(text=False))
    assert not blocks_of(integer)
    assert_alike(simulated, integer, text=False)


def test_calls_of_another_form_take_their_own_way(fused: Any) -> None:
    torch.manual_seed(0)
    simulated, integer = fused(Denoiser("layer_norm"), arguments(text=False))
    for model in (simulated, integer):
        for module in model.modules():
            if isinstance(module, BasicTransformerBlock):
                module.set_chunk_feed_forward(TOKENS, 1)
    assert_alike(simulated, integer, text=False)
    assert not any(block.plans for block in blocks_of(integer))


def test_attention_by_hand_is_still_refused(fused: Any) -> None:
    _, integer = fused(Denoiser("layer_norm"), arguments(text=False))
    for block in blocks_of(integer):
        block.block.attn1.set_processor(AttnProcessor())
    with pytest.raises(ModelError, match="computes attention by hand"):
        integer(timestep=T, **arguments(text=False))


def test_tokens_of_another_width_are_refused(fused: Any) -> None:
    _, integer = fused(Denoiser("layer_norm", norm_elementwise_affine=False, cross_attention_dim=OTHER_WIDTH))
    given = arguments()
    with pytest.raises(ModelError, match=f"takes {OTHER_WIDTH} channels"):
        integer(timestep=T, **{**given, "text": given["text"][..., 1:]})


def test_a_copy_has_plans_of_its_own(fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser(), arguments(text=False))
    given = arguments(text=False)
    expected = integer(timestep=T, **given)
    other = copy.deepcopy(integer)
    assert blocks_of(other)[0].block is not blocks_of(integer)[0].block
    del integer
    assert torch.equal(other(timestep=T, **given), expected)


def test_without_native_code_it_computes_the_same(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Denoiser(cross_attention_dim=OTHER_WIDTH)
    simulated, integer = fused(model)
    monkeypatch.setenv(SWITCH, "0")
    plain = IntegerModel(copy.deepcopy(model), simulated.to_artifact())
    assert blocks_of(integer) and not blocks_of(plain)
    assert off(*(each(timestep=T, **arguments()) for each in (plain, integer))) < 1e-4


def test_calls_of_several_threads_do_not_meet(fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser(cross_attention_dim=OTHER_WIDTH))
    calls = [arguments(1 + i % 3) | {"timestep": torch.tensor(float(i))} for i in range(90)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda call: integer(**call), calls))
    assert all(torch.equal(integer(**call), found) for call, found in zip(calls, together, strict=True))


INNER = ("norm1", "norm1.linear", "attn1", "attn1.to_q", "attn1.to_out.0", "attn2.to_v", "norm3", "ff", "ff.net.2")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
def test_hooks_inside_a_block_run(register: str, copied: bool, fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser(cross_attention_dim=OTHER_WIDTH))
    integer = copy.deepcopy(integer) if copied else integer
    (block,) = blocks_of(integer)
    expected = integer(timestep=T, **arguments())
    assert block.untouched and planned(integer)
    for name in INNER:
        called: list[str] = []
        inner = block.block.get_submodule(name)
        handle = getattr(inner, register)(lambda *_, called=called, name=name: called.append(name))
        assert off(integer(timestep=T, **arguments()), expected) < 1e-4
        assert called == [name]
        handle.remove()
        assert block.untouched


@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
def test_what_is_put_into_a_block_is_called(copied: bool, fused: Any) -> None:
    """Another module, another class or another forward, as tools that change pipelines put them there."""
    torch.manual_seed(0)
    _, integer = fused(Denoiser(cross_attention_dim=OTHER_WIDTH))
    integer = copy.deepcopy(integer) if copied else integer
    (fused_block,), called = blocks_of(integer), []
    block, query, forward = fused_block.block, fused_block.block.attn1.to_q, fused_block.block.attn1.forward
    expected = integer(timestep=T, **arguments())

    class Around(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            called.append("module")
            return super().forward(x)

    class Other(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Tensor:
            called.append("class")
            return super().forward(*args)

    def other(*args: Any, **kwargs: Any) -> Tensor:
        called.append("forward")
        return forward(*args, **kwargs)

    block.attn1.to_q = Around(query)
    assert off(integer(timestep=T, **arguments()), expected) < 1e-4
    block.attn1.to_q, block.attn1.forward = query, other
    assert off(integer(timestep=T, **arguments()), expected) < 1e-4
    del block.attn1.forward
    block.__class__ = Other
    assert off(integer(timestep=T, **arguments()), expected) < 1e-4
    assert called == ["module", "forward", "class"]


def test_memory_that_parameters_leave_stays_there_for_plans(fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser(), arguments(text=False), **WEIGHTS)
    given = arguments(text=False)
    expected = integer(timestep=T, **given)
    for parameter in integer.parameters():
        parameter.data = parameter.data.clone()
    others = [torch.full((size,), torch.nan) for size in (WIDTH, 6 * WIDTH) for _ in range(100)]  # take what is free
    assert torch.equal(integer(timestep=T, **given), expected) and others


def test_the_wrapped_model_is_not_moved_either(fused: Any) -> None:
    torch.manual_seed(0)
    _, integer = fused(Denoiser(), arguments(text=False), **WEIGHTS)
    given = arguments(text=False)
    expected = integer(timestep=T, **given)
    with pytest.raises(RuntimeUnsupportedError, match="computes in float32 on the CPU"):
        integer.model.half()
    integer.model.share_memory()
    assert torch.equal(integer(timestep=T, **given), expected)
