"""Every number that an evaluation gives: its name in files, its title, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """``key`` is the name in JSON; ``against`` says whether it compares with full precision (pairs of samples from the
    same noise, or both sets) or with the data, where full precision has a value of its own.
    """

    key: str
    title: str
    against: Literal["full precision", "data"]
    higher_is_better: bool
    digits: int = 2

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return self.key.removesuffix("_db").replace("_", "-")

    def text(self, value: float | None) -> str:
        """A value as a table shows it; None is an infinite ratio."""
        return "∞" if value is None else f"{value:.{self.digits}f}"


METRICS = (
    Metric("mean_noise_sqnr_db", "prediction, mean SQNR over t (dB)", "full precision", True),
    Metric("latent_sqnr_db", "final latents, SQNR (dB)", "full precision", True),
    Metric("image_sqnr_db", "images, SQNR (dB)", "full precision", True),
    Metric("image_psnr_db", "images, PSNR (dB)", "full precision", True),
    Metric("feature_distance_c10", "feature distance of pairs (1: unrelated)", "full precision", False, 3),
    Metric("fd_c10_to_full_precision", "FD-C10 between both sets", "full precision", False, 3),
    Metric("fd_c10_second_to_full_precision", "FD-C10 between both sets, second", "full precision", False, 3),
    Metric("class_agreement", "classifier sees the same class", "full precision", True, 3),
    Metric("fd_c10", "FD-C10", "data", False, 3),
    Metric("fd_c10_second", "FD-C10, second classifier", "data", False, 3),
    Metric("kid_c10", "KID-C10", "data", False, 4),
    Metric("is_c10", "IS-C10", "data", True, 3),
    Metric("precision_c10", "precision-C10", "data", True, 3),
    Metric("recall_c10", "recall-C10", "data", True, 3),
    Metric("class_accuracy", "class accuracy", "data", True, 3),
    Metric("fid", "FID (Inception)", "data", False),
    Metric("sfid", "sFID (Inception)", "data", False),
    Metric("inception_score", "Inception Score", "data", True),
)
INCEPTION = ("fid", "sfid", "inception_score")  # which need real images
