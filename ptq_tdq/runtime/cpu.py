"""What this processor runs: which integer kernels oneDNN takes, and whether their sums are exact."""

from __future__ import annotations

import torch

from ptq_tdq.errors import RuntimeUnsupportedError

PAIR_LIMIT = 32767  # without VNNI two products are added in 16 bits


def instruction_set() -> str:
    """The integer instructions that oneDNN's u8 x s8 kernels use here: "amx-int8", "vnni" or "none"."""
    if torch.cpu._is_amx_tile_supported():
        return "amx-int8"
    return "vnni" if torch.cpu._is_vnni_supported() else "none"


def check_exact(layer: str, largest_weight: int, largest_code: int, isa: str) -> None:
    """Raise :class:`RuntimeUnsupportedError` where sums of ``layer`` would saturate.

    ``largest_weight`` is the largest absolute weight code, ``largest_code`` the largest activation code (unsigned).
    """
    if isa == "none" and 2 * largest_weight * largest_code > PAIR_LIMIT:
        raise RuntimeUnsupportedError(
            f"This processor has no VNNI: the integer sums of {layer} (weights up to {largest_weight}, activations up "
            f'to {largest_code}) would saturate. Use backend="simulated", or a scheme of at most 7 bits on one side.'
        )
