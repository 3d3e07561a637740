"""SPAMP against float64: a power for the elements of a spike, then a projection."""

import numpy as np
import pytest

import optclip
from tests.methods import gradients, norms


def oracle(decay, least):
    state = {"mean": 0.0, "t": 0}

    def step(g):
        n = np.linalg.norm(g)
        state["mean"] = decay * state["mean"] + (1 - decay) * n
        state["t"] += 1
        tau = state["mean"] / (1 - decay ** state["t"])
        if n == 0:
            return g
        a = min(1.0, max(least, tau / n))
        shaped = np.sign(g) * np.abs(g) ** a
        return gradients.shrink(shaped, np.linalg.norm(shaped), tau)

    return step


@pytest.mark.parametrize("decay, least", [(0.99, 0.7), (0.9, 0.3)])
def test_every_step(decay, least):
    grads = gradients.eventful()
    grads["b"] = grads["b"] + (grads["b"] == 0)
    tx = optclip.spamp(decay, least=least, patience=None)
    gradients.check(tx, gradients.by_leaf(lambda: oracle(decay, least)), grads, rtol=3e-5)


def test_the_mend_leaves_a_healthy_run_alone():
    gradients.check_healthy(optclip.spamp)


def test_a_power_of_one_is_a_clip_at_the_average():
    got, _ = gradients.run(optclip.spamp(least=1.0), gradients.healthy())
    rule = optclip.thresholds.running_mean(0.99)
    want, _ = gradients.run(optclip.clip_by(optclip.measures.leaf_norm, rule), gradients.healthy())
    for k in got:
        np.testing.assert_allclose(got[k], want[k], rtol=1e-6)


def test_small_elements_of_a_spike_lose_less():
    g = np.tile(np.array([0.01, 1.0], np.float32), (30, 1))
    g[-1] *= 50
    updates, _ = gradients.run(optclip.spamp(), {"a": g, "b": g})
    small, large = updates["a"][-1] / g[-1]
    assert small > 2 * large


def test_a_new_level_is_accepted():
    before = norms.healthy(1000)
    assert norms.first_pass(optclip.spamp(0.999), before, 100.0, 60) == 49
    assert norms.first_pass(optclip.spamp(0.999, patience=None), before, 100.0, 500) == 500
    assert norms.first_pass(optclip.spamp(), np.zeros(30), 1.0, 60) == 0
