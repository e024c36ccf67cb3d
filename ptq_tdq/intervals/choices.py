"""The choices that interval sources share, in calibration and in fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ptq_tdq.choices import Choices, choice

Encoding = Literal["none", "normalize", "fourier", "frequency"]
ENCODINGS = {
    "none": "t itself",
    "normalize": "t / T",
    "fourier": "sines and cosines of random frequencies",
    "frequency": "sines and cosines of frequencies from 1 to 1 / 10000, geometrically spaced",
}


@dataclass(frozen=True)
class IntervalChoices(Choices):
    """How interval sources that learn or follow t are made."""

    interval_parameter: Literal["raw", "log"] = choice(
        "log",
        "What is learned of a scale.",
        alternatives={"raw": "the scale itself, as LSQ does", "log": "its logarithm, so that a step is relative"},
        source="LSQ, arXiv 1902.08153",
    )
    zero_point: Literal["fixed", "own"] = choice(
        "own",
        "The zero points of intervals that follow t, the same for all methods.",
        alternatives={
            "fixed": "the static one at each t",
            "own": "each interval's own: one per bin of S_N, one per step, a smooth function of t for networks",
        },
    )
    module_start: Literal["as-is", "static", "steps"] = choice(
        "steps",
        "Where networks of t start.",
        alternatives={
            "as-is": "as they are drawn, with their mean over t at the static interval",
            "static": "at the static interval for each t",
            "steps": "at a smooth curve through the best intervals of the steps",
        },
    )
    time_encoding: Encoding = choice(
        "frequency", "What the network of tdq reads of t.", alternatives=ENCODINGS, source="TDQ, supp Table 2"
    )
    module_weights: Literal["he", "gaussian", "zero", "xavier"] = choice(
        "he",
        "How weights of networks of t are drawn.",
        alternatives={
            "he": "as torch draws those of linear layers",
            "gaussian": "normal with deviation 1",
            "zero": "they are 0",
            "xavier": "normal with Glorot's deviation",
        },
        source="TDQ, supp Table 7",
    )
    thin_encoding: Encoding = choice(
        "normalize", "What the network of tdq-thin reads of t.", alternatives=ENCODINGS, source="TDQ, supp s5"
    )
    thin_activation: Literal["relu", "silu", "tanh"] = choice(
        "silu", "Nonlinearity of the network of tdq-thin, which the paper leaves open.", source="TDQ, supp s5"
    )
