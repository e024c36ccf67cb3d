"""What a model is: its name, its configuration, a hash of its weights, and whether these are numbers."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ptq_tdq.compiled import COMPILED, uncompiled
from ptq_tdq.errors import ModelError


def dtype_name(dtype: torch.dtype) -> str:
    """As torch has it: "float32"."""
    return str(dtype).removeprefix("torch.")


def model_name(model: Any) -> str:
    """The last folder of where a model was read from, or else its class."""
    model = uncompiled(model)
    return Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)).name


def base_config(model: Any) -> dict[str, Any]:
    """A model's configuration as plain JSON data; of a module that is not diffusers' own, its class name."""
    model = uncompiled(model)
    if not hasattr(model, "to_json_string"):
        return {"_class_name": type(model).__name__}
    config: dict[str, Any] = json.loads(model.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was made with. What diffusers notes for itself is left out: it is a list of another order in
    each process (``_use_default_values``, a set's).
    """
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict as its modules fill it, whatever its class or a hook makes of that (other names, a part).

    Raises :class:`ModelError` for entries that are no dense tensors or have no values yet.
    """
    state: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        module._save_to_state_dict(state, f"{path}." if path else "", keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            kind = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(
                f"The model keeps a {kind} as '{name}' in its state, and artifacts hold dense tensors alone; keep it "
                "in buffers, or as plain attributes that its constructor sets."
            )
        if is_lazy(value):
            raise ModelError(
                f"'{name}' of the model has no values yet, since its layer is lazy and was never called; call the "
                "model once with a sample, or leave the layer out."
            )
    return {name: value.detach() for name, value in state.items()}


def model_sha256(model: Any) -> str:
    """Hash the weights (as float32) and the configuration of a model; raises what :func:`state_of` raises.

    Configuration entries at their default are left out, so a newer diffusers with more entries gives the same hash, and
    compiled parts count as what they were made of.
    """
    defaults = inspect.signature(type(uncompiled(model)).__init__).parameters
    config = {
        name: value
        for name, value in dict(getattr(model, "config", None) or {}).items()
        if not name.startswith("_") and not (name in defaults and _same(value, defaults[name].default))
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    state = {name.replace(f"{COMPILED}.", ""): tensor for name, tensor in state_of(model).items()}
    for name, tensor in sorted(state.items()):
        values = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first tensor with NaN or Inf, if there is one; raises what :func:`state_of` raises."""
    state = state_of(model).items()
    return next((name for name, x in state if x.is_floating_point() and not bool(torch.isfinite(x).all())), None)


def _same(value: Any, default: Any) -> bool:
    # JSON makes lists of tuples
    value, default = (list(x) if isinstance(x, tuple) else x for x in (value, default))
    return bool(value == default)
