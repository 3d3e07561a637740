"""Delta-GClip against float64."""

import numpy as np
import pytest

import optclip
from tests.methods import gradients


@pytest.mark.parametrize("max_norm, delta", [(0.5, 1e-3), (1.0, 0.25), (1.0, 1.0)])
def test_every_step(max_norm, delta):
    def oracle(grads):
        n = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        scale = min(1.0, max(delta, max_norm / n)) if np.isfinite(n) else np.nan
        return {k: scale * g if np.isfinite(n) else np.full_like(g, np.nan) for k, g in grads.items()}

    updates, _ = gradients.run(optclip.delta_gclip(max_norm, delta), gradients.eventful())
    if delta < 1:
        gradients.check(optclip.delta_gclip(max_norm, delta), oracle, gradients.eventful())
    else:
        np.testing.assert_array_equal(updates["a"][:90], gradients.eventful()["a"][:90])
