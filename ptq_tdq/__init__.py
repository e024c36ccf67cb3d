"""Post-training quantization of diffusion models with time-dependent activation intervals."""
