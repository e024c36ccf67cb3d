"""Calibration sets: load a diffusion model, run its full-precision sampler, keep what the quantizers must see."""
