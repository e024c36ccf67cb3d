"""Block reconstruction (BRECQ, arXiv 2102.05426, as Q-Diffusion runs it)."""

from ptq_tdq.recon.checkpoint import CHECKPOINT_FORM, RunDirectory
from ptq_tdq.recon.engine import CACHE_BYTES, UnitReport, reconstruct
from ptq_tdq.recon.forecast import Forecast, check_room, make_forecast

__all__ = [
    "CACHE_BYTES",
    "CHECKPOINT_FORM",
    "Forecast",
    "RunDirectory",
    "UnitReport",
    "check_room",
    "make_forecast",
    "reconstruct",
]
