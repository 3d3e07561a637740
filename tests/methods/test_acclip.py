"""ACClip against float64, element by element."""

import numpy as np
import pytest

import optclip
from tests.methods import gradients


def oracle(b1, b2, alpha, eps):
    state = {}

    def step(g):
        m, power = state.get("m", 0 * g), state.get("power", 0 * g)
        m = b1 * m + (1 - b1) * g
        power = b2 * power + (1 - b2) * np.abs(g) ** alpha
        state.update(m=m, power=power)
        size = np.abs(m) + eps
        return m * np.minimum(1, power ** (1 / alpha) / np.where(size == 0, 1, size))

    return step


@pytest.mark.parametrize("b1, b2, alpha, eps", [(0.9, 0.99, 1.0, 1e-5), (0.8, 0.9, 1.5, 0.0), (0.9, 0.99, 2.0, 1e-8)])
def test_every_step(b1, b2, alpha, eps):
    tx = optclip.acclip(b1, b2, alpha=alpha, eps=eps)
    gradients.check(tx, gradients.by_leaf(lambda: oracle(b1, b2, alpha, eps)), gradients.eventful(), rtol=2e-5)


def test_a_leaf_with_a_nan_keeps_its_memory():
    good = gradients.healthy(60)
    bad = {k: np.insert(x, 30, x[5], axis=0) for k, x in good.items()}
    bad["a"][30, 0, 0] = np.nan
    want, _ = gradients.run(optclip.acclip(), good)
    got, _ = gradients.run(optclip.acclip(), bad)
    assert np.all(np.isnan(got["a"][30])) and not np.any(np.isnan(got["b"]))
    np.testing.assert_array_equal(np.delete(got["a"], 30, axis=0), want["a"])


@pytest.mark.parametrize("shift", [10.0, 0.1])
def test_a_new_level_is_accepted(shift):
    sizes = np.append(np.ones(600), np.full(600, shift)).astype(np.float32)[:, None]
    updates, _ = gradients.run(optclip.acclip(), {"a": sizes, "b": sizes})
    late = updates["a"][600 + 460 :] / shift
    assert np.all((late > 0.88) & (late < 1.12))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_huge_and_tiny_elements_stay_in_range(alpha):
    grads = {"a": np.full((5, 1), 1e30, np.float32), "b": np.full((5, 1), 1e-30, np.float32)}
    updates, _ = gradients.run(optclip.acclip(alpha=alpha, eps=0.0), grads)
    ratio = updates["a"][:, 0] / 1e30
    np.testing.assert_allclose(updates["b"][:, 0] / 1e-30, ratio, rtol=1e-5)
    assert np.all(ratio > 0)
