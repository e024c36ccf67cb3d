"""Full-precision models as they are used: loading, sampling, and the calls that calibration must see."""

from __future__ import annotations

from ptq_tdq.calib_data.collect import collect, collect_cached, first_call, make_recipe
from ptq_tdq.calib_data.embedded import EMBEDDED
from ptq_tdq.calib_data.finite import finite_outputs
from ptq_tdq.calib_data.load import load_model, with_scheduler
from ptq_tdq.calib_data.loop import LoopSampler
from ptq_tdq.calib_data.original import (
    LoadedModel,
    Original,
    check_denoiser,
    find_original,
    from_pipeline,
    is_embedded,
)
from ptq_tdq.calib_data.pipeline import PipelineSampler
from ptq_tdq.calib_data.prompts import read_prompts
from ptq_tdq.calib_data.sampler import Sampled, Sampler, new_schedule, sample_generator
from ptq_tdq.calib_data.steps import StepDistribution, choose_steps

__all__ = [
    "EMBEDDED",
    "LoadedModel",
    "LoopSampler",
    "Original",
    "PipelineSampler",
    "Sampled",
    "Sampler",
    "StepDistribution",
    "check_denoiser",
    "choose_steps",
    "collect",
    "collect_cached",
    "find_original",
    "finite_outputs",
    "first_call",
    "from_pipeline",
    "is_embedded",
    "load_model",
    "make_recipe",
    "new_schedule",
    "read_prompts",
    "sample_generator",
    "with_scheduler",
]
