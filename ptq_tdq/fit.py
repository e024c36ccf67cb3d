"""Whether an artifact is that of a model: every tensor against the module it belongs to, before anything computes.

``artifacts`` has found the artifact free of contradictions; here it meets the structure of a model. Hashes say nothing
about that: whoever writes a file writes its hashes too, and a kernel that trusts a wrong shape writes past its buffers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact
from ptq_tdq.errors import ArtifactMismatchError
from ptq_tdq.identity import state_of
from ptq_tdq.modules import layer_kind
from ptq_tdq.modules.layers import outputs_first, weight_groups
from ptq_tdq.modules.products import OPERANDS, owner_of
from ptq_tdq.records import LayerRecord

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ADVICE = "; load the artifact with the model that it was made from, or make it again."


def check_fit(model: nn.Module, artifact: Artifact) -> None:
    """Compare ``artifact`` with ``model``, built from its configuration (on the meta device, or with any weights).

    Raises :class:`ArtifactMismatchError` naming the first module, layer or tensor that does not fit.
    """
    _check_exchanged(model, artifact)
    seen: dict[nn.Module, str] = {}
    products: dict[nn.Module, int] = {}
    for record in artifact.layers:
        if record.kind == "product":
            owner, number = owner_of(record.name)
            module = _module(model, record, owner)
            _check_product(record, number, products.get(module, 0))
            products[module] = number + 1
            continue
        module = _module(model, record, record.name)
        if module in seen:
            raise ArtifactMismatchError(f"'{record.name}' and '{seen[module]}' are one layer of the model{_ADVICE}")
        seen[module] = record.name
        kind = layer_kind(module)
        _require(kind == record.kind, record, f"is of class {type(module).__name__} in the model, not a {record.kind}")
        _check_layer(record, module, artifact.weight_codes.get(record.name))
    _check_state(model, artifact)


def classes_of(model: nn.Module) -> dict[str, type]:
    """The class of each module, and of each attention processor that is not diffusers' own.

    Dropout, which passes on what it gets when a model samples, is an Identity.
    """
    found: dict[str, type] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = type(module)
        processor = type(vars(module).get("processor"))
        if processor is not type(None) and not processor.__module__.startswith("diffusers."):
            found[f"{name}.processor"] = processor
    return {name: nn.Identity if cls in DROPOUT else cls for name, cls in found.items()}


def _check_exchanged(model: nn.Module, artifact: Artifact) -> None:
    classes = {name: cls.__name__ for name, cls in classes_of(model).items()}
    for name, cls in artifact.config.get("exchanged_modules", {}).items():
        if classes.get(name) != cls:
            found, expected = (f"of class {kind}" if kind else "missing" for kind in (classes.get(name), cls))
            raise ArtifactMismatchError(
                f"The module '{name}' is {found} in the model, {expected} in the artifact{_ADVICE}"
            )


def _module(model: nn.Module, record: LayerRecord, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ArtifactMismatchError(f"The model has no layer '{record.name}'{_ADVICE}") from None


def _check_product(record: LayerRecord, number: int, expected: int) -> None:
    _require(number == expected, record, f"is not product {expected} of its module")
    _require(record.weight_bits is None and not record.splits, record, "has weights, which a product has not")
    count = len(record.inputs)
    _require(count == len(OPERANDS), record, f"has {count} quantizers, not one for each of {', '.join(OPERANDS)}")


def _check_layer(record: LayerRecord, module: nn.Module, codes: Tensor | None) -> None:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or codes is None:
        where = "the model" if weight is None else "the artifact"
        raise ArtifactMismatchError(f"'{record.name}' has no weight of its own in {where}{_ADVICE}")
    own = outputs_first(module, weight)
    shape, expected = list(codes.shape), list(own.shape)
    _require(shape == expected, record, f"has codes of the shape {shape}, its weight in the model is {expected}")
    groups = weight_groups(module)
    channels, ranges = own.shape[1] * groups, len(record.ranges)
    _require(
        ranges >= 1 and record.splits[-1] == channels,
        record,
        f"has the channel ranges {list(record.splits)}, its input in the model has {channels} channels",
    )
    _require(ranges == 1 or groups == 1, record, "has channel ranges, which a grouped convolution cannot have")
    count = len(record.inputs)
    _require(
        count == ranges or (count == 0 and ranges == 1),  # only the weight of a whole layer may be quantized alone
        record,
        f"has {count} quantizers for {ranges} channel range{'s' * (ranges > 1)}",
    )


def _check_state(model: nn.Module, artifact: Artifact) -> None:
    """All tensors but the quantized weights: the same names, shapes and kinds of number.

    Real ones are in float32, in the model's dtype, or in one of those that its layers had.
    """
    quantized = {f"{name}.weight" for name in artifact.weight_codes}
    expected = {key: tensor for key, tensor in state_of(model).items() if key not in quantized}
    for key in sorted(expected.keys() ^ artifact.float_state.keys()):
        where = "the artifact" if key in expected else "the model"
        raise ArtifactMismatchError(f"The tensor '{key}' is missing in {where}{_ADVICE}")
    known = {torch.float32, *(getattr(torch, layer.dtype) for layer in artifact.layers)}
    for key, tensor in expected.items():
        found = artifact.float_state[key]
        mixed = found.is_floating_point() and found.dtype not in {tensor.dtype, *known}
        if found.shape != tensor.shape or _kind(found) != _kind(tensor) or mixed:
            raise ArtifactMismatchError(
                f"The tensor '{key}' is {found.dtype} {list(found.shape)}, "
                f"in the model {tensor.dtype} {list(tensor.shape)}{_ADVICE}"
            )


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Whether its numbers are real, complex, or bytes with a meaning of their own."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.is_quantized


def _require(condition: bool, record: LayerRecord, clause: str) -> None:
    if not condition:
        raise ArtifactMismatchError(f"'{record.name}' {clause}{_ADVICE}")
