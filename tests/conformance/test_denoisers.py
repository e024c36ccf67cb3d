"""Each small denoiser in the shared table does what users of the table count on."""

from __future__ import annotations

import pytest
import torch
from denoisers import DENOISERS, Denoiser, prediction

T = torch.tensor([801.0, 501.0, 101.0])


@pytest.fixture(scope="module", params=DENOISERS, ids=lambda denoiser: denoiser.name)
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return request.param


@torch.no_grad()
def test_rows_are_finite_and_independent_of_the_batch(denoiser: Denoiser) -> None:
    model = denoiser.build()
    together = prediction(model(**denoiser.inputs(3, T)))
    assert len(together) == 3
    assert bool(torch.isfinite(together).all())
    for row in range(3):
        alone = prediction(model(**denoiser.inputs(1, T[row : row + 1], first=row)))
        assert bool(torch.isfinite(alone).all())
        if not denoiser.mixes_rows:
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
