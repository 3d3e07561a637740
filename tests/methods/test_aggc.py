"""AGGC against float64: a band around the moving average of each group's norm, approached by bounded steps."""

import numpy as np
import pytest

import optclip
from tests.methods import gradients


def oracle(high, low, decay, max_down=0.9, max_up=1.1):
    mean = 0.0

    def step(g):
        nonlocal mean
        n = np.linalg.norm(g)
        target = n
        if mean > 0 and n > high * mean:
            target = max(high * mean, max_down * n)
        elif low is not None and n < low * mean:
            target = min(low * mean, max_up * n)
        mean = decay * mean + (1 - decay) * target
        return g if n == 0 else g * (target / n)

    return step


@pytest.mark.parametrize("high, low, decay", [(0.7, None, 0.95), (1.5, None, 0.99), (1.2, 0.95, 0.9)])
def test_every_step(high, low, decay):
    tx = optclip.aggc({"a": "x", "b": "y"}, high, low, decay=decay)
    gradients.check(tx, gradients.by_leaf(lambda: oracle(high, low, decay)), gradients.eventful())


def test_leaves_of_a_group_share_a_norm():
    grads = gradients.healthy(30)
    joint = {"a": np.concatenate([grads["a"].reshape(30, -1), grads["b"]], axis=1)}
    one, _ = gradients.run(optclip.aggc("all", 1.2, 0.9), grads)
    flat, _ = gradients.run(optclip.aggc("all", 1.2, 0.9), joint)
    np.testing.assert_allclose(np.concatenate([one["a"].reshape(30, -1), one["b"]], axis=1), flat["a"], rtol=1e-6)


def test_no_step_shrinks_by_more_than_max_down():
    grads = gradients.eventful()
    updates, _ = gradients.run(optclip.aggc({"a": 0, "b": 1}, 0.7, max_down=0.8), grads)
    for k in grads:
        fine = np.isfinite(grads[k].reshape(320, -1)).all(1) & (grads[k].reshape(320, -1) != 0).any(1)
        norm = lambda x, fine=fine: np.linalg.norm(x.reshape(320, -1)[fine], axis=1)
        assert norm(updates[k]).shape == norm(grads[k]).shape
        assert np.all(norm(updates[k]) >= 0.8 * norm(grads[k]) * (1 - 1e-5))
