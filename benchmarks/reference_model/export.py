"""Weights as they are shipped: fp16, without the training's folder names in the configuration."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_halves(source: Path, target: Path) -> None:
    """Copy the diffusers folder ``source`` to ``target`` with every weight in fp16; a scheduler has only a config."""
    target.mkdir(parents=True, exist_ok=True)
    for config in source.glob("*config.json"):
        values = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        (target / config.name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if (source / WEIGHTS).exists():
        tensors = {name: value.half().contiguous() for name, value in load_file(source / WEIGHTS).items()}
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise ValueError(f"A weight of {source} is too large for fp16.")
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        (target / WEIGHTS).chmod(0o644)
