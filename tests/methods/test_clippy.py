"""Clippy against float64, with its Adagrad in front as in the authors' code."""

import numpy as np
import optax
import pytest

import optclip
from tests.methods import gradients

PARAMS = {"a": np.float32([[0.0, 1e-3, -2.0], [0.5, 1.0, -1.0]]), "b": np.float32([0.0, 0.0, 0.0, 0.0])}


def oracle(relative, absolute, params):
    def step(grads):
        out = {}
        for k, u in grads.items():
            bound = relative * np.abs(params[k].astype(np.float64)) + absolute
            scale = np.min(np.where(u == 0, 1.0, bound / np.where(u == 0, 1, np.abs(u))))
            out[k] = u * min(1.0, scale) if np.all(np.isfinite(u)) else np.full_like(u, np.nan)
        return out

    return step


@pytest.mark.parametrize("relative, absolute", [(0.1, 1e-7), (0.5, 1e-2)])
def test_every_step(relative, absolute):
    want = oracle(relative, absolute, PARAMS)
    gradients.check(optclip.clippy(relative, absolute), want, gradients.eventful(), PARAMS)


def test_training_as_the_authors_code_does():
    """Their accumulator takes the gradient in after the step; here the same delta is made by hand."""
    rng = np.random.default_rng(0)
    tx = optclip.clippy(0.1, 1e-3)
    w = {"w": np.float32([0.0, 1.0, -3.0])}
    want, accumulator = w["w"].astype(np.float64), np.full(3, 0.1)
    state, step = tx.init(w), optax.apply_updates
    for _ in range(300):
        g = rng.normal(size=3) * np.exp(rng.normal())
        delta = 0.1 * g / np.sqrt(accumulator + 1e-7)
        accumulator += g**2
        updates, state = tx.update({"w": np.float32(-delta)}, state, w)
        w = step(w, updates)
        want = want - min(1, np.min((0.1 * np.abs(want) + 1e-3) / np.abs(delta))) * delta
    np.testing.assert_allclose(w["w"], want, rtol=1e-3)


@pytest.mark.parametrize(("update", "param", "absolute", "want"), [
    ([2.0], [-4.0], 0.02, [0.42]), ([-2.0], [4.0], 0.0, [-0.4]), ([-2.0], [0.0], 0.0, [0.0]),
    ([2.0], [20.0], 0.1, [2.0]),
    ([1.0, 1.0, 0.0, 0.0], [1.0, 0.1, 1.0, 0.0], 0.0, [0.01, 0.01, 0.0, 0.0]),
    ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], 0.0, [0.0, 0.0, 0.0, 0.0]), ([0.0], [0.0], 0.0, [0.0]),
])  # fmt: skip
def test_without_an_absolute_part_a_parameter_at_zero_holds_its_tensor(update, param, absolute, want):
    update, param = np.float32(update), np.float32(param)
    tx = optclip.clippy(0.1, absolute)
    np.testing.assert_allclose(tx.update(update, tx.init(param), param)[0], np.float32(want), rtol=1e-6)


def test_schedules_of_both_bounds():
    halve = lambda value: lambda count: np.float32(value) / (1 + count)
    grads = {k: np.repeat(x[:1], 3, axis=0) for k, x in gradients.healthy(1).items()}
    updates, _ = gradients.run(optclip.clippy(halve(0.1), halve(1e-3)), grads, PARAMS)
    np.testing.assert_allclose(updates["b"][1] * 2, updates["b"][0], rtol=1e-5)
    np.testing.assert_allclose(updates["b"][2] * 3, updates["b"][0], rtol=1e-5)


def test_a_huge_finite_update_is_not_an_infinite_one():
    grads = {"a": np.full((1, 2, 3), 3e38, np.float32), "b": np.ones((1, 4), np.float32)}
    updates, _ = gradients.run(optclip.clippy(0.1, 1e-3), grads, PARAMS)
    assert np.all(np.isfinite(updates["a"]))


def test_needs_params():
    tx = optclip.clippy()
    with pytest.raises(ValueError, match="clippy needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
