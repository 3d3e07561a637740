"""Normalized gradients."""

import numpy as np
import optax
import pytest

import optclip
from optclip import measures
from tests.methods import gradients


@pytest.mark.parametrize("target", [1.0, 1e-3])
def test_every_step(target):
    def oracle(grads):
        n = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        return {k: g * target / n if np.isfinite(n) else np.full_like(g, np.nan) for k, g in grads.items()}

    gradients.check(optclip.normalize_by_update_norm(target), oracle, gradients.eventful())


def test_per_leaf_zeros_stay():
    grads = gradients.eventful()
    updates, _ = gradients.run(optclip.normalize_by_update_norm(measure=measures.leaf_norm), grads)
    size = np.linalg.norm(updates["b"], axis=1)
    assert set(np.unique(size[:12])) == {0}
    np.testing.assert_allclose(size[12:130], 1, rtol=1e-6)


def test_optax_agrees_where_its_eps_is_nothing():
    grads = gradients.healthy(10)
    got, _ = gradients.run(optclip.normalize_by_update_norm(2.0), grads)
    want, _ = gradients.run(optax.normalize_by_update_norm(2.0, eps=0.0), grads)
    for k in got:
        np.testing.assert_allclose(got[k], want[k], rtol=1e-6)
