"""MARS's corrected and clipped gradient against float64."""

import numpy as np
import pytest

import optclip
from tests.methods import gradients


def oracle(max_norm, gamma, b1):
    last = {}

    def step(g):
        c = g + gamma * b1 / (1 - b1) * (g - last.get("g", g))
        last["g"] = g
        return gradients.shrink(c, np.linalg.norm(c), max_norm)

    return step


@pytest.mark.parametrize("max_norm, gamma, b1", [(1.0, 0.025, 0.95), (0.5, 0.1, 0.9), (1.0, 0.0, 0.95)])
def test_every_step(max_norm, gamma, b1):
    tx = optclip.mars_clip(max_norm, gamma, b1)
    gradients.check(tx, gradients.by_leaf(lambda: oracle(max_norm, gamma, b1)), gradients.eventful())


def test_the_first_gradient_is_not_corrected():
    grads = gradients.healthy(2)
    got, _ = gradients.run(optclip.mars_clip(np.inf, 0.1, 0.9), grads)
    np.testing.assert_array_equal(got["a"][0], grads["a"][0])
    assert not np.allclose(got["a"][1], grads["a"][1])


def test_without_correction_it_is_the_leaf_clip():
    got, _ = gradients.run(optclip.mars_clip(gamma=0.0), gradients.healthy(20))
    want, _ = gradients.run(optclip.clip_by_leaf_norm(1.0), gradients.healthy(20))
    for k in got:
        np.testing.assert_array_equal(got[k], want[k])


def test_a_scheduled_correction():
    grads = gradients.healthy(6)
    got, _ = gradients.run(optclip.mars_clip(np.inf, lambda count: 0.1 * (count == 3), 0.9), grads)
    want = grads["b"] + 0.9 * (np.arange(6) == 3)[:, None] * (grads["b"] - np.roll(grads["b"], 1, axis=0))
    np.testing.assert_allclose(got["b"], want, rtol=2e-6)
