"""Levanter's clip of the update norm, and the step-outlier rule of OLMo, as limits over a window."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import responses, thresholds
from tests.methods import norms


def oracle(sigma, window, least, ddof=0, floor=1e-6):
    history = []

    def step(size):
        past = history[-window:]
        limit = np.mean(past) + sigma * max(np.std(past, ddof=ddof), floor) if len(past) >= least else np.inf
        history.append(size)
        return limit

    return step


@pytest.mark.parametrize("sigma, window, least", [(3.0, 128, 64), (6.0, 128, 64), (1.0, 20, 2)])
def test_every_step(sigma, window, least):
    tx = optclip.clip_by_historical_norm(sigma, window, warmup=least, patience=None)
    norms.check(tx, oracle(sigma, window, least), norms.eventful(), rtol=2e-5)


def test_every_step_of_the_unbiased_rule():
    rule = thresholds.window_zscore(2.0, 64, warmup=63, ddof=1, eps=0.0, patience=None)
    norms.check(optclip.clip_by(optclip.global_norm, rule), oracle(2.0, 64, 63, 1, 0.0), norms.eventful(), rtol=2e-5)


def test_a_window_of_equal_norms_has_no_spread():
    rule = thresholds.window_zscore(6.0, 8, warmup=2, eps=0.0)
    level = np.full(30, 0.1, np.float32)
    np.testing.assert_array_equal(norms.run(optclip.clip_by(optclip.global_norm, rule), level)[0], level)


def test_huge_norms_do_not_overflow():
    sizes = np.full(40, 3e38, np.float32)
    sizes[::2] = 1e38
    _, limits, _ = norms.run(optclip.clip_by_historical_norm(1.0, 16, warmup=4), sizes)
    assert np.all(limits[4:] < np.inf)
    np.testing.assert_allclose(limits[20:], 3e38, rtol=1e-5)


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.clip_by_historical_norm)


def test_a_higher_level_is_accepted_within_14_steps():
    assert norms.first_pass(optclip.clip_by_historical_norm(), norms.healthy(200), 1e6, 60) <= 14


def test_idle_steps_are_forgiven():
    idle = np.concatenate([norms.healthy(90), np.zeros(130)])
    assert norms.first_pass(optclip.clip_by_historical_norm(), idle, 1.0, 60) == 0
    assert norms.first_pass(optclip.clip_by_historical_norm(patience=None), idle, 1.0, 60) == 13


def test_as_a_response_of_zero_it_drops_outliers():
    tx = optclip.clip_by(optclip.global_norm, thresholds.window_zscore(6.0, warmup=8), responses.zero)
    sizes = np.ones(20, np.float32) + 0.1 * np.arange(20, dtype=np.float32) % 0.3
    sizes[15] = 50
    out, _, _ = norms.run(tx, sizes)
    assert out[15] == 0 and np.all(np.delete(out, 15) > 0)


def test_after_the_optimizer():
    tx = optax.chain(optax.sgd(1.0), optclip.clip_by_historical_norm(warmup=2))
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for scale in (1.0, 1.1, 0.9, 100.0):
        updates, state = tx.update({"w": jnp.full(2, scale)}, state, params)
    assert float(optclip.global_norm(updates)) < 3
