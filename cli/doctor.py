"""``ptq-tdq doctor``: what this machine and this installation can do."""

from __future__ import annotations

import os
import shlex
from importlib import metadata
from typing import Any

import click
import torch
from packaging.requirements import Requirement

from ptq_tdq.cli.options import json_option, print_json
from ptq_tdq.native.library import c_compiler
from ptq_tdq.processor import has_bfloat16, instruction_set, sums_eight_bits
from ptq_tdq.runtime.native import open_library

EXTRAS = {
    "report": "HTML pages and figures (report)",
    "metrics": "FD, KID, precision and recall of the embedded models (evaluate, benchmark)",
    "pipelines": "text encoders and tokenizers of text-to-image, video and audio pipelines; offloading",
    "onnx": "ONNX files (export), run by onnxruntime",
    "openvino": "ONNX files run by OpenVINO",
    "fidelity": "Inception FID, sFID and IS (evaluate --data)",
}
"""What each extra adds, and to which command."""


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Show what this processor, its compiler and the installed packages can do."""
    found = facts()
    if as_json:
        print_json(found)
        return
    click.echo(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    cores = "1 core" if found["cores"] == 1 else f"{found['cores']} cores"
    click.echo(f"Processor: {cores}, {found['instructions']}; {_products(found)}")
    built = f"built by {found['compiler'] or 'a compiler that is gone'}, and loaded"
    click.echo(f"Native kernels: {found['native'] or built}")
    click.echo(f"Devices for --device: {', '.join(found['devices'])}")
    click.echo("Extras, installed by pip install 'ptq-tdq[NAME]':")
    for name, missing in found["missing"].items():
        click.echo(f"  {name:10}{'installed' if not missing else 'without ' + ', '.join(missing)}: {EXTRAS[name]}")


def facts() -> dict[str, Any]:
    """The same as plain JSON data; "native" says why there are no native kernels, "missing" lists packages by extra."""
    library = open_library()
    return {
        "versions": {name: metadata.version(name) for name in ("ptq-tdq", "torch", "diffusers")},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": instruction_set(),
        "sums_eight_bits": sums_eight_bits(),
        "bfloat16": has_bfloat16(),
        "native": library if isinstance(library, str) else None,
        "compiler": _compiler(),
        "devices": _devices(),
        "missing": {name: _missing(name) for name in EXTRAS},
    }


def _products(found: dict[str, Any]) -> str:
    eight = "summed in 32 bits" if found["sums_eight_bits"] else "by wider instructions"
    half = "products" if found["bfloat16"] else "emulated, so learning runs in float32"
    return f"8-bit products {eight}, bfloat16 {half}"


def _compiler() -> str | None:
    try:
        return shlex.join(c_compiler())
    except OSError:
        return None


def _devices() -> list[str]:
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _missing(extra: str) -> list[str]:
    """Packages of the extra, and of extras that it names, that are not installed or too old."""
    missing = []
    for line in metadata.requires("ptq-tdq") or []:
        wanted = Requirement(line)
        of_extra = wanted.marker is not None and wanted.marker.evaluate({"extra": extra})
        if of_extra and wanted.name == "ptq-tdq":
            missing += [name for inner in wanted.extras for name in _missing(inner)]
        elif of_extra and not _installed(wanted):
            missing.append(wanted.name)
    return sorted(set(missing))


def _installed(wanted: Requirement) -> bool:
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
