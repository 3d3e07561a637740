"""AutoClip against its paper: every norm is appended, the limit is NumPy's percentile of them all."""

import numpy as np
import pytest

import optclip
from tests.methods import norms


def oracle(percent, window):
    history = []

    def step(size):
        history.append(size)
        return np.percentile(history[-window:], percent)

    return step


@pytest.mark.parametrize("percent, window", [(10, 1000), (90, 50), (0, 7), (37.5, 100)])
def test_every_step(percent, window):
    tx = optclip.autoclip(percent, window, patience=None)
    norms.check(tx, oracle(percent, window), norms.eventful(), rtol=1e-5)


def test_at_100_nothing_is_clipped():
    sizes = norms.healthy()
    np.testing.assert_array_equal(norms.run(optclip.autoclip(100.0), sizes)[0], sizes)


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.autoclip)


def test_idle_steps_do_not_hold_a_layer_at_zero():
    idle = np.concatenate([norms.healthy(20), np.zeros(60)])
    assert norms.first_pass(optclip.autoclip(10.0, 50), idle, 1.0, 60) == 0
    assert norms.first_pass(optclip.autoclip(10.0, 50, patience=None), idle, 1.0, 60) == 45


def test_a_higher_level_is_accepted_within_a_window():
    before = norms.healthy(200)
    assert norms.first_pass(optclip.autoclip(10.0, 100), before, 10.0, 200) <= 100
    assert 850 < norms.first_pass(optclip.autoclip(10.0, 1000), before, 10.0, 1000) <= 1000
