"""Attention on codes wherever a model calls scaled_dot_product_attention, against the simulated product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import MARCH, library_of
from torch import Tensor, nn
from torch.nn import functional

from ptq_tdq.runtime.attention import IntegerProduct, native_attend, reference_attend
from ptq_tdq.runtime.step import Interval

TOKENS, WIDTH = 9, 12
Product = Callable[[Tensor, Tensor], Tensor]


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def plain(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(*(heads(z, 3) for z in (x, y, y)), **options).transpose(1, 2)


def grouped(x: Tensor, y: Tensor) -> Tensor:
    k = v = heads(y[..., :4], 1)
    return functional.scaled_dot_product_attention(heads(x, 3), k, v, enable_gqa=True).transpose(1, 2)


def blocked(x: Tensor, y: Tensor) -> Tensor:
    mask = torch.arange(TOKENS) < 4 + torch.arange(len(x))[:, None] % 3
    return plain(x, y, attn_mask=mask[:, None, None])


def blind(x: Tensor, y: Tensor) -> Tensor:
    mask = torch.arange(TOKENS)[:, None] > 3
    return plain(x, y, attn_mask=mask)  # the first tokens may look at nothing


def added(x: Tensor, y: Tensor) -> Tensor:
    return plain(x, y, attn_mask=torch.randn(3, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)))


def cross(x: Tensor, y: Tensor) -> Tensor:
    return plain(x, y[:, :4])


def narrow_values(x: Tensor, y: Tensor) -> Tensor:
    out = functional.scaled_dot_product_attention(heads(x, 3), heads(y, 3), heads(y[..., :6], 3))
    return out.transpose(1, 2).repeat(1, 1, 1, 2)


def without_heads(x: Tensor, y: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, y, y)


def of_frames(x: Tensor, y: Tensor) -> Tensor:
    q, k = (z.unflatten(1, (3, 3)).unflatten(-1, (3, -1)).transpose(2, 3) for z in (x, y))
    return functional.scaled_dot_product_attention(q, k, k).transpose(2, 3)


def one_by_one(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([plain(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


def viewed(x: Tensor, y: Tensor) -> Tensor:
    return plain(x, y).view(x.shape)  # as SD3's image prompt, which counts on how torch's own output lies in memory


PRODUCTS: dict[str, Product] = {
    "plain": plain,
    "viewed": viewed,
    "causal": lambda x, y: plain(x, y, is_causal=True),
    "with a scale": lambda x, y: plain(x, y, scale=0.1),
    "with a scale below 0": lambda x, y: plain(x, y, scale=-30.0),
    "grouped queries": grouped,
    "blocked": blocked,
    "blind rows": blind,
    "added mask": added,
    "fewer keys": cross,
    "narrow values": narrow_values,
    "without heads": without_heads,
    "frames": of_frames,
    "sample by sample": one_by_one,
    "twice": lambda x, y: plain(x, y) + cross(y, x),
}


class Attending(nn.Module):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product
        self.first, self.second, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.product(self.first(x), self.second(x)).reshape(x.shape))


class Denoiser(nn.Module):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self.attending = Attending(product)

    def forward(self, x: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {"sample": self.attending(x), "number": 3}


@pytest.fixture(params=["tdq-thin", "dynamic", "dynamic-token-tdq"])
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("name", PRODUCTS)
def test_it_computes_what_the_simulated_one_does(name: str, method: str, alike: Any) -> None:
    torch.manual_seed(0)
    x, one = torch.randn(3, TOKENS, WIDTH), torch.tensor([500.0])
    only = {"times": [one]} if name == "sample by sample" else {}
    integer = alike(Denoiser(PRODUCTS[name]), x, method=method, **only)
    found = [m for m in integer.modules() if isinstance(m, IntegerProduct)]
    assert len(found) == integer.facts["integer_products"] == (2 if name == "twice" else len(found)) >= 1
    output = integer(x, one)
    assert output["number"] == 3 and output["sample"].dtype == torch.float32


@pytest.mark.parametrize("kind", MARCH)
@pytest.mark.parametrize("keys", [1, 31, 33, 33_000])
@pytest.mark.parametrize("bits", [(8, 8, 8, 8), (4, 8, 2, 6)])
@pytest.mark.parametrize(("depth", "value_depth"), [(1, 3), (7, 40), (130, 33)])
def test_sizes_of_all_kinds_are_as_in_torch(
    keys: int, bits: tuple[int, ...], depth: int, value_depth: int, kind: str
) -> None:
    generator, samples = torch.Generator().manual_seed(keys), 1 + (keys < 100)
    sizes = ((11, depth), (keys, depth), (keys, value_depth))
    q, k, v = (torch.randn(samples, 2, *size, generator=generator) for size in sizes)
    tops = [2**b - 1 for b in bits]
    steps = [4 / tops[0], 4 / tops[1], 4 / tops[2], min(1.0, 8 / keys) / tops[3]]
    zeros = [tops[0] // 2, tops[1] // 3, tops[2], 0]

    def interval(index: int, x: Tensor) -> Interval:
        return Interval(torch.tensor([steps[index]]), torch.tensor([zeros[index]], dtype=torch.int32))

    found = native_attend(library_of(kind))(q, k, v, interval, bits, depth**-0.5, None)
    expected = reference_attend(q, k, v, interval, bits, depth**-0.5, None)
    # a probability on a tie takes the other code
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("kind", MARCH)
@pytest.mark.parametrize("zero", [0, 200])
def test_sums_that_32_bits_do_not_hold(kind: str, zero: int) -> None:
    """All codes at their top: each key adds (255 - z) 255."""
    keys = 70_000
    q, k, v = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, keys, 1), torch.full((1, 1, keys, 3), 1e3)
    intervals = [(1.0, 128), (1.0, 128), (0.5, 0), (1e-3 / keys, zero)]

    def interval(index: int, x: Tensor) -> Interval:
        scale, zero_point = intervals[index]
        return Interval(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))

    found = native_attend(library_of(kind))(q, k, v, interval, (8, 8, 8, 8), 1.0, None)
    expected = (255 - zero) * 255 * keys * (0.5 * 1e-3 / keys)
    torch.testing.assert_close(found, torch.full_like(found, expected))
