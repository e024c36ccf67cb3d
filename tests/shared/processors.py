"""What some processors cannot run exactly."""

from __future__ import annotations

import pytest

from ptq_tdq.processor import sums_eight_bits

needs_wide_sums = pytest.mark.skipif(
    not sums_eight_bits(),
    reason="onnxruntime and OpenVINO add pairs of 8-bit products in 16 bits on this processor (no VNNI), and saturate",
)
