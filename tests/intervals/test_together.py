"""Networks of t that run together give what each gives alone, and the same gradients."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from ptq_tdq import timeaxis
from ptq_tdq.intervals import IntervalChoices, source_class
from ptq_tdq.intervals.known import Known
from ptq_tdq.intervals.mlp import ModuleInterval
from ptq_tdq.intervals.together import join
from ptq_tdq.scheme import QType
from ptq_tdq.search import QParams

T = torch.tensor([0.0, 3.5, 400.0, 1000.0])


def sources(method: str, encoding: str) -> list[ModuleInterval]:
    """Three of one form and one of another."""
    torch.manual_seed(0)
    found = []
    for number in range(4):
        table = QParams(torch.rand(1001) + 0.5, torch.randint(0, 9, (1001,), dtype=torch.int32))
        kind = encoding if number < 3 else "none"
        choices = IntervalChoices().changed(
            {"time_encoding": kind, "thin_encoding": kind, "zero_point": "own", "module_start": "as-is"}
        )
        source = source_class(method).build(method, Known(torch.tensor([1.0, 500.0, 999.0]), table, QType(4), choices))
        assert isinstance(source, ModuleInterval)
        torch.nn.init.normal_(source.net[-1].weight)
        found.append(source.eval())
    return found


def ask(source: ModuleInterval, t: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = source(t, torch.zeros(len(t), 1))
    return found


@pytest.mark.parametrize("t", [T, T[2:3]], ids=["a step each", "one step"])
@pytest.mark.parametrize(
    ("method", "encoding"), [("tdq", "frequency"), ("tdq", "fourier"), ("tdq-thin", "normalize"), ("tdq", "none")]
)
def test_values_and_gradients_are_those_of_each_alone(method: str, encoding: str, t: Tensor) -> None:
    alone = sources(method, encoding)
    together = deepcopy(alone)
    join(together)
    rows = t.expand(4) if len(t) == 1 else t
    with timeaxis.at(t):
        for one, other in zip(alone, together, strict=True):
            for expected, found in zip(ask(one, rows), ask(other, rows), strict=True):
                torch.testing.assert_close(found, expected)
                assert found.dtype == expected.dtype
        for each in (alone, together):
            torch.stack([ask(source, rows)[0].square().sum() for source in each]).sum().backward()
    for one, other in zip(alone, together, strict=True):
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_each_call_sees_what_was_learned_before_it() -> None:
    together = sources("tdq", "frequency")
    join(together)
    with timeaxis.at(T):
        before = ask(together[0], T)[0]
    with torch.no_grad():
        together[0].scale.value.add_(1.0)
    with timeaxis.at(T.clone()):
        after = ask(together[0], T)[0]
    assert bool((after > before).all())


def test_other_time_steps_than_those_of_the_call_are_answered_alone() -> None:
    """Tables are asked for outside a call, some rows inside one."""
    together = sources("tdq", "frequency")
    expected = [ask(source, T) for source in together]
    join(together)
    with timeaxis.at(T.repeat(3)):
        for source, (scale, _) in zip(together, expected, strict=True):
            torch.testing.assert_close(ask(source, T)[0], scale)
    assert len(together[0].table(1000)[0]) == 1001


def test_dropout_is_that_of_the_mode_and_each_networks_own() -> None:
    first = sources("tdq", "frequency")[0]
    together = [first, deepcopy(first)]
    join(together)
    with timeaxis.at(T):
        calm = [ask(source, T)[0] for source in together]
    assert torch.equal(*calm)
    for source in together:
        source.train()
    with timeaxis.at(T.clone()):
        noisy = [ask(source, T)[0] for source in together]
    assert not torch.equal(noisy[0], calm[0]) and not torch.equal(*noisy)
