"""Errors and distributions of layers: identities, and the same quantity found another way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq_tdq.calls import Calls, prediction
from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.evaluate.trajectories import Reference, compare
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.report.measure import groups_of, measure_errors, observe_activations
from ptq_tdq.timeaxis import lookup


def index(quantized: QuantizedModel, name: str) -> int:
    return [record.name for record in quantized.plan].index(name)


def steps(calls: Calls) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Every step, ascending in t, as one call with all its rows."""
    for k, t in enumerate(calls.t.unique()):
        rows = (calls.t == t).nonzero().flatten()
        yield k, rows, calls.inputs(rows)


@contextmanager
def outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module gives each time it runs."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    yield found
    handle.remove()


def test_a_model_whose_quantizers_are_off_differs_in_nothing(quantized: QuantizedModel, reference: Reference) -> None:
    same = QuantizedModel.copy_of(reference.model.denoiser, quantized.axis, quantized.plan)
    errors = measure_errors(same, reference)
    products = torch.tensor([record.kind == "product" for record in quantized.plan])
    for part in (errors.inputs, errors.own, errors.accumulated):
        assert (part[~products] == torch.inf).all()
        assert (part[products] > 120).all()  # torch's own function has other last digits than its formula
    assert (errors.accumulated == torch.inf).all() and (errors.prediction == torch.inf).all()


def test_the_ends_of_the_network_agree_with_other_measurements(quantized: QuantizedModel, reference: Reference) -> None:
    errors, comparison = measure_errors(quantized, reference), compare(reference, quantized)
    assert sorted(comparison.t) == reference.calls.t.unique().tolist()
    expected = [value for _, value in sorted(zip(comparison.t, comparison.noise_sqnr_db, strict=True))]
    assert errors.prediction.tolist() == pytest.approx(expected, abs=1e-2)
    assert errors.accumulated[index(quantized, "conv_out")].tolist() == pytest.approx(expected, abs=1e-2)
    first = index(quantized, "conv_in")  # nothing has gone wrong before it
    assert errors.own[first].tolist() == pytest.approx(errors.accumulated[first].tolist(), abs=1e-3)
    with_inputs = torch.tensor([bool(record.inputs) for record in quantized.plan])
    assert torch.isfinite(errors.own).all() and torch.isfinite(errors.inputs[with_inputs]).all()
    assert torch.isinf(errors.inputs[~with_inputs]).all()  # a float input loses nothing


def test_quantized_inputs_alone_are_torchs_own_fake_quantization(
    quantized: QuantizedModel, reference: Reference
) -> None:
    errors, name, unet = measure_errors(quantized, reference), "down_blocks.0.resnets.0.conv2", reference.model.denoiser
    source = quantized.to_artifact().tables[name]
    seen: list[Tensor] = []
    layer = unet.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for k, rows, arguments in steps(reference.calls):
        with torch.no_grad():
            unet(**arguments)
            assert source.scale is not None
            t = reference.calls.t[rows[:1]]
            scale, zero = (lookup(table, t).item() for table in (source.scale, source.zero_point))
            rounded = torch.fake_quantize_per_tensor_affine(seen[-1], scale, int(zero), 0, 15)
            expected = sqnr_db(layer.forward(seen[-1]), layer.forward(rounded))
        assert errors.inputs[index(quantized, name), k].item() == pytest.approx(expected, abs=0.05)
    handle.remove()


def test_an_attention_product_by_itself_is_the_only_one_that_is_switched_on(
    quantized: QuantizedModel, reference: Reference
) -> None:
    name = next(record.name for record in quantized.plan if record.kind == "product")
    errors = measure_errors(quantized, reference)
    own = errors.own[index(quantized, name)]
    alone = QuantizedModel.copy_of(reference.model.denoiser, quantized.axis, quantized.plan)
    for key, quantizer in alone.quantizers().items():
        quantizer.source = quantized.quantizers()[key].source
        quantizer.enabled = key in {f"{name}.{part}" for part in ("q", "k", "v", "softmax")}
    accumulated = measure_errors(alone, reference).accumulated[index(quantized, name)]
    assert own.tolist() == pytest.approx(accumulated.tolist(), abs=1e-3)
    assert torch.isfinite(own).all() and torch.equal(own, errors.inputs[index(quantized, name)])  # it has no weights


