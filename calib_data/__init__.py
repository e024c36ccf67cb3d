"""Calibration sets: load a diffusion model, run its full-precision sampler, keep what the quantizers must see."""

from __future__ import annotations

from ptq_tdq.calib_data.calibration_set import CalibrationSet
from ptq_tdq.calib_data.collect import collect, collect_cached, make_recipe
from ptq_tdq.calib_data.load import REFERENCE_ID, LoadedModel, check_unet, load_model, unet_sha256, with_scheduler
from ptq_tdq.calib_data.sampling import Record, Recorder, sample_latents, start_schedule
from ptq_tdq.calib_data.steps import StepDistribution, choose_steps

__all__ = [
    "REFERENCE_ID",
    "CalibrationSet",
    "LoadedModel",
    "Record",
    "Recorder",
    "StepDistribution",
    "check_unet",
    "choose_steps",
    "collect",
    "collect_cached",
    "load_model",
    "make_recipe",
    "sample_latents",
    "start_schedule",
    "unet_sha256",
    "with_scheduler",
]
