"""StableAdamW's update clip against float64, around SGD and as a whole AdamW."""

import numpy as np
import optax
import pytest

import optclip
from tests.methods import gradients

PARAMS = {"a": np.float32([[0.1, 1e-3, -0.2], [0.5, 0.1, -0.1]]), "b": np.zeros(4, np.float32)}


def rms_of(decay, eps):
    state = {"v": 0.0, "t": 0}

    def step(g):
        state["t"] += 1
        state["v"] = decay * state["v"] + (1 - decay) * g**2
        root = np.sqrt(state["v"] / (1 - decay ** state["t"]))
        return np.sqrt(np.mean((g / np.maximum(root, eps)) ** 2)), root

    return step


def sgd(decay, eps, max_rms):
    rms = rms_of(decay, eps)

    def step(g):
        return -0.5 * g / max(1.0, rms(g)[0] / max_rms)

    return step


@pytest.mark.parametrize("decay, max_rms, eps", [(0.99, 1.0, 1e-6), (0.9, 1.2, 1e-2)])
def test_every_step_around_sgd(decay, max_rms, eps):
    tx = optclip.stable_adamw_clip(optax.sgd(0.5), max_rms, decay, eps=eps)
    gradients.check(tx, gradients.by_leaf(lambda: sgd(decay, eps, max_rms)), gradients.eventful(), PARAMS, rtol=2e-5)


def test_every_step_of_stable_adamw():
    """The authors' algorithm: the learning rate, decay included, is divided by max(1, RMS)."""

    def adamw(w):
        rms = rms_of(0.99, 1e-6)
        state = {"m": 0.0, "t": 0}

        def step(g):
            size, root = rms(g)
            state["t"] += 1
            state["m"] = 0.9 * state["m"] + 0.1 * g
            update = state["m"] / (1 - 0.9 ** state["t"]) / (root + 1e-6)
            return -2e-3 / max(1.0, size) * (update + 0.2 * w)

        return step

    tx = optclip.stable_adamw_clip(optax.adamw(2e-3, b2=0.99, eps=1e-6, weight_decay=0.2))
    grads = gradients.healthy()
    steps = {k: adamw(PARAMS[k].astype(np.float64)) for k in PARAMS}
    gradients.check(tx, lambda g: {k: steps[k](g[k]) for k in g}, grads, PARAMS, rtol=5e-5)


def test_the_first_step_passes_and_none_grows():
    grads = gradients.healthy(300)
    plain, _ = gradients.run(optax.sgd(1.0), grads)
    got, _ = gradients.run(optclip.stable_adamw_clip(optax.sgd(1.0)), grads)
    np.testing.assert_allclose(got["a"][0], plain["a"][0], rtol=1e-6)
    for k in got:
        assert np.all(np.abs(got[k]) <= np.abs(plain[k]))
        assert np.all(np.abs(got[k]) >= np.abs(plain[k]) / 10.01)


def test_the_inner_optimizer_may_want_more_arguments():
    tx = optclip.stable_adamw_clip(
        optax.GradientTransformationExtraArgs(lambda p: (), lambda u, s, p=None, *, value: (value * u, s))
    )
    updates, _ = tx.update(np.float32(1), tx.init(np.float32(1)), value=3.0)
    assert float(updates) == pytest.approx(3)
