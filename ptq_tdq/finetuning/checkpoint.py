"""An unfinished run on disk: all that the next iteration depends on, in one file that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ptq_tdq.artifacts import write_atomic
from ptq_tdq.recon import RunDirectory

FILE = "finetune.safetensors"
_DAMAGE = (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError)


class Checkpoint:
    """The folder of a run; raises :class:`~ptq_tdq.errors.ResumeError` where another run has begun in it."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], on_notice: Callable[[str], None] = lambda text: None
    ) -> None:
        self.run, self.on_notice = RunDirectory(folder, identity, on_notice=on_notice), on_notice
        self.path = folder / FILE

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Keep the state; raises :class:`~ptq_tdq.errors.OutputError` where that is impossible."""
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        write_atomic(self.path, save(plain, metadata={"sha256": self._hash(plain)}))

    def read(self, form: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """The state that was kept, or None, with a notice for a file that is damaged.

        ``form`` are the shapes of tensors that must be there.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata["sha256"] != self._hash(tensors):
                raise ValueError
            if any(tuple(tensors[name].shape) != shape for name, shape in form.items()):
                raise ValueError
        except FileNotFoundError:
            return None
        except _DAMAGE:
            self.on_notice(f"The checkpoint {self.path} is damaged; the run begins again.")
            return None
        return tensors

    def _hash(self, tensors: dict[str, Tensor]) -> str:
        return sha256(json.dumps(self.run.identity).encode() + save(tensors)).hexdigest()
