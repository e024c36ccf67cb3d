"""The quantized model: the original's call signature around quantized layers, and its way to and from an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ptq_tdq.artifacts import Artifact, IntervalTable, model_card, write_artifact
from ptq_tdq.errors import ArtifactMismatchError, ConfigError, ModelError, OutputError, first_line
from ptq_tdq.fit import check_fit
from ptq_tdq.identity import dtype_name, state_of
from ptq_tdq.intervals import IntervalSource
from ptq_tdq.intervals.dynamic import Dynamic, restore_dynamic
from ptq_tdq.intervals.table import TableSource
from ptq_tdq.modules import ActivationQuantizer, QuantLayer, WeightQuantizer
from ptq_tdq.modules.layers import own_weight
from ptq_tdq.modules.products import ATTRIBUTE
from ptq_tdq.records import LayerRecord
from ptq_tdq.search import QParams
from ptq_tdq.timeaxis import TimeAxis
from ptq_tdq.timed_model import TimedModel
from ptq_tdq.wrap import folded_copy, insert, set_tensors, switch, untie


class QuantizedModel(TimedModel):
    """A model with quantizers in it and the original's call signature (``pipe.unet = quantized``).

    The activations' intervals follow each sample's time step, taken from the model's own time argument (``axis``).
    Attributes that it has not are those of the wrapped ``model``. ``metrics`` is what was measured on it.
    """

    def __init__(self, model: nn.Module, axis: TimeAxis, plan: Iterable[LayerRecord]) -> None:
        """Put quantizers, switched off, into ``model`` itself; see :meth:`copy_of` to leave it as it is."""
        super().__init__(model, axis)
        self.plan = tuple(plan)
        self.metrics: dict[str, Any] = {}
        self.notices: tuple[str, ...] = ()  # what stays in floating point, known right after calibration
        self.static: dict[str, QParams] = {}  # static MSE intervals by quantizer, known right after calibration
        untie(model, [record.name for record in self.plan if record.kind != "product"])
        for record in self.plan:
            insert(model, record)

    def __repr__(self) -> str:
        """Short, since diffusers prints a component that it does not save."""
        how = " ".join(str(self.provenance[key]) for key in ("scheme", "method") if key in self.provenance)
        return (
            f"<QuantizedModel of {type(self.model).__name__}, {how or 'not calibrated'}; a pipeline saves what "
            "ptq_tdq.integrations.diffusers.as_diffusers makes of it>"
        )

    @classmethod
    def copy_of(cls, model: nn.Module, axis: TimeAxis, plan: Iterable[LayerRecord]) -> QuantizedModel:
        """A quantized model around a deep copy, in evaluation mode and without gradients."""
        return cls(folded_copy(model), axis, plan)

    def layers(self) -> dict[str, QuantLayer]:
        """Quantized layers by name, in execution order."""
        found = {m.record.name: m for m in self.model.modules() if isinstance(m, QuantLayer)}
        return {r.name: found[r.name] for r in self.plan if r.name in found}

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation quantizers by name, in execution order."""
        found = {m.record.name: m for m in self.model.modules() if isinstance(m, ActivationQuantizer)}
        return {q.name: found[q.name] for r in self.plan for q in r.inputs}

    def units(self) -> list[str]:
        """Names of the reconstruction units, in execution order."""
        return list(dict.fromkeys(record.unit for record in self.plan))

    def quantize(self, *, weights: bool = True, activations: bool = True) -> QuantizedModel:
        """Switch all quantizers; returns the model itself."""
        switch(self.model, weights=weights, activations=activations)
        return self

    @contextmanager
    def intervals(self, replacement: dict[str, QParams]) -> Iterator[QuantizedModel]:
        """Run with other, static intervals (by quantizer name) inside a ``with`` block."""
        quantizers = self.quantizers()
        before = {name: quantizer.source for name, quantizer in quantizers.items()}
        length = self.axis.length
        for name, found in replacement.items():
            quantizers[name].source = TableSource(found.scale.expand(length), found.zero_point.expand(length))
        try:
            yield self
        finally:
            for name, source in before.items():
                quantizers[name].source = source

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the artifact directory, all or nothing.

        Raises :class:`~ptq_tdq.errors.OutputError` where that is impossible, :class:`ModelError` before calibration.
        """
        write_artifact(path, self.to_artifact(), overwrite=overwrite)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
        """Upload the artifact to the hub, as one commit; returns the address of that.

        The repository is made where there is none. :func:`~ptq_tdq.load_quantized` takes its name in the place of a
        folder's. Raises :class:`~ptq_tdq.errors.OutputError` where the hub cannot be reached or refuses.
        """
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "artifact")
            try:
                api = HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                message = f"Upload {self.provenance['scheme']} {self.provenance['method']}"
                return str(
                    api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "artifact", commit_message=message)
                )
            except Exception as error:  # the hub client raises many unrelated types
                raise OutputError(
                    f"The artifact was not uploaded to '{repo_id}' ({first_line(error)}); check the name, and "
                    "log in by 'hf auth login'."
                ) from error

    def to_artifact(self) -> Artifact:
        """The model as plain data.

        Raises :class:`ModelError` before calibration, for a model with adapters, and for one whose weights somebody has
        changed since.
        """
        if getattr(self.model, "peft_config", None):
            raise ModelError("The model has adapters, which an artifact does not hold; unload them before saving it.")
        layers = self.layers()
        dtypes = {name: dtype_name(own_weight(layer.layer).dtype) for name, layer in layers.items()}
        if not self.provenance or any(w.codes is None for layer in layers.values() for w in layer.weight_quantizers()):
            raise ModelError("The model is not calibrated yet; pass it through calibrate() before saving it.")
        for name, layer in layers.items():
            if not layer.stands_for_codes(layer.quantized_weight()):
                raise ModelError(
                    f"The weight of {name} is no longer what its codes stand for, so it cannot be saved; change "
                    "weights before calibration, or by ptq_tdq.finetune."
                )
        parts = {name: layer.weight_quantizers() for name, layer in layers.items()}
        return Artifact(
            config={**self.provenance, "buffer_dtypes": buffer_dtypes(self.model)},
            layers=tuple(replace(record, dtype=dtypes.get(record.name, record.dtype)) for record in self.plan),
            tables={name: table_of(quantizer) for name, quantizer in self.quantizers().items()},
            weight_codes={name: _joined(part) for name, part in parts.items()},
            weight_scale={name: torch.stack([_known(w.scale) for w in part], 1) for name, part in parts.items()},
            weight_zero_point={
                name: torch.stack([_known(w.zero_point) for w in part], 1) for name, part in parts.items()
            },
            divisors={name: layer.divisor for name, layer in layers.items() if layer.divisor is not None},
            float_state=self._float_state(),
            metrics=self.metrics,
            card=model_card(self.provenance, self.metrics),
        )

    @classmethod
    def from_artifact(cls, model: nn.Module, artifact: Artifact) -> QuantizedModel:
        """Fill ``model``, whose structure is the artifact's, and switch its quantizers on.

        All its parameters become those of the artifact, in the dtype that the calibrated model had. Raises
        :class:`~ptq_tdq.errors.ArtifactMismatchError` where they do not fit.
        """
        check_fit(model, artifact)
        set_tensors(model.eval().requires_grad_(False), artifact.float_state)
        for record in artifact.layers:
            if record.kind != "product":
                layer, dtype = model.get_submodule(record.name), getattr(torch, record.dtype)
                room = torch.zeros(own_weight(layer).shape, dtype=dtype)  # for what the codes stand for
                layer.weight = nn.Parameter(room, requires_grad=False)
        for name, dtype in artifact.config.get("buffer_dtypes", {}).items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, key, getattr(module, key).to(getattr(torch, dtype)))
        quantized = cls(model, artifact.time_axis, artifact.layers)
        for name, layer in quantized.layers().items():
            layer.divisor = artifact.divisors.get(name)
            for index, (lo, hi) in enumerate(layer.ranges):
                scale, zero_point = artifact.weight_scale[name][:, index], artifact.weight_zero_point[name][:, index]
                layer.assign(index, artifact.weight_codes[name][:, lo:hi], scale, zero_point)
        for name, quantizer in quantized.quantizers().items():
            try:
                quantizer.source = source_of(quantizer, artifact.tables[name], artifact.time_axis.length)
            except (ConfigError, ModelError) as error:
                raise ArtifactMismatchError(f"The quantizer '{name}' cannot be made: {error}") from error
        quantized.provenance, quantized.metrics = artifact.config, artifact.metrics
        return quantized.finalize()

    def finalize(self) -> QuantizedModel:
        """Replace the layers' original weights by the quantized ones and switch all quantizers on.

        From here on nothing is in the memory of the model that this is a copy of.
        """
        layers = self.layers().values()
        for layer in layers:
            layer.finalize()
        new = {id(p) for layer in layers for p in (own_weight(layer.layer), layer.bias)}
        for parameter in self.model.parameters():
            if id(parameter) not in new:
                parameter.data = parameter.detach().clone()
        return self.quantize()

    def _float_state(self) -> dict[str, Tensor]:
        """All tensors that stay in floating point, under the original model's names."""
        layers, state = self.layers(), state_of(self.model)
        own = tuple(f"{name}." for name in layers)
        state = {k: value for k, value in state.items() if not k.startswith(own) and f".{ATTRIBUTE}." not in k}
        for name, layer in layers.items():  # all that a class of layers has, but for what its codes replace
            state |= {f"{name}.{k}": value for k, value in state_of(layer.layer).items() if k != "weight"}
        return state


def buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """The dtypes of buffers that no file holds, where they are not those in which a model builds them."""
    saved = state_of(model).keys()
    return {
        name: dtype_name(buffer.dtype)
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.dtype in (torch.float16, torch.bfloat16)
    }


def _joined(parts: list[WeightQuantizer]) -> Tensor:
    """The codes of all channel ranges."""
    codes = [_known(part.codes) for part in parts]
    return codes[0] if len(codes) == 1 else torch.cat(codes, 1)


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def table_of(quantizer: ActivationQuantizer) -> IntervalTable:
    """What is kept of a quantizer whose source is finished."""
    source = quantizer.source
    if isinstance(source, TableSource):
        return IntervalTable(source.scale, source.zero_point)
    assert isinstance(source, Dynamic)
    return IntervalTable(None, source.zero_point.reshape(1), source.generator)


def source_of(quantizer: ActivationQuantizer, table: IntervalTable, length: int) -> IntervalSource:
    """Inverse of :func:`table_of`; tables have ``length`` entries."""
    if table.scale is not None:
        return TableSource(table.scale, table.zero_point)
    zero_point, generator = table.zero_point.reshape(()), table.generator
    return restore_dynamic(quantizer.record.method, zero_point, quantizer.qtype, generator, length)
