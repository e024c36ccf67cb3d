"""README.md of an artifact: the model card that the Hugging Face Hub shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # and not a folder on somebody's disk, or a class
_TEXT = """\
---
{front_matter}
---

# {title}

The denoising model of `{model}`, quantized after training with ptq-tdq: {weight_bits}-bit weights and
{activation_bits}-bit activations, method `{method}`, preset `{preset}`.

## Use

```python
from ptq_tdq import load_quantized

{use}
```

{place} The weights are stored as integers. The default PyTorch path
**simulates** integer arithmetic in floating point: it shows what quantization does to the images, and it is not faster
than the original model.

## What was measured

{measured}

## How it was made

| | |
|---|---|
{facts}

`ptq_tdq_config.json` records every choice, `interval_tables.safetensors` the interval of each quantizer at each t.
"""


def model_card(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Write the card of an artifact from its ``config`` (see :class:`Artifact`) and ``metrics`` (possibly nested).

    Deterministic, and free of machine paths: a model that was read from a folder appears by the folder's name only.
    """
    identifier: str = config["base_model"]["id"]
    model = public_name(identifier)
    scheme: str = config["scheme"]
    weight_bits, activation_bits = scheme.removeprefix("W").split("A")
    rows = [f"| {_cell(name)} | {value:.6g} |" for name, value in _numbers(metrics)]
    measured = "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "Nothing has been measured yet."
    facts = {
        "scheme": scheme,
        "method": config["method"],
        "preset": config["preset"],
        **_training(config.get("finetune")),
        "time steps": config["time_axis"]["num_train_timesteps"],
        "seed": config["seed"],
        "base model (SHA-256 of the weights)": config["base_model"]["sha256"],
        "calibration set (SHA-256)": config["calibration_set"]["sha256"],
        **{f"{name} version": version for name, version in sorted(config["versions"].items())},
    }
    own = "_diffusers_version" not in config["model_config"]  # a class that only its user has
    use, place = _use(config, own)
    return _TEXT.format(
        front_matter=_front_matter(identifier if _HUB_ID.fullmatch(identifier) else None, scheme, own),
        use=use,
        place=place,
        title=f"{model} {scheme}",
        model=model,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        method=config["method"],
        preset=config["preset"],
        measured=measured,
        facts="\n".join(f"| {_cell(name)} | {_cell(str(value))} |" for name, value in facts.items()),
    )


def public_name(identifier: str) -> str:
    """A model id without the folders of the machine that it was read on."""
    return identifier if _HUB_ID.fullmatch(identifier) else re.split(r"[/\\]", identifier.rstrip("/\\"))[-1]


def _use(config: dict[str, Any], own: bool) -> tuple[str, str]:
    """The line that loads the model, and what it takes the place of."""
    component = config["base_model"].get("component")
    if component is not None:
        line = f'pipe.{component} = load_quantized("path/to/this/folder")'
        return line, "`pipe` is the diffusers pipeline of the original model."
    given = f", model={config['model_config'].get('_class_name')}(...)" if own else ""
    line = f'model = load_quantized("path/to/this/folder"{given})'
    of_class = ", an instance of whose class is passed with any weights" if own else ""
    return line, f"It is called as the original model is{of_class}."


def _training(about: Any) -> dict[str, str]:
    """The training that followed calibration, if any did."""
    choices = about.get("choices") if isinstance(about, dict) else None
    if not isinstance(choices, dict):
        return {}
    return {"fine-tuned": f"{choices.get('iterations')} iterations, quantizer {choices.get('quantizer')}"}


def _front_matter(base_model: str | None, scheme: str, own: bool) -> str:
    """YAML; every value is written as JSON, which YAML includes, so no value can break it."""
    fields: dict[str, Any] = {"library_name": "ptq-tdq"}
    if base_model is not None:
        fields |= {"base_model": base_model, "base_model_relation": "quantized"}
    kinds = ["diffusion"] if own else ["diffusion", "diffusers"]
    fields["tags"] = [*kinds, "quantization", "post-training-quantization", "ptq-tdq", scheme.lower()]
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())


def _numbers(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the single numbers in ``metrics`` with dotted names; lists (values over t) stay in metrics.json."""
    for name, value in sorted(metrics.items()):
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
