"""LAMB's trust clip against float64."""

import numpy as np
import optax
import pytest

import optclip
from tests.methods import gradients

PARAMS = {"a": np.float32([[0.1, 1e-3, -0.2], [0.5, 0.1, -0.1]]), "b": np.zeros(4, np.float32)}


@pytest.mark.parametrize("ratio, cap", [(1.0, np.inf), (0.5, 0.2)])
def test_every_step(ratio, cap):
    def oracle(grads):
        out = {}
        for k, u in grads.items():
            weight = np.linalg.norm(PARAMS[k].astype(np.float64))
            n = np.linalg.norm(u)
            trust = min(weight, cap) / n if weight > 0 and n > 0 else 1.0
            out[k] = u * min(trust * ratio if weight > 0 else 1.0, 1.0) if np.isfinite(n) else np.full_like(u, np.nan)
        return out

    gradients.check(optclip.lamb_clip(ratio, cap=cap), oracle, gradients.eventful(), PARAMS)


def test_where_it_clips_it_is_the_trust_ratio_of_optax():
    grads = {k: 10 * np.abs(x) + 1 for k, x in gradients.healthy(5).items()}
    got, _ = gradients.run(optclip.lamb_clip(), grads, PARAMS)
    want, _ = gradients.run(optax.scale_by_trust_ratio(), grads, PARAMS)
    for k in got:
        np.testing.assert_allclose(got[k], want[k], rtol=1e-5)


def test_needs_params():
    tx = optclip.lamb_clip()
    with pytest.raises(ValueError, match="lamb_clip needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
