"""``auto``: each quantizer gets the simplest source that its data justify (see :mod:`ptq_tdq.recon.choice`)."""

from __future__ import annotations

from ptq_tdq.intervals.tdq_thin import TDQThin

SIMPLE, FOLLOWING, TOKEN = "static", "tdq-thin", "dynamic-token"


class Auto(TDQThin):
    """What is tried: an interval that follows t. Phase A leaves it, or one for all t, and says so in the record."""

    pattern = "auto"
