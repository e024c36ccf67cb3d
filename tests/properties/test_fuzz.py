"""Artifacts, calibration sets and unfinished runs that somebody has changed and signed: a result or a typed error."""

from __future__ import annotations

import os
from pathlib import Path

from fuzzing import fuzz, make_subjects

CASES = int(os.environ.get("PTQ_TDQ_FUZZ_CASES", "1000"))


def test_no_file_crashes_hangs_or_runs_code(tmp_path: Path) -> None:
    make_subjects(tmp_path)
    outcomes, wrong = fuzz(tmp_path, 0, CASES)
    assert wrong == []
    assert sum(outcomes.values()) == CASES
    for name in ("artifact", "calls"):
        kinds = {outcome for outcome in outcomes if outcome.startswith(f"{name}: ")}
        assert len(kinds) > 1, "some are refused and some do no harm"
    for name in ("run", "tuning"):
        assert outcomes[f"{name}: result"] > 0, "what is damaged is done again"