def test_measuring_leaves_the_models_as_they_were(quantized: QuantizedModel, reference: Reference) -> None:
    arguments, models = reference.calls.inputs(slice(0, 4)), (reference.model.denoiser, quantized)
    with torch.no_grad():
        before = [prediction(model(**arguments)) for model in models]
        measure_errors(quantized, reference)
        observe_activations(quantized.plan, reference)
        after = [prediction(model(**arguments)) for model in models]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_distributions_cover_what_the_layer_receives(quantized: QuantizedModel, reference: Reference) -> None:
    activation = observe_activations(quantized.plan, reference)["conv_in"]
    assert activation.by_group is not None and groups_of(reference) == [0, 1, 2]
    count = len(reference.calls.t.unique())
    assert len(activation.by_group.lo) == 3 * count
    for k, _, arguments in steps(reference.calls):
        x = arguments["sample"]
        assert activation.by_step.lo[k] == x.min() and activation.by_step.hi[k] == x.max()
        for c in range(3):
            mine = x[arguments["class_labels"] == c]
            assert activation.by_group.hi[c * count + k] == mine.max()
    total = activation.by_group.counts.view(3, count, -1).sum(0)
    assert torch.equal(total, activation.by_step.counts)


def test_both_halves_of_guidance_count_for_their_prompt(
    quantized_toy: QuantizedModel, toy_reference: Reference
) -> None:
    calls = toy_reference.calls
    activation = observe_activations(quantized_toy.plan, toy_reference)["first"]
    assert activation.by_group is not None and len(calls) == 2 * 4 * 3
    for k, rows, arguments in steps(calls):
        for g, prompt in enumerate(groups_of(toy_reference)):
            mine = torch.tensor([toy_reference.conditions[int(i)] == prompt for i in calls.trajectory[rows]])
            values = arguments["tokens"][mine]
            assert mine.sum() == 4 and activation.by_group.counts[g * 3 + k].sum() == values.numel()
            assert activation.by_group.lo[g * 3 + k] == values.min()


def test_one_condition_or_none_is_nothing_to_tell_apart(
    toy_reference: Reference, quantized_toy: QuantizedModel
) -> None:
    for condition in ("the same", None):
        alike = replace(toy_reference, conditions=[condition] * 4)
        assert groups_of(alike) == []
        assert observe_activations(quantized_toy.plan, alike)["first"].by_group is None


def test_all_uses_of_a_layer_count(quantized_toy: QuantizedModel, toy_reference: Reference) -> None:
    errors = measure_errors(quantized_toy, toy_reference)
    for k, _, arguments in steps(toy_reference.calls):
        found = []
        for model, layer in (
            (toy_reference.model.denoiser, toy_reference.model.denoiser.twice),
            (quantized_toy, quantized_toy.layers()["twice"]),
        ):
            with outputs(layer) as seen, torch.no_grad():
                model(**arguments)
            assert len(seen) == 2
            found.append(torch.stack(seen))
        expected = sqnr_db(*found)
        assert errors.accumulated[index(quantized_toy, "twice"), k].item() == pytest.approx(expected, abs=1e-2)


def test_rows_that_belong_to_no_sample_are_measured_at_their_t(
    quantized_toy: QuantizedModel, toy_reference: Reference
) -> None:
    activation = observe_activations(quantized_toy.plan, toy_reference)["sequence"]
    assert activation.by_group is not None and activation.by_group.counts.sum() == 0
    assert (activation.by_step.counts.sum(1) == 8 * 5 * 8).all()
    assert torch.isfinite(measure_errors(quantized_toy, toy_reference).own[index(quantized_toy, "sequence")]).all()


def test_a_layer_that_does_not_run_has_no_error_and_no_distribution(
    quantized_toy: QuantizedModel, toy_reference: Reference
) -> None:
    quantized, denoiser = copy.deepcopy(quantized_toy), copy.deepcopy(toy_reference.model.denoiser)
    denoiser.extra = quantized.model.extra = False
    reference = replace(toy_reference, model=replace(toy_reference.model, denoiser=denoiser))
    assert "optional" not in observe_activations(quantized.plan, reference)
    errors, unused = measure_errors(quantized, reference), index(quantized, "optional")
    for part in (errors.inputs, errors.own, errors.accumulated):
        assert part[unused].isnan().all() and part.isnan().sum() == 3
