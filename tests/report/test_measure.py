"""Errors and distributions of layers: identities, and the same quantity found another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq_tdq.evaluate.metrics import sqnr_db
from ptq_tdq.evaluate.trajectories import Reference, compare
from ptq_tdq.quantized_model import QuantizedModel
from ptq_tdq.report.measure import measure_errors, observe_activations
from ptq_tdq.timeaxis import lookup


def index(quantized: QuantizedModel, name: str) -> int:
    return [record.name for record in quantized.plan].index(name)


def test_a_model_whose_quantizers_are_off_differs_in_nothing(quantized: QuantizedModel, reference: Reference) -> None:
    same = QuantizedModel.copy_of(reference.model.unet, quantized.plan)
    errors = measure_errors(same, reference)
    for part in (errors.inputs, errors.own, errors.accumulated, errors.prediction):
        assert torch.isinf(part).all() and (part > 0).all()


def test_the_ends_of_the_network_agree_with_other_measurements(quantized: QuantizedModel, reference: Reference) -> None:
    errors = measure_errors(quantized, reference)
    expected = compare(reference, quantized, seed=0).noise_sqnr_db
    assert errors.prediction.tolist() == pytest.approx(expected, abs=1e-3)
    assert errors.accumulated[index(quantized, "conv_out")].tolist() == pytest.approx(expected, abs=1e-3)
    first = index(quantized, "conv_in")  # nothing has gone wrong before it
    assert errors.own[first].tolist() == pytest.approx(errors.accumulated[first].tolist(), abs=1e-3)
    with_inputs = torch.tensor([bool(record.inputs) for record in quantized.plan])
    assert torch.isfinite(errors.own).all() and torch.isfinite(errors.inputs[with_inputs]).all()
    assert torch.isinf(errors.inputs[~with_inputs]).all()  # a float input loses nothing


def test_quantized_inputs_alone_are_torchs_own_fake_quantization(
    quantized: QuantizedModel, reference: Reference
) -> None:
    errors, name, unet = measure_errors(quantized, reference), "down_blocks.0.resnets.0.conv2", reference.model.unet
    source = quantized.to_artifact().tables[name]
    seen: list[Tensor] = []
    layer = unet.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for k, (x, t) in enumerate(zip(reference.x, reference.t, strict=True)):
        with torch.no_grad():
            unet(x, t, **reference.labels())
            assert source.scale is not None
            scale, zero = (lookup(table, t[:1]).item() for table in (source.scale, source.zero_point))
            rounded = torch.fake_quantize_per_tensor_affine(seen[-1], scale, int(zero), 0, 15)
            expected = sqnr_db(layer.forward(seen[-1]), layer.forward(rounded))
        assert errors.inputs[index(quantized, name), k].item() == pytest.approx(expected, abs=0.05)
    handle.remove()


def test_an_attention_product_by_itself_is_that_of_its_processor(
    quantized: QuantizedModel, reference: Reference
) -> None:
    name = next(record.name for record in quantized.plan if record.kind == "attention")
    own = measure_errors(quantized, reference).own[index(quantized, name)]
    alone = QuantizedModel.copy_of(reference.model.unet, quantized.plan)
    for key, quantizer in alone.quantizers().items():
        quantizer.source = quantized.quantizers()[key].source
        quantizer.enabled = key in {f"{name}.{part}" for part in ("q", "k", "v", "softmax")}
    accumulated = measure_errors(alone, reference).accumulated[index(quantized, name)]
    assert own.tolist() == pytest.approx(accumulated.tolist(), abs=1e-3)
    assert torch.isfinite(own).all()


def test_measuring_leaves_the_models_as_they_were(quantized: QuantizedModel, reference: Reference) -> None:
    x, t, labels = reference.x[0], reference.t[0], reference.labels()
    with torch.no_grad():
        before = [model(x, t, **labels)[0] for model in (reference.model.unet, quantized)]
        measure_errors(quantized, reference)
        observe_activations(quantized.plan, reference)
        after = [model(x, t, **labels)[0] for model in (reference.model.unet, quantized)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_distributions_cover_what_the_layer_receives(quantized: QuantizedModel, reference: Reference) -> None:
    activation = observe_activations(quantized.plan, reference)["conv_in"]
    for k, x in enumerate(reference.x):
        assert activation.by_step.lo[k] == x.min() and activation.by_step.hi[k] == x.max()
    assert activation.by_class is not None and reference.class_labels is not None
    steps = len(reference.x)
    assert len(activation.by_class.lo) == 3 * steps
    for c in range(3):
        mine = reference.x[1][reference.class_labels == c]
        assert activation.by_class.hi[c * steps + 1] == mine.max()
    total = activation.by_class.counts.view(3, steps, -1).sum(0)
    assert torch.equal(total, activation.by_step.counts)
