"""Block reconstruction (BRECQ, arXiv 2102.05426, as Q-Diffusion runs it)."""

from ptq_tdq.recon.checkpoint import CHECKPOINT_FORM, RunDirectory
from ptq_tdq.recon.engine import UnitReport, reconstruct

__all__ = ["CHECKPOINT_FORM", "RunDirectory", "UnitReport", "reconstruct"]
