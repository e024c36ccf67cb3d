"""What this machine computes: on which devices, integer products, bfloat16."""

from __future__ import annotations

from typing import Literal

import torch

from ptq_tdq.errors import ConfigError, first_line

ComputeDtype = Literal["auto", "float32", "bfloat16"]
COMPUTE_DTYPES = {
    "auto": "bfloat16 where the processor computes in it, float32 elsewhere",
    "float32": "exact",
    "bfloat16": "fast where the processor has it",
}


def check_device(device: str | torch.device) -> None:
    """Raise :class:`ConfigError` for a device that is not there."""
    try:
        torch.zeros(1, device=device).cpu()  # also what has no values, as "meta"
    except Exception as error:  # of many unrelated types: an assertion, or a module that torch was built without
        said = first_line(error)
        raise ConfigError(f"The device {str(device)!r} cannot be used here ({said}); choose another.") from error


def instruction_set() -> str:
    """The instructions for integer products: "amx-int8", "vnni" or, without these, the widest vectors ("avx2")."""
    if torch.cpu._is_amx_tile_supported():
        return "amx-int8"
    return "vnni" if torch.cpu._is_vnni_supported() else torch.backends.cpu.get_cpu_capability().lower()


def sums_eight_bits() -> bool:
    """Whether u8 x s8 products are added in 32 bits; other processors add pairs in 16 bits first, and saturate."""
    return instruction_set() in ("amx-int8", "vnni")


def has_bfloat16() -> bool:
    """Whether bfloat16 products are instructions; elsewhere they are emulated, ten times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def compute_dtype(choice: ComputeDtype) -> ComputeDtype:
    """The dtype that a choice of one means here: "auto" is bfloat16 where the processor computes in it."""
    if choice != "auto":
        return choice
    return "bfloat16" if has_bfloat16() else "float32"
