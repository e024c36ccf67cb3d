"""The calibration set: what the U-Net receives while the full-precision model samples, and its file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ptq_tdq.artifacts.atomic import write_atomic
from ptq_tdq.errors import CalibrationSetError

# safetensors writes several metadata keys in random order; one key keeps equal sets equal byte for byte.
_METADATA_KEY = "ptq_tdq_calibration_set"


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Inputs of the U-Net: ``x`` float32 [N, C, H, W] at the time steps ``t`` float32 [N] (fractional for some).

    ``class_labels`` is int64 [N], or None for an unconditional model. ``recipe`` says how the set was made, as plain
    JSON values. Raises :class:`CalibrationSetError` for an empty set, other shapes or types, and NaN or Inf.
    """

    x: Tensor
    t: Tensor
    class_labels: Tensor | None
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes_fit = self.x.ndim == 4 and self.t.shape == (len(self.x),)
        types_fit = self.x.dtype == self.t.dtype == torch.float32
        if self.class_labels is not None:
            shapes_fit = shapes_fit and self.class_labels.shape == self.t.shape
            types_fit = types_fit and self.class_labels.dtype == torch.int64
        if not (shapes_fit and types_fit):
            raise CalibrationSetError(
                "A calibration set needs x float32 [N, C, H, W], t float32 [N] and class_labels int64 [N] or None; "
                f"got x {_describe(self.x)}, t {_describe(self.t)} and class_labels {_describe(self.class_labels)}."
            )
        if not self.x.numel():
            raise CalibrationSetError("The calibration set is empty; collect it again with at least one sample.")
        if not torch.isfinite(self.t).all():
            raise CalibrationSetError("The calibration set has a time step that is NaN or Inf; collect it again.")
        finite = torch.isfinite(self.x).flatten(1).all(dim=1)
        if not finite.all():
            t = self.t[~finite][0].item()
            raise CalibrationSetError(
                f"The calibration set has NaN or Inf in a sample at time step t = {t:g}; collect it again."
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def sha256(self) -> str:
        """Hash of every tensor (name, type, shape, bytes) and of the recipe."""
        digest = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {_describe(tensor)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; equal sets give equal bytes.

        Raises :class:`~ptq_tdq.errors.OutputError` when ``path`` cannot be written.
        """
        metadata = json.dumps({"recipe": self.recipe, "sha256": self.sha256}, sort_keys=True)
        write_atomic(path, save(self._tensors(), metadata={_METADATA_KEY: metadata}))

    @classmethod
    def load(cls, path: str | Path) -> CalibrationSet:
        """Read and verify a file of :meth:`save`.

        Raises :class:`CalibrationSetError` for a missing, truncated, foreign, altered, empty or non-finite set.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})[_METADATA_KEY])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            stored, recipe = metadata["sha256"], dict(metadata["recipe"])
            labels = tensors.pop("class_labels", None)
            x, t = tensors.pop("x"), tensors.pop("t")
        except FileNotFoundError as error:
            raise CalibrationSetError(f"There is no calibration set at '{path}'; check the path.") from error
        except (OSError, SafetensorError) as error:
            raise CalibrationSetError(
                f"The calibration set '{path}' is truncated or is no safetensors file; collect it again ({error})."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationSetError(
                f"The file '{path}' is no calibration set of ptq-tdq, or its header was altered; collect it again."
            ) from error
        loaded = cls(x, t, labels, recipe)
        if tensors or loaded.sha256 != stored:
            raise CalibrationSetError(
                f"The calibration set '{path}' was altered: its content does not match its hash; collect it again."
            )
        return loaded

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"x": self.x, "t": self.t, "class_labels": self.class_labels}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}


def _describe(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
