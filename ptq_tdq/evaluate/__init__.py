"""Metrics: of tensors, of samples."""
